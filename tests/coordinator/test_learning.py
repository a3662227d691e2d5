"""What earlier builds teach: works of packages, speeds of workers, and what the core is told of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.journal.codec import decode_facts, encode_facts
from coordinator.learning import learner
from coordinator.learning.learned import (
    FASTEST,
    FETCH_MS,
    LONGEST_S,
    NEWEST,
    TRIVIAL_MS,
    Learned,
    learn,
)
from coordinator.learning.learned_times import LearnedTimes
from coordinator.learning.learner import EMULATED_SPEED, Learner, OpenWork, revised, timed_builds
from coordinator.learning.works import TimedBuild, WorkKind, WorkSource, kind_of
from coordinator.stores.timings import AttemptTiming, Outcome, TimingsError, TimingStore
from infra.clock import SystemClock
from scheduler.events import Event, SpeedsMeasured, WorksEstimated
from scheduler.facts import StepAdded
from scheduler.model import UNKNOWN_WORK_MS, StepKey, StepSpec
from scheduler.pauses import whole
from workers.wire.messages import NETWORK_FEATURE

LINUX, ARM = "x86_64-linux", "aarch64-linux"
SPEEDS = {"slow": 0.5, "usual": 1.0, "other": 1.0, "fast": 2.0}


def builds_on(speeds: dict[str, float], packages: int, seed: int, system: str = LINUX) -> list[TimedBuild]:
    """Heavy-tailed packages, each built twice on workers by chance, with 15 % noise."""
    chance = random.Random(seed)
    made = []
    for number in range(packages):
        work = chance.lognormvariate(3.0, 1.5) + 1
        for worker in chance.sample(sorted(speeds), 2):
            seconds = work / speeds[worker] * chance.lognormvariate(0.0, 0.15)
            made.append(TimedBuild(f"p{number}", system, worker, seconds))
    return made


def test_speeds_are_found_from_packages_that_several_workers_have_built() -> None:
    learned = learn(builds_on(SPEEDS, 200, seed=1))
    for worker, speed in SPEEDS.items():
        assert learned.speeds[worker, LINUX] == pytest.approx(speed, rel=0.1)


def test_a_work_is_that_of_a_usual_worker_whichever_has_built_the_package() -> None:
    builds = builds_on(SPEEDS, 200, seed=2)
    builds += [TimedBuild("only-slow", LINUX, "slow", 100.0), TimedBuild("only-fast", LINUX, "fast", 25.0)]
    learned = learn(builds)
    for package in ("only-slow", "only-fast"):
        expected = learned.expected(package, LINUX, WorkKind.BUILD)
        assert expected.work_ms == pytest.approx(50_000, rel=0.15)
        assert (expected.source, expected.builds) == (WorkSource.PACKAGE, 1)


def test_one_build_in_seven_that_hung_moves_nothing() -> None:
    builds = builds_on(SPEEDS, 200, seed=3)
    builds += [TimedBuild(f"p{number}", LINUX, "fast", 40_000.0) for number in range(0, 200, 4)]
    assert learn(builds).speeds["fast", LINUX] == pytest.approx(2.0, rel=0.25)


def test_only_the_newest_builds_of_a_package_count() -> None:
    builds = [TimedBuild("p", LINUX, "usual", 1000.0)] * 30 + [TimedBuild("p", LINUX, "usual", 10.0)] * NEWEST
    assert learn(builds).expected("p", LINUX, WorkKind.BUILD).work_ms == 10_000


def test_a_worker_with_few_comparisons_is_a_usual_one_and_with_some_partly() -> None:
    few = [TimedBuild(f"p{n}", LINUX, worker, s) for n in range(2) for worker, s in (("a", 10.0), ("b", 40.0))]
    assert learn(few).speeds == {}
    some = [TimedBuild(f"p{n}", LINUX, worker, s) for n in range(4) for worker, s in (("a", 10.0), ("b", 40.0))]
    assert 1.0 < learn(some).speeds["a", LINUX] < 2.0
    assert learn(some).speeds["b", LINUX] == pytest.approx(1 / learn(some).speeds["a", LINUX])


def test_builds_of_less_than_a_second_say_nothing_of_speed() -> None:
    builds = [TimedBuild(f"p{n}", LINUX, w, s) for n in range(50) for w, s in (("a", 0.1), ("b", 0.9))]
    assert learn(builds).speeds == {}


def test_another_system_stands_in_for_a_package_scaled_by_those_that_both_have_built() -> None:
    builds = [TimedBuild(f"p{n}", system, "w", s + n) for n in range(20) for system, s in ((LINUX, 10.0), (ARM, 10.0))]
    slower = [TimedBuild(each.package, ARM, "w", each.seconds * 3) for each in builds if each.system == LINUX]
    learned = learn([*(each for each in builds if each.system == LINUX), *slower, TimedBuild("new", LINUX, "w", 100.0)])
    expected = learned.expected("new", ARM, WorkKind.BUILD)
    assert expected.source is WorkSource.OTHER_SYSTEM
    assert expected.work_ms == pytest.approx(300_000, rel=0.01)


def test_what_was_never_built_is_as_its_kind_and_as_a_prior_where_nothing_was() -> None:
    learned = learn([TimedBuild(f"p{n}", LINUX, "w", 30.0) for n in range(10)])
    assert learned.expected("new", LINUX, WorkKind.BUILD).work_ms == 30_000
    nothing = {kind: Learned().expected("new", LINUX, kind) for kind in WorkKind}
    assert {kind: each.work_ms for kind, each in nothing.items()} == {
        WorkKind.FETCH: FETCH_MS,
        WorkKind.TRIVIAL: TRIVIAL_MS,
        WorkKind.BUILD: UNKNOWN_WORK_MS,
    }
    assert {each.source for each in nothing.values()} == {WorkSource.NOTHING}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hello-2.12.tar.gz", WorkKind.FETCH),
        ("source", WorkKind.FETCH),
        ("fix-build.patch", WorkKind.TRIVIAL),
        ("setup-hook", WorkKind.TRIVIAL),
        ("hello-2.12", WorkKind.BUILD),
    ],
)
def test_the_kind_of_a_derivation_is_seen_in_its_name(name: str, kind: WorkKind) -> None:
    assert kind_of(name) is kind
    assert kind_of(name, fixed_output=True) is WorkKind.FETCH


TIMED = st.builds(
    TimedBuild,
    st.sampled_from(["p", "q", ""]),
    st.sampled_from([LINUX, ARM]),
    st.sampled_from(["a", "b", "c"]),
    st.one_of(st.just(0.0), st.floats(min_value=1e-300, max_value=1e300)),
    st.sampled_from(WorkKind),
)


@given(st.lists(TIMED, max_size=40))
def test_whatever_was_measured_speeds_are_bounded_and_works_are_positive(builds: list[TimedBuild]) -> None:
    learned = learn(builds)
    assert all(speed * 1.0000001 >= 1 / FASTEST and speed <= FASTEST * 1.0000001 for speed in learned.speeds.values())
    works = [learned.expected(each.package, each.system, each.kind).work_ms for each in builds]
    assert all(1 <= work_ms <= LONGEST_S * 1000 for work_ms in works)
    assert learn(builds) == learned


def test_a_time_that_cannot_be_makes_no_work_that_the_journal_cannot_hold() -> None:
    """The clock of a worker jumped, or it lies: what all submissions are expected to take must not follow."""
    learned = learn([TimedBuild(f"p{n}", LINUX, "w", 1e300) for n in range(10)])
    for package in ("p1", "new"):
        work_ms = learned.expected(package, LINUX, WorkKind.BUILD).work_ms
        fact = StepAdded(StepSpec(StepKey("s"), (), work_ms))
        assert decode_facts(encode_facts([fact])) == (fact,)


class Told:
    """A core that only listens, and a store of timings that may be gone."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.builds: list[TimedBuild] = []
        self.gone = False
        self.emulated: list[tuple[str, str]] = []
        self.waiting: list[OpenWork] = []
        self.learner = Learner(self.read, self.post, lambda: self.emulated, SystemClock(), lambda: self.waiting)

    async def read(self, _since: float) -> Sequence[TimedBuild]:
        if self.gone:
            raise TimingsError("the database is gone.")
        return self.builds

    async def post(self, events: Sequence[Event]) -> None:
        self.events += events

    @property
    def speeds(self) -> dict[tuple[str, str], float]:
        last = self.events[-1]
        assert isinstance(last, SpeedsMeasured)
        return {(worker, system): speed for worker, system, speed in last.speeds}


