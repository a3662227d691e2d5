"""From a fact to what the shell must do. Effects may run twice: (step, attempt) fences them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from scheduler import facts as f
from scheduler.effects import CancelBuild, Effect, PublishOutputs, StartBuild
from scheduler.model import BuilderId, FailureKind, LeaseId, StepState
from scheduler.records import Step
from scheduler.state import FarmState


def react(state: FarmState, fact: f.Fact) -> Sequence[Effect]:
    """Return the effects of a fact that `state` already holds."""
    reaction = REACTIONS.get(type(fact))
    return () if reaction is None else reaction(state, fact)


def _start(state: FarmState, fact: f.StepLeased) -> Sequence[Effect]:
    # Where nothing follows anything no step is looked up, as there is one of these for each build.
    ahead = _leases_ahead(state.steps[fact.lease.step]) if state.early.counts else ()
    return (StartBuild(fact.lease, fact.builder, fact.recipe, ahead),)


def _publish(state: FarmState, fact: f.StepBuilt) -> Sequence[Effect]:
    # What refers to outputs that are not published yet follows them.
    if state.early.counts and state.steps[fact.lease.step].follows:
        return ()
    return (PublishOutputs(fact.lease, fact.evidence),)


def _publish_behind(state: FarmState, _fact: f.StepDone) -> Sequence[Effect]:
    behind = state.early.released
    return [PublishOutputs(step.lease, step.evidence) for step in behind] if behind else ()


def _leases_ahead(step: Step) -> tuple[LeaseId, ...]:
    return tuple([need.lease for need in step.follows]) if step.follows else ()


def _cancel(_state: FarmState, fact: f.LeaseRevoked) -> Sequence[Effect]:
    return (CancelBuild(fact.lease, fact.builder),) if fact.failure.kind is FailureKind.CANCELLED else ()


def _heal_refreshed(state: FarmState, fact: f.BuilderRefreshed) -> Sequence[Effect]:
    return _heal(state, fact.builder, fact)


def _heal_admitted(state: FarmState, fact: f.BuilderAdmitted) -> Sequence[Effect]:
    return _heal(state, fact.builder.id, fact)


def _heal(state: FarmState, builder: BuilderId, fact: f.BuilderRefreshed | f.BuilderAdmitted) -> Sequence[Effect]:
    again = [_started_again(state.steps[lease.step]) for lease in fact.missing]
    return [*again, *(CancelBuild(lease, builder) for lease in fact.unknown)]


def _resume(state: FarmState, _fact: f.FarmResumed) -> Sequence[Effect]:
    effects: list[Effect] = []
    for step in state.steps.values():
        if step.state is StepState.LEASED:
            effects.append(_started_again(step))
        elif step.state is StepState.PUBLISHING and not step.follows:
            effects.append(PublishOutputs(step.lease, step.evidence))
    return effects


def _started_again(step: Step) -> StartBuild:
    return StartBuild(step.lease, step.builder, step.active, _leases_ahead(step))


#: What follows from each kind of fact; all others ask nothing of the shell.
REACTIONS: Final[Mapping[type[f.Fact], Callable[[FarmState, Any], Sequence[Effect]]]] = {
    f.StepLeased: _start,
    f.StepBuilt: _publish,
    f.StepDone: _publish_behind,
    f.LeaseRevoked: _cancel,
    f.BuilderRefreshed: _heal_refreshed,
    f.BuilderAdmitted: _heal_admitted,
    f.FarmResumed: _resume,
}
