"""From a fact to what the shell must do. Effects may run twice: (step, attempt) fences them."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler import facts as f
from scheduler.effects import CancelBuild, Effect, PublishOutputs, StartBuild
from scheduler.model import BuilderId, FailureKind, StepState
from scheduler.state import FarmState


def react(state: FarmState, fact: f.Fact) -> Sequence[Effect]:  # noqa: PLR0911  one per kind of fact
    """Return the effects of a fact that `state` already holds."""
    match fact:
        case f.StepLeased():
            return (StartBuild(fact.lease, fact.builder, fact.recipe),)
        case f.StepBuilt():
            return (PublishOutputs(fact.lease, fact.evidence),)
        case f.LeaseRevoked(failure=failure) if failure.kind is FailureKind.CANCELLED:
            return (CancelBuild(fact.lease, fact.builder),)
        case f.BuilderRefreshed() if fact.missing or fact.unknown:
            return _heal(state, fact.builder, fact)
        case f.BuilderAdmitted() if fact.missing or fact.unknown:
            return _heal(state, fact.builder.id, fact)
        case f.FarmResumed():
            return _resume(state)
        case _:
            return ()


def _heal(state: FarmState, builder: BuilderId, fact: f.BuilderRefreshed | f.BuilderAdmitted) -> Sequence[Effect]:
    again = [StartBuild(lease, builder, state.steps[lease.step].active) for lease in fact.missing]
    return [*again, *(CancelBuild(lease, builder) for lease in fact.unknown)]


def _resume(state: FarmState) -> Sequence[Effect]:
    effects: list[Effect] = []
    for step in state.steps.values():
        if step.state is StepState.LEASED:
            effects.append(StartBuild(step.lease, step.builder, step.active))
        elif step.state is StepState.PUBLISHING:
            effects.append(PublishOutputs(step.lease, step.evidence))
    return effects
