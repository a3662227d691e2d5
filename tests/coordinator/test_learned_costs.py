"""Costs that earlier builds teach beside their time: what is measured of them, by which ladder it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.learning.costs import Cost
from coordinator.learning.learned import Learned, learn
from coordinator.learning.learner import Learner, timed_builds
from coordinator.learning.works import TimedBuild, WorkKind, WorkSource, class_of
from coordinator.stores.timings import AttemptTiming, TimingStore
from infra.clock import SystemClock
from scheduler.events import Event, SpeedsMeasured
from scheduler.model import BuilderId
from workers.wire.messages import NETWORK_FEATURE

LINUX, ARM = "x86_64-linux", "aarch64-linux"
MIB = 1 << 20


def measured(package: str = "p", system: str = LINUX, worker: str = "w", **known: float) -> TimedBuild:
    """A build of ten seconds that used two processors."""
    return replace(TimedBuild(package, system, worker, 10.0, cpu_s=20.0), **known)  # type: ignore[arg-type]


def costs(learned: Learned, package: str = "p", system: str = LINUX, *features: str) -> dict[Cost, float]:
    return {each.cost: each.value for each in learned.expected_costs(package, system, WorkKind.BUILD, features)}


def test_costs_are_the_medians_of_what_was_measured_and_outliers_move_neither_them_nor_their_spread() -> None:
    builds = [measured(fetch_s=fetch, output_bytes=size) for fetch, size in ((1.0, 5), (2.0, 5), (3.0, 5), (900.0, 5))]
    learned = learn([*builds, TimedBuild("p", LINUX, "w", 10.0)])
    assert costs(learned) == {Cost.FETCH_S: 2.5, Cost.CPU_S: 20.0, Cost.CORES: 2.0, Cost.OUTPUT_BYTES: 5}
    (fetch, *_) = learned.expected_costs("p", LINUX, WorkKind.BUILD)
    assert (fetch.source, fetch.builds) == (WorkSource.PACKAGE, 4)
    assert 0 < fetch.spread < 3
    # What took no time says nothing of how many processors it would use.
    assert Cost.CORES not in costs(learn([replace(measured(), seconds=0.5)]))


def test_a_cost_is_known_of_the_package_then_of_another_system_then_by_features_and_by_kind() -> None:
    shared = [measured(f"s{n}", system, upload_s=4.0) for n in range(5) for system in (LINUX, ARM)]
    large = [replace(measured(f"l{n}", upload_s=60.0), features=("big-parallel",)) for n in range(5)]
    fetched = [replace(measured(f"f{n}", upload_s=9.0), features=(NETWORK_FEATURE,)) for n in range(5)]
    learned = learn([*shared, *large, *fetched, measured("own", upload_s=1.0)])

    def upload(package: str, system: str, *features: str) -> tuple[float, WorkSource, int]:
        found = learned.expected_costs(package, system, WorkKind.BUILD, features)
        return next((each.value, each.source, each.builds) for each in found if each.cost is Cost.UPLOAD_S)

    assert upload("own", LINUX) == (1.0, WorkSource.PACKAGE, 1)
    assert upload("own", ARM) == (1.0, WorkSource.OTHER_SYSTEM, 1)
    assert upload("new", LINUX, "big-parallel") == (60.0, WorkSource.FEATURES, 0)
    assert upload("new", LINUX, "kvm") == (4.0, WorkSource.KIND, 0)
    assert upload("new", LINUX, NETWORK_FEATURE) == (9.0, WorkSource.KIND, 0)
    assert Learned().expected_costs("new", LINUX, WorkKind.BUILD) == ()
    assert Learned().cost(Cost.CORES, "new", LINUX, WorkKind.BUILD) == 0


def test_a_package_that_was_never_built_takes_as_long_as_others_that_ask_for_the_same_features() -> None:
    vms = [replace(measured(f"vm{n}"), seconds=500.0, features=("kvm",)) for n in range(5)]
    learned = learn([*vms, *(measured(f"p{n}") for n in range(9))])
    found = learned.expected("new", LINUX, WorkKind.BUILD, ("kvm",))
    assert (found.work_ms, found.source) == (500_000, WorkSource.FEATURES)
    assert learned.expected("new", LINUX, WorkKind.BUILD).source is WorkSource.KIND
    # Few say nothing.
    assert learn(vms[:4]).expected("new", LINUX, WorkKind.BUILD, ("kvm",)).source is WorkSource.NOTHING
    assert class_of(WorkKind.BUILD, ("kvm", NETWORK_FEATURE)) == (WorkKind.FETCH, ("kvm",))


def test_what_was_built_before_takes_as_long_again_where_that_is_not_what_its_package_takes() -> None:
    """Stages of one compiler have one name and system."""
    stages = [
        replace(measured("gcc"), seconds=seconds, step=step) for step, seconds in (("first", 100.0), ("last", 900.0))
    ]
    learned = learn([*stages * 4, replace(measured("gcc"), seconds=880.0, step="other")])

    def gcc(step: str) -> tuple[int, WorkSource, int]:
        found = learned.expected("gcc", LINUX, WorkKind.BUILD, (), step)
        return found.work_ms, found.source, found.builds

    assert gcc("first") == (100_000, WorkSource.DERIVATION, 4)
    assert gcc("new") == (880_000, WorkSource.PACKAGE, 9)
    # What its package takes is remembered once, for all of it.
    assert learned.exact.keys() == {"first"}


def test_a_worker_fetches_as_fast_as_its_usual_fetch_of_something_large() -> None:
    def fetch(worker: str, mib: int, seconds: float) -> TimedBuild:
        return measured(worker=worker, fetched_bytes=mib * MIB, fetch_s=seconds)

    builds = [fetch("fast", 100, 1.0)] * 3 + [fetch("slow", 100, 10.0)] * 2 + [fetch("slow", 100, 1e-3)]
    few = [fetch("few", 9, 1.0)] * 2 + [replace(fetch("few", 0, 1.0), fetched_bytes=9)] * 5
    spread = [replace(build, package=f"p{n}") for n, build in enumerate([*builds, *few])]
    assert learn(spread).fetch_rates == {"fast": 100 * MIB, "slow": 10 * MIB}


FIGURES = st.one_of(st.none(), st.just(0.0), st.floats(min_value=0, max_value=1e18))
BUILDS = st.builds(
    TimedBuild,
    st.sampled_from(["p", "q"]),
    st.sampled_from([LINUX, ARM]),
    st.sampled_from(["a", "b"]),
    st.floats(min_value=1e-9, max_value=1e9),
    fetch_s=FIGURES,
    fetched_bytes=st.one_of(st.none(), st.integers(min_value=0, max_value=1 << 60)),
    upload_s=FIGURES,
    cpu_s=FIGURES,
    output_bytes=st.one_of(st.none(), st.integers(min_value=0, max_value=1 << 60)),
    features=st.sampled_from([(), ("kvm",), (NETWORK_FEATURE,)]),
)


@given(st.lists(BUILDS, max_size=30))
def test_an_expected_cost_lies_between_those_that_were_measured_and_the_same_builds_teach_the_same(
    builds: list[TimedBuild],
) -> None:
    learned = learn(builds)
    assert learn(builds) == learned
    uploads = [each.upload_s for each in builds if each.upload_s is not None]
    for package in ("p", "q", "new"):
        for each in learned.expected_costs(package, LINUX, WorkKind.BUILD):
            assert each.spread >= 0
            if each.cost is Cost.UPLOAD_S:
                assert min(uploads) <= each.value <= max(uploads)
    assert all(rate >= 1 for rate in learned.fetch_rates.values())


async def test_what_attempts_cost_is_read_from_the_timings_and_the_core_is_told_of_rates(tmp_path: Path) -> None:
    store = TimingStore.open(f"sqlite+aiosqlite:///{tmp_path}/timings.sqlite3")
    posted: list[Event] = []

    async def read(since: float) -> Sequence[TimedBuild]:
        return await timed_builds(store, since)

    async def post(events: Sequence[Event]) -> None:
        posted.extend(events)

    attempts = [
        AttemptTiming(
            step=f"s{n}", attempt=1, name="p-1.0", package="p", system=LINUX, worker="w", ended_at=2e12, leased_at=1.0,
            outcome="done", build_s=10.0, cpu_s=35.0, inputs_s=2.0, fetched_bytes=8 * MIB, upload_s=1.5,
            output_bytes=3 * MIB, features="big-parallel,kvm",
        )
        for n in range(3)
    ]  # fmt: skip
    learner = Learner(read, post, list, SystemClock())
    try:
        await store.prepare()
        await store.save(attempts)
        await learner.look()
        await learner.look()
    finally:
        await store.close()
    assert posted == [SpeedsMeasured((), ((BuilderId("w"), 4 * MIB),))]
    assert {each.cost: (each.value, each.source, each.builds) for each in learner.costs("p-2.0", LINUX)} == {
        "fetch_s": (2.0, "package", 3),
        "upload_s": (1.5, "package", 3),
        "cpu_s": (35.0, "package", 3),
        "cores": (3.5, "package", 3),
        "output_bytes": (3 * MIB, "package", 3),
    }
    # Half as many more than 3.5, so that it shows whether it has use for them.
    assert (learner.cores("p-2.0", LINUX), learner.cores("new", LINUX)) == (6, 0)
    assert learner.expect("p-2.0", LINUX) == (10_000, 0, 3 * MIB)
    assert learner.learned.works[("p", LINUX, WorkKind.BUILD)] == pytest.approx((10.0, 3))