async def test_the_core_is_told_of_speeds_once_and_again_where_they_changed() -> None:
    told = Told()
    await told.learner.look()
    assert told.events == []
    told.builds = builds_on(SPEEDS, 200, seed=4)
    await told.learner.look()
    await told.learner.look()
    assert len(told.events) == 1
    assert told.speeds["fast", LINUX] == pytest.approx(2.0, rel=0.1)
    told.builds = builds_on(SPEEDS | {"fast": 4.0}, 200, seed=4)
    await told.learner.look()
    assert len(told.events) == 2
    assert told.speeds["fast", LINUX] == pytest.approx(4.0, rel=0.1)


async def test_a_system_that_a_worker_emulates_is_slow_until_it_is_measured() -> None:
    told = Told()
    told.emulated = [("fast", ARM)]
    await told.learner.look()
    assert told.speeds == {("fast", ARM): EMULATED_SPEED}
    told.builds = builds_on(SPEEDS, 200, seed=5, system=ARM)
    await told.learner.look()
    assert told.speeds["fast", ARM] == pytest.approx(2.0, rel=0.1)


async def test_what_was_learned_stays_while_the_store_of_timings_is_gone() -> None:
    told = Told()
    told.builds = [TimedBuild("hello", LINUX, "w", 7.0)]
    await told.learner.look()
    told.gone = True
    await told.learner.look()
    assert told.learner.expect("hello-2.12", LINUX) == (7000, 0, 0)


