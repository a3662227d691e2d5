"""The read model says of every submission exactly what a recount from scratch says, live and after a replay."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from coordinator.api.models import (
    Counts,
    CountsChanged,
    Ended,
    Snapshot,
    StepChanged,
    StepStatus,
    SubmissionState,
    TransfersChanged,
    TransferView,
    WaitingView,
    WatchEvent,
)
from coordinator.journal.codec import (
    Evidence,
    SubmissionNote,
    decode_facts,
    decode_records,
    encode_evidence,
    encode_facts,
    encode_records,
)
from coordinator.readmodel.forest import ForestDiff
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.readmodel.watcher import TRANSFERS_SHOWN, WATCH_PENDING
from coordinator.stores.derivations import StepInfo
from scheduler.events import (
    BuilderJoined,
    BuilderLost,
    BuilderReported,
    BuildFailed,
    BuildSucceeded,
    Event,
    OutputsPublished,
    PublishFailed,
    SealAsked,
    SubmissionCancelled,
    SubmissionExpired,
    SubmissionGrown,
    SubmissionReceived,
    TimePassed,
)
from scheduler.facts import Fact, StepAdded
from scheduler.farm import Farm
from scheduler.model import (
    BuilderId,
    BuilderSpec,
    Failure,
    FailureKind,
    Instant,
    Recipe,
    Requirements,
    StepKey,
    StepSpec,
    SubmissionId,
)
from scheduler.pauses import whole
from scheduler.policy import Limits
from workers.wire.messages import Output, Stage, StageChange, Transfer

_CORE_STATE = {"leased": "running"}


class Silent:
    """An explainer with nothing to say."""

    def waiting(self, step: StepKey, name_of: Callable[[StepKey], str]) -> tuple[str, WaitingView | None]:
        return f"waits: {step} {name_of(step)}", None

    def unschedulable(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:
        return tuple(sorted(f"{count} {requirements.system}" for requirements, count in ready.items()))

    def log_tail(self, step: StepKey, attempt: int) -> str:
        return f"last words of {step} {attempt}"

    def __init__(self, farm: Farm | None = None) -> None:
        self._farm = farm or Farm()

    def queued(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:
        return tuple(f"queued {count}" for count in ready.values())

    def unmet(self, step: StepKey) -> int:
        return self._farm.unmet(step)

    def above(self, step: StepKey) -> list[StepKey]:
        return self._farm.above(step, 64)


class DrivenViews:
    """A real core whose facts go to views and, as bytes, to a journal."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.farm = Farm(limits)
        self.views = Views(Silent(self.farm), usual=lambda name, system: float(len(name + system)))
        self.now = 1000.0
        self.frames: list[bytes] = []
        self.effects: list[object] = []

    def tell(self, *events: Event) -> list[Fact]:
        self.now += 1.0
        facts, effects = self.farm.handle_many(events, Instant(self.now))
        self.frames.append(encode_facts([fact for fact in facts if fact.durable]))
        self.views.fold(facts)
        self.effects.extend(effects)
        return facts

    def join(self, name: str = "b", slots: int = 2, *, takes_successors: bool = False) -> None:
        builder = BuilderSpec(BuilderId(name), "1", frozenset({"sys"}), takes_successors=takes_successors)
        self.tell(BuilderJoined(builder, slots))

    def publish(self, key: str) -> None:
        """Build and publish one step that is leased."""
        step = self.farm.state.steps[StepKey(key)]
        self.tell(BuildSucceeded(step.lease, step.builder, evidence(key)))
        self.tell(OutputsPublished(step.lease))

    def finish(self, ok: Callable[[StepKey], bool] = lambda _: True) -> None:
        """Build and publish whatever is leased until nothing is."""
        while running := [s for s in self.farm.state.steps.values() if s.state.value == "leased"]:
            for step in running:
                if ok(step.key):
                    self.tell(BuildSucceeded(step.lease, step.builder, evidence(step.key)))
                    self.tell(OutputsPublished(step.lease))
                else:
                    self.tell(BuildFailed(step.lease, step.builder, Failure(FailureKind.PERMANENT, "exit status 1")))


