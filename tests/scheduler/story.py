"""Facts and effects as lines of text: the form of the golden traces, and of a simulated life that failed."""

from __future__ import annotations

from typing import assert_never

from scheduler import facts as f
from scheduler.effects import CancelBuild, Effect, FetchAhead, PublishOutputs, StartBuild
from scheduler.model import LeaseId, Requirements, StepKey
from scheduler.terms import Withdrawal

_NAMED = 8


def subjects(fact: f.Fact) -> tuple[str, ...]:  # noqa: C901, PLR0911, PLR0912  one arm per kind of fact
    """Return the keys a fact is about: steps, builders, submissions. Members of a submission are not listed."""
    match fact:
        case f.StepLeased() | f.LeaseRevoked() | f.StepBuilt():
            return (fact.lease.step, fact.builder)
        case f.StepDone():
            return (fact.lease.step,)
        case f.StepAdded():
            return (fact.spec.key,)
        case f.WorksRevised():
            return tuple([step for step, _ in fact.works])
        case f.StepFailed():
            return (fact.step, fact.builder)
        case f.StepDoomed():
            return (fact.step, fact.cause)
        case (
            f.RecipeAdded()
            | f.StepCached()
            | f.StepRevived()
            | f.StepLost()
            | f.StepFellBack()
            | f.StepAbandoned()
            | f.BackOffEnded()
            | f.StepReady()
            | f.StepWaiting()
            | f.MembersJoined()
            | f.StepHeld()
        ):
            return (fact.step,)
        case (
            f.SubmissionAccepted()
            | f.SubmissionGrew()
            | f.SubmissionSealed()
            | f.SubmissionRetried()
            | f.SubmissionWithdrawn()
            | f.SubmissionBumped()
            | f.SubmissionForgotten()
        ):
            return (fact.submission,)
        case f.StepsForgotten():
            return fact.steps
        case f.BuilderAdmitted():
            return (fact.builder.id,)
        case f.BuilderRefreshed() | f.BuilderRemoved() | f.BuilderQuarantined() | f.QuarantineEnded():
            return (fact.builder,)
        case f.StepRestored():
            return (fact.step,)
        case f.SubmissionRestored():
            return (fact.submission,)
        case f.BuilderRestored():
            return (fact.builder,)
        case f.BuildersRated():
            return tuple(dict.fromkeys(builder for builder, _, _ in fact.speeds))
        case f.FarmResumed() | f.FarmRestored():
            return ()
        case _:
            assert_never(fact)