async def test_steps_that_wait_are_estimated_anew_once_their_package_was_built() -> None:
    told = Told()
    told.waiting = [
        OpenWork(StepKey("known"), "hello-2.12", LINUX, WorkKind.BUILD, 60_000),
        OpenWork(StepKey("right"), "hello-2.13", LINUX, WorkKind.BUILD, 7_500),
        OpenWork(StepKey("other"), "world-1", LINUX, WorkKind.BUILD, 60_000),
    ]
    told.builds = [TimedBuild("hello", LINUX, "w", 7.0)]
    await told.learner.look()
    await told.learner.look()
    assert told.events == [WorksEstimated(((StepKey("known"), 7000),))]


def test_memory_is_the_least_peak_of_a_package_because_pages_of_files_count_in_some() -> None:
    builds = [TimedBuild("p", LINUX, "w", 5.0, memory_bytes=peak) for peak in (0, 8 << 30, 3 << 30, 5 << 30)]
    learned = learn(builds)
    assert learned.memory_bytes("p", LINUX, WorkKind.BUILD) == 3 << 30
    assert learned.memory_bytes("p", ARM, WorkKind.BUILD) == 0


def test_what_was_never_built_is_guessed_by_its_features_too() -> None:
    learned = Learned()
    usual = learned.expected("new", LINUX, WorkKind.BUILD).work_ms
    assert learned.expected("new", LINUX, WorkKind.BUILD, ("big-parallel",)).work_ms == 10 * usual
    fetched = learned.expected("new", LINUX, WorkKind.FETCH).work_ms
    assert learned.expected("new", LINUX, WorkKind.BUILD, (NETWORK_FEATURE,)).work_ms == fetched < usual
    known = learn([TimedBuild("new", LINUX, "w", 3.0)])
    assert known.expected("new", LINUX, WorkKind.BUILD, ("big-parallel",)).work_ms == 3000