def evidence(key: str, size: int = 10) -> bytes:
    output = Output(
        name="out", path=f"/nix/store/{key}", nar_hash="", nar_size=1, references=(), url="", compression="zstd",
        file_hash="", file_size=size,
    )  # fmt: skip
    return encode_evidence(Evidence((output,)))


def spec(key: str, *needs: str, system: str = "sys") -> StepSpec:
    return StepSpec(StepKey(key), (Recipe(Requirements(system), tuple(StepKey(need) for need in needs)),))


def submission(name: str, roots: str, *steps: StepSpec, held: str = "") -> SubmissionReceived:
    return SubmissionReceived(
        SubmissionId(name), tuple(map(StepKey, roots.split())), steps, tuple(map(StepKey, held.split()))
    )


def counts(driven: DrivenViews, name: str) -> Counts:
    return driven.views.submission_view(driven.views.submission(name)).counts


def test_a_submission_counts_its_steps_from_arrival_to_success() -> None:
    driven = DrivenViews()
    driven.tell(submission("s", "c", spec("a"), spec("b"), spec("c", "a", "b", "h"), held="h"))
    assert counts(driven, "s") == Counts(total=4, held=1, ready=2, waiting=1)
    driven.join(slots=1)
    assert counts(driven, "s") == Counts(total=4, held=1, ready=1, running=1, waiting=1)
    driven.finish()
    view = driven.views.submission_view(driven.views.submission("s"))
    assert (view.state, view.counts) == (SubmissionState.SUCCEEDED, Counts(total=4, held=1, done=3))
    assert view.uploaded_bytes == 30
    assert view.ended_at == driven.now


def test_a_submission_that_meets_a_known_failure_ends_at_once_and_runs_again_on_demand() -> None:
    driven = DrivenViews()
    driven.join()
    steps = (spec("a"), spec("b", "a"))
    driven.tell(submission("s", "b", *steps))
    driven.finish(lambda key: key != "a")
    driven.tell(submission("t", "b", *steps))
    view = driven.views.submission_view(driven.views.submission("t"))
    assert (view.state, view.counts) == (SubmissionState.FAILED, Counts(total=2, failed=1, doomed=1))
    step = driven.views.step("a")
    assert [row.id for row in driven.views.failed_through(step)] == ["t", "s"]
    driven.tell(replace(submission("t", "b", *steps), again=True, retry=(step.key,)))
    view = driven.views.submission_view(driven.views.submission("t"))
    assert (view.state, view.counts) == (SubmissionState.RUNNING, Counts(total=2, running=1, waiting=1))
    driven.finish()
    assert driven.views.submission_view(driven.views.submission("t")).state is SubmissionState.SUCCEEDED
    # The first one has ended, and what happens later is none of its business.
    assert driven.views.submission_view(driven.views.submission("s")).state is SubmissionState.FAILED


def test_a_second_submission_sees_what_it_joined_and_what_was_held() -> None:
    driven = DrivenViews()
    driven.join(slots=1)
    steps = (spec("a"), spec("b", "a"))
    driven.tell(submission("one", "b", *steps))
    driven.tell(submission("two", "b", *steps))
    assert counts(driven, "two") == Counts(total=2, joined=2, running=1, waiting=1)
    driven.finish()
    driven.tell(submission("three", "b", *steps, held="a b"))
    view = driven.views.submission_view(driven.views.submission("three"))
    assert (view.state, view.counts.done, view.counts.joined) == (SubmissionState.SUCCEEDED, 0, 0)
    assert view.uploaded_bytes == 0


