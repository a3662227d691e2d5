"""Spans are made of timings alone: whole trees, in which nothing is invented and nothing depends on memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.models import SubmissionState
from coordinator.api.requests import ClientStage
from coordinator.api.trace_context import TraceContext, parse_traceparent
from coordinator.intake.client_meter import LONGEST_S, placed
from coordinator.observability import trace_names as names
from coordinator.observability.spans import Trace, attempt_spans, submission_spans, unended_step_spans
from coordinator.stores.timings import AttemptTiming, Measured, Outcome
from infra.ended_span import EndedSpan

ONE, TWO = Trace("one"), Trace("two")
JOB = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def timing(**changes: object) -> AttemptTiming:
    whole = AttemptTiming(
        "key",
        1,
        name="hello-1",
        system="x86_64-linux",
        worker="w",
        ready_at=10.0,
        leased_at=12.0,
        ended_at=30.0,
        outcome="done",
        verify_at=27.0,
        verify_s=1.0,
        publish_s=0.5,
        cpu_s=3.0,
        measured=Measured(
            spans=[("inputs", 12.5, 2.0), ("build", 15.0, 10.0), ("pack", 25.0, 1.0)],
            phases=[("buildPhase", 15.0, 9.0)],
            fetches=[("/nix/store/x-lib", "objects", 9, 12.5, 1.0, False)],
        ),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def tree(spans: list[EndedSpan]) -> dict[str, str]:
    """Name of each span to that of its parent."""
    by_id = {span.span_id: span.name for span in spans}
    return {span.name: by_id.get(span.parent_id or 0, "") for span in spans}


def test_an_attempt_and_its_step_are_a_tree_below_the_submission() -> None:
    root = submission_spans(ONE, "x", SubmissionState.SUCCEEDED, 9.0, 31.0, {}, [("evaluate", 1.0, 8.0)])
    spans = [*root, *attempt_spans(timing(), [ONE])]
    assert tree(spans) == {
        "submission": "",
        "client evaluate": "submission",
        "step hello-1": "submission",
        "wait": "step hello-1",
        "attempt": "step hello-1",
        "inputs": "attempt",
        "fetch": "inputs",
        "build": "attempt",
        "phase buildPhase": "build",
        "pack": "attempt",
        "verify": "attempt",
        "publish": "attempt",
    }
    assert spans[0].begin == 1.0, "the submission begins with what its client did"


@given(st.sampled_from(["done", "failed", "retried", "lost", "returned", "moved", "cancelled"]), st.booleans())
def test_spans_have_ids_of_their_own_and_lie_within_their_trace(outcome: Outcome, measured: bool) -> None:
    spans = list(attempt_spans(timing(outcome=outcome, **({} if measured else {"measured": None})), [ONE, TWO]))
    contexts = [(span.trace_id, span.span_id) for span in spans]
    assert len(set(contexts)) == len(contexts)
    assert {span.trace_id for span in spans} <= {ONE.root.trace_id, TWO.root.trace_id}
    assert all(span.begin <= span.end for span in spans)
    again = list(attempt_spans(timing(outcome=outcome, **({} if measured else {"measured": None})), [ONE, TWO]))
    assert again == spans, "a restart makes the same spans"


def test_an_attempt_that_ends_in_another_trace_than_its_worker_knew_is_linked_to_that() -> None:
    ordered, own = TWO.attempt("key", 1), ONE.attempt("key", 1)
    for named, links in ((ordered, [(ordered.trace_id, ordered.span_id)]), (own, []), ("no context", [])):
        kept = timing(measured=Measured(traceparent=str(named)))
        [attempt] = [span for span in attempt_spans(kept, [ONE]) if span.name == "attempt"]
        assert (attempt.span_id, attempt.links) == (own.span_id, links)


@given(off=st.floats(-1e9, 1e9), took_s=st.floats(0.0, 3600.0))
def test_a_clients_clock_that_is_off_bends_no_trace(off: float, took_s: float) -> None:
    begin = 2e9 + off
    stages = [
        ClientStage(name="evaluate", begin=begin, end=begin + took_s),
        ClientStage(name="upload", begin=begin + took_s, end=begin + took_s + 1.0),
    ]
    [evaluated, uploaded] = placed(stages, 5000.0)
    assert uploaded[2] == pytest.approx(5000.0, abs=1e-5)
    assert evaluated[2] - evaluated[1] == pytest.approx(took_s, abs=1e-5)
    assert evaluated[2] == pytest.approx(uploaded[1], abs=1e-5)
    [one, other] = placed([ClientStage(name="evaluate", begin=0, end=1), stages[1]], 1e6)
    assert 1e6 - LONGEST_S == one[1] == one[2] < other[1], "a stage that began with the epoch is cut"


def test_a_step_that_two_submissions_want_is_in_the_first_trace_and_linked_from_the_other() -> None:
    spans = list(attempt_spans(timing(), [ONE, TWO]))
    [linked] = [span for span in spans if span.trace_id == TWO.root.trace_id]
    assert (linked.name, linked.parent_id) == ("step hello-1", TWO.root.span_id)
    step = ONE.step("key")
    assert linked.links == [(step.trace_id, step.span_id)]


def test_an_attempt_that_is_followed_by_another_ends_no_step() -> None:
    lost = timing(outcome="lost", reason="worker_lost", measured=Measured(spans=[("build", 15.0, 15.0)], cut=True))
    spans = list(attempt_spans(lost, [ONE]))
    assert tree(spans) == {"attempt": "", "build": "attempt", "verify": "attempt", "publish": "attempt", "wait": ""}
    attempt = spans[0]
    assert (attempt.parent_id, attempt.error) == (ONE.step("key").span_id, "worker_lost")
    assert attempt.attributes[names.CUT.name] is True
    assert attempt.attributes[names.TASK_RESULT.name] == "error"


def test_an_attempt_that_moves_to_a_faster_worker_ends_no_step() -> None:
    [attempt, *rest] = attempt_spans(timing(outcome="moved", reason="cancelled", message="two is faster"), [ONE])
    assert attempt.attributes[names.TASK_RESULT.name] == "cancellation"
    assert attempt.error == "two is faster"
    assert not [span for span in rest if span.name.startswith("step ")]


def test_a_step_that_is_cancelled_while_it_runs_ends_in_every_trace_that_wants_it() -> None:
    spans = list(attempt_spans(timing(outcome="cancelled", reason="cancelled"), [ONE, TWO]))
    [own, linked] = [span for span in spans if span.name == "step hello-1"]
    assert own.attributes[names.TASK_RESULT.name] == "cancellation"
    assert linked.links == [(own.trace_id, own.span_id)]
    assert tree([own, *spans])["attempt"] == "step hello-1"


def test_a_step_whose_last_attempt_gave_no_verdict_ends_with_its_submission() -> None:
    lost = timing(outcome="lost", reason="worker_lost")
    [attempt, *_] = attempt_spans(lost, [ONE])
    [step] = unended_step_spans(lost, ONE, 5.0, 40.0)
    assert (step.span_id, step.begin, step.end) == (attempt.parent_id, 5.0, 40.0)
    assert step.attributes[names.TASK_RESULT.name] == "cancellation"


def test_a_failure_has_its_kind_and_the_exit_code_of_the_builder_where_nix_says_one() -> None:
    said = "the builder failed: builder for '/nix/store/x-y.drv' failed with exit code 3;\nlast 1 log lines:\n> code 4"
    for outcome, reason, message, result, code in (
        ("failed", "permanent", said, "failure", 3),
        ("failed", "timeout", "it ran longer than 10 s", "timeout", None),
        ("failed", "silence", "it was silent for 10 s; > failed with exit code 7", "timeout", None),
        ("done", None, None, "success", None),
    ):
        [attempt, *_] = attempt_spans(timing(outcome=outcome, reason=reason, message=message), [ONE])
        found = attempt.attributes.get(names.TASK_RESULT.name), attempt.attributes.get(names.EXIT_CODE.name)
        assert found == (result, code)


def test_what_is_not_known_is_absent() -> None:
    [attempt, *_] = attempt_spans(timing(cpu_s=None), [ONE])
    assert names.CPU_SECONDS.name not in attempt.attributes
    assert list(attempt_spans(timing(ended_at=None), [ONE])) == []
    assert list(attempt_spans(timing(), [])) == []


def test_every_attribute_is_in_the_table() -> None:
    known = {attribute.name for attribute in names.ATTRIBUTES}
    root = submission_spans(ONE, "x", SubmissionState.FAILED, 1, 2, {names.STEPS: 1})
    spans = [*root, *attempt_spans(timing(), [ONE])]
    assert {name for span in spans for name in span.attributes} <= known


def test_a_traceparent_of_another_program_makes_the_submission_a_part_of_its_trace() -> None:
    [root] = submission_spans(Trace("one", JOB), "", SubmissionState.SUCCEEDED, 1.0, 2.0, {})
    assert (f"{root.trace_id:032x}", f"{root.parent_id:016x}") == tuple(JOB.split("-")[1:3])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk",
        JOB[:-1],
        JOB.upper(),
        f"{JOB}-more",
        f"ff{JOB[2:]}",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        "00-" + "a" * 10_000,
    ],
)
def test_a_malformed_traceparent_begins_a_trace_of_its_own(text: str) -> None:
    assert parse_traceparent(text) is None
    assert Trace("one", text).root == ONE.root


def test_a_later_version_of_the_format_is_read_by_its_first_fields() -> None:
    assert parse_traceparent(f"01{JOB[2:]}-what-comes") == parse_traceparent(JOB)
    assert str(TraceContext(1, 2)) == f"00-{1:032x}-{2:016x}-01"
    assert parse_traceparent(str(TraceContext(1, 2))) == TraceContext(1, 2)