def test_a_guess_is_passed_on_only_where_it_is_far_off() -> None:
    learned = Learned(kinds={WorkKind.BUILD: 100.0})
    works = [OpenWork(StepKey(str(ms)), "p", LINUX, WorkKind.BUILD, ms) for ms in (20_000, 60_000, 290_000, 400_000)]
    assert whole(revised(learned, works)) == ((StepKey("20000"), 100_000), (StepKey("400000"), 100_000))


@pytest.mark.parametrize("at_once", [1, 1000])
async def test_builds_are_read_from_the_timings_the_oldest_first_and_only_what_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(learner, "BUILDS_AT_ONCE", at_once)
    store = TimingStore.open(f"sqlite+aiosqlite:///{tmp_path}/timings.sqlite3")
    await store.prepare()

    def attempt(name: str, ended_at: float, outcome: Outcome = "done", build_s: float | None = 3.0) -> AttemptTiming:
        timing = AttemptTiming(step=f"{name}-{ended_at}", attempt=1, name=name, package="x", system=LINUX, worker="w")
        timing.ended_at, timing.outcome, timing.build_s, timing.leased_at = ended_at, outcome, build_s, ended_at - 5
        return timing

    try:
        await store.save(
            [
                attempt("b-2.0", 20.0),
                attempt("a-1.0", 10.0, build_s=1.0),
                attempt("failed-1", 30.0, outcome="failed"),
                attempt("cached-1", 30.0, build_s=None),
                attempt("old-1", 1.0),
            ]
        )
        found = await timed_builds(store, since=5.0)
    finally:
        await store.close()
    assert [(each.package, each.seconds) for each in found] == [("a", 1.0), ("b", 3.0)]


def test_the_spread_of_a_package_is_that_of_its_own_builds_and_else_the_usual_one() -> None:
    steady = [TimedBuild("steady", LINUX, "w", seconds) for seconds in (99.0, 100.0, 100.0, 101.0, 900.0)]
    wild = [TimedBuild("wild", LINUX, "w", seconds) for seconds in (25.0, 50.0, 100.0, 200.0, 400.0)]
    learned = learn([*steady, *wild, TimedBuild("once", LINUX, "w", 10.0)])

    def width(package: str) -> float:
        between = learned.between(package, LINUX, WorkKind.BUILD)
        assert between is not None
        return between[1] / between[0]

    assert width("steady") < 1.1 < width("once") < 2 < width("wild")
    # Half of its builds are as long as that, and one that was never built has no such time.
    assert learned.between("wild", LINUX, WorkKind.BUILD) == pytest.approx((50.0, 200.0))
    assert learned.between("never", LINUX, WorkKind.BUILD) is None


def test_the_longest_of_many_unknown_packages_is_as_long_as_the_longest_of_as_many_known_ones() -> None:
    learned = learn([TimedBuild(f"p{number}", LINUX, "w", float(number)) for number in range(1, 101)])
    assert [round(learned.longest_of(count)) for count in (0, 1, 4, 10, 1000)] == [0, 76, 76, 91, 100]
    assert Learned().longest_of(5) == 0


async def test_times_are_known_anew_once_something_new_was_learned() -> None:
    told = Told()
    times = LearnedTimes(lambda: told.learner.learned)
    news: list[int] = []
    told.learner.on_learned = lambda: news.append(times.answers)
    before = times.answers
    assert times.expected("hello-2.12", LINUX) is None
    told.builds = [TimedBuild("hello", LINUX, "w", 7.0)]
    await told.learner.look()
    await told.learner.look()
    assert news == [times.answers]
    assert times.answers > before
    found = times.expected("hello-2.12", LINUX)
    assert found is not None
    assert found.least_s < 7 < found.most_s