def test_a_failure_dooms_what_stands_on_it_and_every_step_names_the_root_cause() -> None:
    driven = DrivenViews()
    driven.join()
    driven.tell(submission("s", "c d", spec("a"), spec("b", "a"), spec("c", "b"), spec("d")))
    driven.finish(lambda key: key != "a")
    view = driven.views.submission_view(driven.views.submission("s"))
    assert (view.state, view.counts) == (SubmissionState.FAILED, Counts(total=4, done=1, failed=1, doomed=2))
    assert driven.views.step_view(driven.views.step("c")).cause == "a"
    failed = driven.views.step_view(driven.views.step("a"))
    assert failed.failure is not None
    assert (failed.failure.message, failed.log_tail) == ("exit status 1", "last words of a 1")


def test_an_ended_submission_is_history_also_when_its_failed_step_is_tried_again() -> None:
    driven = DrivenViews()
    driven.join()
    driven.tell(submission("old", "a", spec("a")))
    driven.finish(lambda _: False)
    before = driven.views.submission_view(driven.views.submission("old"))
    driven.tell(replace(submission("new", "a", spec("a")), retry_failed=True))
    driven.finish()
    after = driven.views.submission_view(driven.views.submission("old"))
    assert (after.state, after.counts, after.ended_at) == (before.state, before.counts, before.ended_at)
    assert driven.views.submission_view(driven.views.submission("new")).state is SubmissionState.SUCCEEDED


def test_a_build_that_was_given_up_ends_its_submission_with_the_sentence_that_says_why() -> None:
    driven = DrivenViews(Limits(give_up_s=60.0))
    driven.tell(submission("s", "a", spec("a", system="mac")))
    driven.now += 60.0
    driven.tell(TimePassed())
    view = driven.views.submission_view(driven.views.submission("s"))
    assert view.state is SubmissionState.FAILED
    failure = driven.views.step("a").life.failure
    assert failure is not None
    assert "start a worker for mac" in failure.message


def test_a_step_that_no_submission_stands_on_waits_until_one_falls_back_on_it() -> None:
    driven = DrivenViews()
    either = StepSpec(StepKey("either"), tuple(Recipe(Requirements("sys"), (StepKey(way),)) for way in ("one", "two")))
    driven.tell(submission("s", "either", either, spec("one"), spec("two", "deep"), spec("deep")))
    assert driven.views.step_counts() == {"ready": 1, "waiting": 3}
    assert counts(driven, "s") == Counts(total=2, ready=1, waiting=1)
    driven.join(slots=1)
    driven.finish(lambda key: key == "deep")
    assert counts(driven, "s") == Counts(total=4, done=1, failed=2, doomed=1)


def test_ready_steps_that_no_builder_can_take_are_grouped_by_their_requirements() -> None:
    driven = DrivenViews()
    driven.tell(submission("s", "a b c", spec("a", system="mac"), spec("b", system="mac"), spec("c")))
    assert driven.views.submission_view(driven.views.submission("s")).stuck == ("1 sys", "2 mac")


def test_a_watcher_sees_a_snapshot_then_each_changed_step_then_the_end() -> None:
    driven = DrivenViews()
    driven.tell(submission("s", "b", spec("a"), spec("b", "a")))
    woken: list[int] = []
    with driven.views.watch(driven.views.submission("s"), lambda: woken.append(1)) as watcher:
        assert [type(event) for event in watcher.take()] == [Snapshot]
        driven.join()
        assert woken
        changed = [event.step.key for event in watcher.take() if isinstance(event, StepChanged)]
        assert changed == ["a"]
        driven.finish()
        events = watcher.take()
        seen = {event.step.key: event.step.state for event in events if isinstance(event, StepChanged)}
        assert seen == {"a": StepStatus.DONE, "b": StepStatus.DONE}
        assert isinstance(events[-1], Ended)
        assert watcher.over
        assert watcher.take() == []