def tell(fact: f.Fact) -> str:  # noqa: C901, PLR0911, PLR0912  one line per fact
    """Return one line of plain English about a fact. Not a format: nothing parses it."""
    match fact:
        case f.SubmissionAccepted() | f.SubmissionRetried():
            how = "runs again" if isinstance(fact, f.SubmissionRetried) else "opened" if fact.open else "accepted"
            return (
                f"submission {fact.submission} {how}: wants {_some(fact.roots)}; {len(fact.members)} steps, "
                f"{len(fact.held)} held, {len(fact.joined)} joined"
            )
        case f.SubmissionGrew():
            again = f", {_some(fact.before)} again" if fact.before else ""
            return (
                f"submission {fact.submission} grew: wants {_some(fact.roots)}; {len(fact.members)} steps, "
                f"{len(fact.held)} held, {len(fact.joined)} joined{again}"
            )
        case f.SubmissionSealed():
            return f"submission {fact.submission} sealed" + (f": {fact.incomplete}" if fact.incomplete else "")
        case f.SubmissionWithdrawn():
            why = "" if fact.why is Withdrawal.CANCELLED else f": {fact.why.value}{f' by {fact.by}' if fact.by else ''}"
            return f"submission {fact.submission} withdrawn{why}"
        case f.SubmissionBumped():
            return f"submission {fact.submission} has priority {fact.priority}"
        case f.SubmissionForgotten():
            return f"submission {fact.submission} forgotten"
        case f.StepsForgotten():
            return f"{len(fact.steps)} steps forgotten: {_some(fact.steps)}"
        case f.StepAdded():
            ways = "; or ".join(f"on {_needs(r.requirements)} from {_some(r.needs)}" for r in fact.spec.recipes)
            return f"{fact.spec.key} added: {ways}"
        case f.RecipeAdded():
            return f"{fact.step} gained a recipe: on {_needs(fact.recipe.requirements)} from {_some(fact.recipe.needs)}"
        case f.StepCached():
            return f"{fact.step} held by the cache"
        case f.StepRevived():
            return f"{fact.step} revived with recipe {fact.recipe}"
        case f.StepLost():
            return f"{fact.step} lost by the cache"
        case f.StepLeased():
            return f"{_lease(fact.lease)} leased to {fact.builder}, recipe {fact.recipe}"
        case f.LeaseRevoked():
            failure = f"{fact.failure.kind}: {fact.failure.message}"
            return f"{_lease(fact.lease)} revoked from {fact.builder}, {failure}; not before {fact.not_before:.2f}"
        case f.StepBuilt():
            return f"{_lease(fact.lease)} built by {fact.builder}"
        case f.StepDone():
            return f"{_lease(fact.lease)} done"
        case f.StepFellBack():
            return f"{fact.step} falls back to recipe {fact.recipe}: {fact.failure.message}"
        case f.StepFailed():
            place = f" on {fact.builder}" if fact.builder else ""
            return f"{fact.step}@{fact.attempt} failed{place}, {fact.failure.kind}: {fact.failure.message}"
        case f.StepDoomed():
            return f"{fact.step} doomed by {fact.cause}"
        case f.StepAbandoned():
            return f"{fact.step} abandoned"
        case f.BackOffEnded():
            return f"{fact.step} may run again"
        case f.StepReady():
            return f"{fact.step} is ready"
        case f.StepWaiting():
            return f"{fact.step} waits again"
        case f.MembersJoined():
            return f"the submissions of {fact.step} stand on {_some(fact.members)}"
        case f.BuilderAdmitted():
            systems = _some(tuple(sorted(fact.builder.systems)))
            heal = _heal(fact.missing, fact.unknown)
            return f"builder {fact.builder.id} admitted: {systems}, room for {fact.capacity}{_own_word(fact)}{heal}"
        case f.BuilderRefreshed():
            heal = _heal(fact.missing, fact.unknown)
            return f"builder {fact.builder} reported: room for {fact.capacity}{_own_word(fact)}{heal}"
        case f.BuilderRemoved():
            return f"builder {fact.builder} removed: {fact.reason}"
        case f.BuilderQuarantined():
            return f"builder {fact.builder} quarantined until {fact.until:.2f} (level {fact.level}): {fact.reason}"
        case f.QuarantineEnded():
            return f"builder {fact.builder} is out of quarantine"
        case f.FarmResumed():
            return "farm resumed"
        case f.WorksRevised():
            return f"works are expected anew: {', '.join(f'{key} {work_ms / 1000:g} s' for key, work_ms in fact.works)}"
        case f.BuildersRated():
            return f"builders are so fast: {_speeds(fact.speeds)}"
        case f.StepHeld() if fact.memory_bytes:
            return f"{fact.step} waits for {fact.memory_bytes} bytes of memory on {fact.builder}"
        case f.StepHeld():
            return f"{fact.step} waits for {fact.builder}, which is faster, until about {fact.until:.2f}"
        case f.StepRestored():
            return f"{fact.step}@{fact.attempt} restored, {fact.state.value}"
        case f.SubmissionRestored():
            return f"submission {fact.submission} restored: wants {_some(fact.roots)}"
        case f.BuilderRestored():
            return f"builder {fact.builder} restored with {len(fact.leases)} leases"
        case f.FarmRestored():
            return f"farm restored with {fact.steps} steps"
        case _:
            assert_never(fact)


def tell_effect(effect: Effect) -> str:
    """Return one line about an effect."""
    match effect:
        case StartBuild():
            after = f", after {', '.join(map(_lease, effect.after))}" if effect.after else ""
            return f"start {_lease(effect.lease)} on {effect.builder}, recipe {effect.recipe}{after}"
        case CancelBuild():
            return f"cancel {_lease(effect.lease)} on {effect.builder}"
        case PublishOutputs():
            return f"publish {_lease(effect.lease)}"
        case FetchAhead():
            return f"fetch inputs of {effect.step} ahead on {effect.builder}, recipe {effect.recipe}"
        case _:
            assert_never(effect)


def _lease(lease: LeaseId) -> str:
    return f"{lease.step}@{lease.attempt}"


def _needs(requirements: Requirements) -> str:
    return "+".join((requirements.system, *requirements.features))


def _some(names: tuple[str, ...] | tuple[StepKey, ...]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "nothing") + more


def _own_word(fact: f.BuilderAdmitted | f.BuilderRefreshed) -> str:
    return (", draining" if fact.draining else "") + (f", unfit: {fact.unfit}" if fact.unfit else "")


def _heal(missing: tuple[LeaseId, ...], unknown: tuple[LeaseId, ...]) -> str:
    parts = [f"; misses {', '.join(map(_lease, missing))}"] if missing else []
    parts += [f"; has no right to {', '.join(map(_lease, unknown))}"] if unknown else []
    return "".join(parts)


def _speeds(speeds: tuple[tuple[str, str, float], ...]) -> str:
    return ", ".join(f"{builder} {speed:g} for {system}" for builder, system, speed in speeds) or "all alike"
