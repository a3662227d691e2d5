"""The transition matrix: a step in every state meets every event; tests/traces/matrix.txt says what follows.

Each line: state, event, the facts about the step that follow, the state after. `-` is nothing: the event was stale.
"""

from __future__ import annotations

from scheduler.events import Event, ResultsHeld, RetryAsked, TimePassed
from scheduler.model import FailureKind, StepKey, StepState
from scheduler.transitions import EDGES, LAPSED, SUBJECT, mermaid
from tests.scheduler.kit import (
    Scene,
    broke,
    builder,
    built,
    cancel,
    grow,
    join,
    lost,
    published,
    report,
    step,
    submit,
    unpublished,
)
from tests.scheduler.story import subjects
from tests.scheduler.test_traces import TRACES

P, R, C = FailureKind.PERMANENT, FailureKind.RETURNED, FailureKind.CANCELLED
INFRA = FailureKind.INFRASTRUCTURE
GRAPH = (step("x", "n"), step("n"))
LEASED_X: tuple[tuple[Event, ...], ...] = ((built("n", "b"),), (published("n"),))

#: How `x`, which needs `n`, comes into each state, on the one builder `b`.
WAYS: dict[StepState, tuple[tuple[Event, ...], ...]] = {
    StepState.WAITING: (),
    StepState.READY: ((report("b", 0),), *LEASED_X),
    StepState.LEASED: LEASED_X,
    StepState.PUBLISHING: (*LEASED_X, (built("x", "b"),)),
    StepState.DONE: (*LEASED_X, (built("x", "b"),), (published("x"),)),
    StepState.FAILED: (*LEASED_X, (broke("x", "b", P),)),
    StepState.DOOMED: ((broke("n", "b", P),),),
    StepState.ABANDONED: ((cancel("s1"),),),
}

EVENTS: dict[str, Event] = {
    "SubmissionReceived, nothing held": submit("s2", ["x"], *GRAPH),
    "SubmissionReceived, need held": submit("s2", ["x"], step("x", "n"), held=["n"]),
    "SubmissionReceived, step held": submit("s2", ["x"], held=["x"]),
    "SubmissionReceived, to retry": submit("s2", ["x"], *GRAPH, retry=True),
    "SubmissionReceived, again": submit("s1", ["x"], *GRAPH, retry=True, again=True),
    "SubmissionGrown, by the step": grow("open", ["x"], *GRAPH),
    "SubmissionGrown, by what it needs": grow("open", ["n"], *GRAPH),
    "RetryAsked": RetryAsked(StepKey("x")),
    "SubmissionCancelled": cancel("s1"),
    "BuilderJoined, the same": join("b"),
    "BuilderJoined, anew": join(builder("b", incarnation="2")),
    "BuilderReported, without the lease": report("b", 1),
    "BuilderLost": lost("b"),
    "BuilderLost, earlier incarnation": lost("b", "0"),
    "BuildSucceeded": built("x", "b"),
    "BuildSucceeded, wrong builder": built("x", "c"),
    "BuildSucceeded, wrong attempt": built("x", "b", 9),
    "BuildFailed, permanent": broke("x", "b", P),
    "BuildFailed, infrastructure": broke("x", "b", INFRA),
    "BuildFailed, returned": broke("x", "b", R),
    "BuildFailed, cancelled": broke("x", "b", C),
    "BuildFailed, hash mismatch": broke("x", "b", FailureKind.HASH_MISMATCH),
    "BuildFailed, killed": broke("x", "b", FailureKind.KILLED),
    "BuildFailed, connection lost": broke("x", "b", FailureKind.CONNECTION_LOST),
    "BuildFailed, wrong attempt": broke("x", "b", P, 9),
    "OutputsPublished": published("x"),
    "OutputsPublished, wrong attempt": published("x", 9),
    "PublishFailed, permanent": unpublished("x", P),
    "PublishFailed, infrastructure": unpublished("x", INFRA),
    "PublishFailed, returned": unpublished("x", R),
    "ResultsHeld": ResultsHeld((StepKey("x"), StepKey("unknown"))),
    "TimePassed, beyond silence": TimePassed(),
}


def in_state(state: StepState) -> Scene:
    scene = Scene()
    scene.play(join("b"))
    scene.play(submit("s1", ["x"], *GRAPH))
    scene.play(submit("open", [], opens=True))
    for events in WAYS[state]:
        scene.play(*events)
    assert scene.state("x") is state
    return scene


def meet(state: StepState, name: str) -> str:
    scene = in_state(state)
    scene.now = 1000.0 if name.startswith("TimePassed") else 20.0
    facts, _ = scene.play(EVENTS[name])
    said = [type(fact).__name__ for fact in facts if "x" in subjects(fact)]
    after = scene.state("x")
    if not said and after is state:
        return f"{state.value:10} {name:36} -"
    return f"{state.value:10} {name:36} {' '.join(said)} = {after.value}"


def test_every_state_meets_every_event_as_the_matrix_says(rewrite_traces: bool) -> None:
    told = "".join("\n".join(meet(state, name) for name in EVENTS) + "\n\n" for state in StepState)
    golden = TRACES / "matrix.txt"
    if rewrite_traces:
        golden.write_text(told)
    assert told == golden.read_text()


def test_events_of_another_attempt_builder_or_incarnation_change_nothing() -> None:
    for state in StepState:
        for name in EVENTS:
            if "wrong" in name or "earlier" in name:
                assert meet(state, name).endswith("-"), (state, name)


def test_every_fact_that_moves_a_step_has_an_edge_and_every_unfinished_state_a_way_out() -> None:
    causes = {cause.__name__ for facts in EDGES.values() for cause in facts}
    still = {"RecipeAdded", "BackOffEnded", "StepHeld"}
    assert {fact.__name__ for fact in SUBJECT} <= causes | still
    assert {source for source, _ in EDGES} == set(StepState)
    # What has lapsed comes back only by a new wish or by the cache.
    for (source, target), facts in EDGES.items():
        if source in LAPSED:
            assert {fact.__name__ for fact in facts} <= {"StepRevived", "StepCached"}, (source, target)


def test_the_diagram_shows_every_edge() -> None:
    lines = mermaid().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == 3 + len(EDGES)
    assert "    publishing --> done: StepDone" in lines