def test_bytes_that_move_wake_a_watcher_once_a_second_and_are_one_event_however_many_steps_move() -> None:
    driven = DrivenViews()
    names = [f"k{number}" for number in range(TRANSFERS_SHOWN + 10)]
    driven.tell(submission("s", " ".join(names), *map(spec, names)))
    driven.join("one", slots=len(names))
    for name in names:
        driven.views.stage(StageChange(step=name, attempt=1, stage=Stage.FETCHING, at=0.0))
    woken: list[int] = []
    with driven.views.watch(driven.views.submission("s"), lambda: woken.append(1)) as watcher:
        watcher.take()
        woken.clear()
        for tenth in range(25):
            moving = [transfer(name, done_bytes=tenth + 1) for name in names]
            driven.views.transfers("one", moving, 5000.0 + tenth / 10)
        assert len(woken) == 3
        [event] = watcher.take()
        assert isinstance(event, TransfersChanged)
        assert [each.key for each in event.transfers] == names[10:], "the last that moved"
        assert {each.transfer.done_bytes for each in event.transfers} == {25}
        journaled = len(driven.frames)
        # Of another attempt, another worker, another stage, or a step that is not known: nothing.
        strange = (
            ("one", transfer("k0", attempt=2)),
            ("two", transfer("k0")),
            ("one", transfer("k0", direction="upload")),
            ("one", transfer("nowhere")),
        )
        for worker, each in strange:
            driven.views.transfers(worker, [each], 6000.0)
        assert driven.views.step_view(driven.views.step("k0")).transfer == transfer_view(done_bytes=25)
        driven.views.stage(StageChange(step="k0", attempt=1, stage=Stage.BUILDING, at=0.0))
        assert driven.views.step_view(driven.views.step("k0")).transfer is None
        assert len(driven.frames) == journaled, "nothing of it is a fact"


def transfer(step: str, **more: Any) -> Transfer:
    given = {"attempt": 1, "direction": "fetch", "path": "/nix/store/x", "source": "cache", "done_bytes": 7}
    return Transfer.model_validate({"step": step, "size_bytes": 100} | given | more)


def transfer_view(done_bytes: int) -> TransferView:
    return TransferView(direction="fetch", path="/nix/store/x", source="cache", done_bytes=done_bytes, size_bytes=100)


def test_a_watcher_hears_one_way_up_from_each_step_that_runs_and_only_what_is_new() -> None:
    driven = DrivenViews()
    graph = (spec("low"), spec("left", "low"), spec("right", "low"), spec("top", "left", "right"), spec("aside"))
    driven.tell(submission("s", "top aside", *graph))
    with driven.views.watch(driven.views.submission("s"), lambda: None) as watcher:
        assert isinstance(snapshot := watcher.take()[0], Snapshot)
        assert snapshot.tree == ()
        driven.join(slots=4)
        places = _places(watcher.take())
        assert places == {"low": ("left", 0), "left": ("top", 1), "top": ("", 2), "aside": ("", 0)}
        driven.publish("low")
        assert _places(watcher.take()) == {"left": ("top", 0), "right": ("top", 0)}
        driven.views.workforce._changed()  # noqa: SLF001 - what any news of a worker calls
        assert _places(watcher.take()) == {}


def test_a_forest_holds_no_more_places_than_its_bound_and_forgets_those_below_which_nothing_runs() -> None:
    driven = DrivenViews()
    pairs = [(f"low{n}", f"top{n}") for n in range(10)]
    steps = [each for low, top in pairs for each in (spec(low), spec(top, low), spec(f"last{top}", top))]
    driven.tell(submission("s", " ".join(f"last{top}" for _, top in pairs), *steps))
    forest = ForestDiff(driven.views.submission("s"), driven.views, most=7)
    driven.join(slots=2)
    told = {node.key for node in forest.changes()}
    assert told == {"low0", "top0", "lasttop0", "low1", "top1", "lasttop1"}
    for number in (0, 1):
        driven.publish(f"low{number}")
    told = {node.key for node in forest.changes()}
    running = {str(key) for key in driven.views.submission("s").active}
    assert told >= running
    assert forest.held <= 7
    driven.publish(min(running))
    forest.changes()
    assert forest.held <= 7


