"""A state as few facts as there are steps: what a journal may begin with instead of all that led there.

Replaying them gives the same durable state, so that whatever happens afterwards has the same answer. `evolve` stays
the only mutator. Not in it: what builders reported of themselves, and the ends of back-offs.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler import facts as f
from scheduler.model import NO_INSTANT, StepState, SubmissionId
from scheduler.records import Step
from scheduler.state import FarmState

#: States in which a step that never failed and never was handed back has nothing more to store.
_PLAIN = (StepState.WAITING, StepState.READY, StepState.DONE)


def tell_all(state: FarmState) -> Iterator[f.Fact]:
    """Yield the facts that rebuild `state`, which must not change meanwhile; not amidst the facts of one call."""
    for step in state.steps.values():
        yield f.StepRestored(
            step.key,
            step.recipes,
            step.sequence,
            step.state,
            step.depth,
            step.generation_started,
            step.attempt,
            step.done_at,
            tuple([dependent.sequence for dependent in step.dependents]) if step.dependents else (),
            step.roots,
            _past(step),
            step.work_ms,
            step.tail_ms,
            step.memory_bytes,
            step.output_bytes,
        )
    for submission, roots in state.submissions.items():
        yield _submission(state, submission, roots, withdrawn=False)
    for submission, roots in state.withdrawn.items():
        yield _submission(state, submission, roots, withdrawn=True)
    for builder in state.builders.values():
        if builder.leases:
            yield f.BuilderRestored(builder.id, builder.heard, tuple(builder.leases))
    yield f.FarmRestored(len(state.steps), state.known, state.generation, state.attempt_floor)


def _submission(
    state: FarmState, submission: SubmissionId, roots: tuple[Step, ...], *, withdrawn: bool
) -> f.SubmissionRestored:
    return f.SubmissionRestored(
        submission,
        tuple([root.key for root in roots]),
        withdrawn=withdrawn,
        paid_until=state.paid_until.get(submission, NO_INSTANT),
        wait_s=state.wait_limits.get(submission),
        limits=tuple(state.limits.get(submission, {}).items()),
        terms=state.shares.terms_of(submission),
        failed_fast=submission in state.failed_fast,
        open=submission in state.open,
        members=tuple(sorted(state.open[submission].members)) if submission in state.open else (),
    )


def _past(step: Step) -> f.StepPast | None:
    if step.state in _PLAIN and not (
        step.active or step.moves or step.generation_ended or step.tried or step.avoid or step.not_before
    ):
        return None
    return f.StepPast(
        active=step.active,
        ended=step.generation_ended,
        failed_at=step.failed_at,
        builder=step.builder,
        evidence=step.evidence,
        failure=step.failure,
        cause=step.cause,
        tried=tuple(sorted(step.tried)),
        faults=step.faults,
        returns=step.returns,
        moves=step.moves,
        strikes=step.strikes,
        avoid=step.avoid,
        not_before=step.not_before,
        accounts=step.accounts,
        follows=tuple([need.key for need in step.follows]),
    )