def _places(events: list[WatchEvent]) -> dict[str, tuple[str, int]]:
    [tree] = [event.tree for event in events if isinstance(event, CountsChanged)]
    return {node.key: (node.above, node.pending) for node in tree}


def test_a_watcher_that_falls_behind_gets_a_snapshot_and_holds_no_more_than_its_bound() -> None:
    driven = DrivenViews()
    steps = [spec(f"k{n}") for n in range(WATCH_PENDING + 50)]
    driven.tell(submission("s", " ".join(step.key for step in steps), *steps))
    with driven.views.watch(driven.views.submission("s"), lambda: None) as watcher:
        watcher.take()
        driven.join(slots=len(steps) - 1)
        assert watcher.pending == 0
        assert isinstance(watcher.take()[0], Snapshot)


_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *(
                    "submit",
                    "submit",
                    "open",
                    "grow",
                    "grow",
                    "seal",
                    "cancel",
                    "build",
                    "build",
                    "fail",
                    "lose",
                    "return",
                    "unpublish",
                    "join",
                    "again",
                ),
                "expire",
            ]
        ),
        st.integers(0, 10_000),
    ),
    max_size=60,
)


def _graph(seed: int) -> SubmissionReceived:
    """A slice of one fixed graph, so that submissions overlap; every third step has two recipes."""
    size = 12
    specs = []
    for n in range(size):
        needs = tuple(StepKey(f"k{m}") for m in {n // 2, n // 3} if m < n)
        recipes = [Recipe(Requirements("sys" if n % 5 else "other"), needs)]
        if n % 3 == 0:
            # What only this one needs is known, and nobody wants it before the first has failed.
            recipes.append(Recipe(Requirements("sys"), tuple(StepKey(f"k{m}") for m in {n - 1, n - 2} if m >= 0)))
        specs.append(StepSpec(StepKey(f"k{n}"), tuple(recipes)))
    roots = {StepKey(f"k{seed % size}"), StepKey(f"k{seed // size % size}")}
    by_key = {step.key: step for step in specs}
    closure: dict[StepKey, StepSpec] = {}
    stack = list(roots)
    while stack:
        key = stack.pop()
        if key not in closure:
            closure[key] = by_key[key]
            stack.extend(need for recipe in by_key[key].recipes for need in recipe.needs)
    return SubmissionReceived(SubmissionId(f"s{seed}"), tuple(sorted(roots)), tuple(closure.values()))


def _one(driven: DrivenViews, what: str, number: int) -> None:  # noqa: C901  one arm per kind of event
    state = driven.farm.state
    leased = [step for step in state.steps.values() if step.state.value == "leased"]
    publishing = [step for step in state.steps.values() if step.state.value == "publishing"]
    if what == "submit" and f"s{number}" not in {row.id for row in driven.views.submission_rows()}:
        driven.tell(_graph(number))
    elif what == "open" and f"s{number}" not in {row.id for row in driven.views.submission_rows()}:
        driven.tell(replace(_graph(number), roots=(), steps=(), held=(), open=True))
    elif what == "grow" and state.open:
        name = list(state.open)[number % len(state.open)]
        graph = _graph(number)
        driven.tell(SubmissionGrown(name, graph.roots, graph.steps, graph.held))
    elif what == "seal" and state.open:
        driven.tell(SealAsked(list(state.open)[number % len(state.open)]))
    elif what == "cancel" and state.submissions:
        driven.tell(SubmissionCancelled(list(state.submissions)[number % len(state.submissions)]))
    elif what == "again" and state.submissions:
        name = list(state.submissions)[number % len(state.submissions)]
        driven.tell(replace(_graph(int(name[1:])), again=True, retry_failed=number % 2 == 0))
    elif what == "join":
        driven.join(f"b{number % 3}", 1 + number % 3)
    elif what == "lose":
        driven.tell(BuilderLost(BuilderId(f"b{number % 3}"), "1", "gone"))
    elif what in ("fail", "return") and leased:
        step = leased[number % len(leased)]
        kind = FailureKind.PERMANENT if what == "fail" else FailureKind.RETURNED
        driven.tell(BuildFailed(step.lease, step.builder, Failure(kind, "no")))
    elif what == "unpublish" and publishing:
        step = publishing[number % len(publishing)]
        driven.tell(PublishFailed(step.lease, Failure(FailureKind.INFRASTRUCTURE, "gone")))
    elif what == "build" and publishing:
        driven.tell(OutputsPublished(publishing[number % len(publishing)].lease))
    elif what == "build" and leased:
        step = leased[number % len(leased)]
        driven.tell(BuildSucceeded(step.lease, step.builder, evidence(step.key)))
        driven.tell(BuilderReported(step.builder, "1", 2, tuple(s.lease for s in leased if s is not step)))


def _recounted(driven: DrivenViews, name: SubmissionId) -> Counter[str]:
    """Count a live submission's members from the core's own states."""
    row = driven.views.submission(name)
    states = [driven.farm.state.steps[key].state.value for key in row.members]
    return Counter(_CORE_STATE.get(state, state) for state in states)


def _check_growth(driven: DrivenViews, row: SubmissionRow) -> None:
    """Hold what a submission that may grow counts against what the core counts."""
    opened = driven.farm.state.open.get(row.id)
    assert row.is_open == (opened is not None)
    if opened is not None:
        assert sorted(row.members) == sorted(opened.members)
        assert row.roots == opened.roots


# Withdrawn after it had ended by itself: found in one run of many.
@example([("open", 0), ("seal", 0), ("cancel", 0)], 0)
@settings(max_examples=150, deadline=None)
@given(_EVENTS, st.integers(0, 59))
def test_incremental_counts_equal_a_naive_recount_and_a_replay_or_a_snapshot_gives_the_same_views(
    script: list[tuple[str, int]], cut: int
) -> None:
    driven = DrivenViews()
    driven.join("b0")
    snapshot, beyond = (encode_facts(driven.farm.snapshot()), encode_records(driven.views.records())), 0
    for at, (what, number) in enumerate(script):
        if at == cut:
            snapshot = encode_facts(driven.farm.snapshot()), encode_records(driven.views.records())
            beyond = len(driven.frames)
        if what == "expire":
            driven.tell(*[SubmissionExpired(row.id) for row in driven.views.submission_rows()[number % 3 :: 3]])
        _one(driven, what, number)
        for row in driven.views.submission_rows():
            name = row.id
            view = driven.views.submission_view(row)
            by_state = Counter({state.value: count for state, count in row.counts.items() if count})
            assert sum(by_state.values()) + row.held == view.counts.total
            assert row.open == sum(by_state[state] for state in ("waiting", "ready", "running", "publishing"))
            assert sum(row.ready.values()) == by_state["ready"]
            _check_growth(driven, row)
            if view.state is SubmissionState.RUNNING:
                by_state["done"] += row.held
                assert +by_state == _recounted(driven, name)
                assert not driven.farm.ended(name)
        assert {key: driven.views.step(key).state.value for key in driven.views.nameless()} == {
            key: _CORE_STATE.get(step.state.value, step.state.value) for key, step in driven.farm.state.steps.items()
        }

    replayed, restored = Views(Silent()), Views(Silent())
    whole_farm, resumed_farm = Farm(), Farm()
    restored.fold(resumed_farm.replaying(decode_facts(snapshot[0])), settle=False)
    restored.restore(decode_records(snapshot[1]))
    for views, farm, frames in (
        (replayed, whole_farm, driven.frames),
        (restored, resumed_farm, driven.frames[beyond:]),
    ):
        for frame in frames:
            for fact in decode_facts(frame):
                # One fact at a time: frames may split a batch anywhere.
                views.fold(farm.replaying([fact]), settle=False)
        views.settle()
        assert [asdict(views.submission_view(row)) for row in views.submission_rows()] == [
            asdict(driven.views.submission_view(row)) for row in driven.views.submission_rows()
        ]
        assert set(views.nameless()) == set(driven.views.nameless()) == driven.farm.state.steps.keys()
        states = Counter(views.step(key).state.value for key in views.nameless())
        assert views.step_counts() == driven.views.step_counts() == states
        for key in driven.views.nameless():
            live, again = driven.views.step_view(driven.views.step(key)), views.step_view(views.step(key))
            assert replace(live, stage="", phase="") == replace(again, stage="", phase="")


def test_a_large_submission_costs_a_bounded_number_of_operations_for_each_finished_step() -> None:
    """Counted, not timed: folding the end of a step touches only its edges, whatever the submission's size."""
    driven = DrivenViews()
    size = 3000
    driven.tell(submission("s", " ".join(f"k{n}" for n in range(size)), *(spec(f"k{n}") for n in range(size))))
    driven.join(slots=size)
    row = driven.views.submission("s")
    members, row.members = row.members, _Untouchable()
    started = time.perf_counter()
    for step in list(driven.farm.state.steps.values())[:-1]:
        facts, _ = driven.farm.handle(BuildSucceeded(step.lease, step.builder, b"{}"), Instant(driven.now))
        driven.views.fold(facts)
        facts, _ = driven.farm.handle(OutputsPublished(step.lease), Instant(driven.now))
        driven.views.fold(facts)
    print(f"{(time.perf_counter() - started) / size * 1e6:.1f} us per finished step, core included")
    row.members = members
    assert counts(driven, "s") == Counts(total=size, done=size - 1, running=1)


class _Untouchable(list[StepKey]):
    def __iter__(self) -> object:  # type: ignore[override]
        raise AssertionError("a fact about one step must not walk the submission")


def test_what_the_core_refused_leaves_no_names_and_takes_none_from_steps_that_are_known() -> None:
    views, name = Views(Silent()), SubmissionId("refused")
    known, new = StepKey("known"), StepKey("new")
    infos = [StepInfo(key, f"the {key}", "sys", (), f"/nix/store/{key}.drv", ()) for key in (known, new)]
    views.fold([StepAdded(StepSpec(known, (Recipe(Requirements("sys")),)))])
    whole(views.adding_details(infos, {name: SubmissionNote("label", (), 2)}))
    whole(views.unknowing(infos, name))
    assert views.note(name).label == ""
    views.fold([StepAdded(StepSpec(new, (Recipe(Requirements("sys")),)))])
    assert [views.step_view(views.step(key)).name for key in (known, new)] == ["the known", ""]
    # Names of steps that no fact has named are not kept where only known ones are asked for.
    whole(views.adding_details([StepInfo(StepKey("odd"), "odd", "sys", (), "/odd.drv", ())], only_known=True))
    assert views.nameless() == [new]


def test_only_a_step_that_runs_and_has_a_name_says_how_long_builds_of_its_package_usually_take() -> None:
    driven = DrivenViews()
    driven.tell(submission("s", "b c", spec("a"), spec("b", "a"), spec("c")))
    key = StepKey("a")
    driven.views.add_details({key: StepInfo(key, "tool-1.1", "sys", (), "/nix/store/a.drv", ())})
    driven.join()
    usual = {name: driven.views.step_view(driven.views.step(name)).usual_s for name in "abc"}
    assert usual == {"a": 11.0, "b": None, "c": None}
    driven.finish()
    assert driven.views.step_view(driven.views.step("a")).usual_s is None
