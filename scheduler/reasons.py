"""Reasons why a step does not run, as values. `coordinator.readmodel.explain` makes the sentences."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.model import (
    NO_INSTANT,
    BuilderId,
    BuilderSpec,
    ImpossibleError,
    Instant,
    Requirements,
    StepKey,
    StepState,
    SubmissionId,
)
from scheduler.policy import Limits
from scheduler.positions import in_turn
from scheduler.records import Queue, Step
from scheduler.state import FarmState
from scheduler.step_rules import ALLOWANCE_S, is_known_failure

#: How many names a reason gives at most.
NAMED = 5
#: Most entries of one class's lanes for which positions are worked out, in one piece of some 8 ms. A step that several
#: submissions want has an entry for each.
PLACED_AT_MOST = 3_000


@dataclass(frozen=True, slots=True)
class WaitsForSteps:
    """Some needs are not done; `examples` names the first few of `count`."""

    count: int
    examples: tuple[StepKey, ...]


@dataclass(frozen=True, slots=True)
class FollowsSteps:
    """A builder has its lease and begins once it has built what this names, or has `built` it and publishes that first.

    `examples` names the first few of `count` needs.
    """

    builder: BuilderId
    count: int
    examples: tuple[StepKey, ...]
    built: bool


@dataclass(frozen=True, slots=True)
class NotWanted:
    """No submission stands on it: a need of a recipe that is not in use."""


@dataclass(frozen=True, slots=True)
class NoBuilderJoined:
    """The farm has no builder at all."""

    until: Instant = NO_INSTANT


@dataclass(frozen=True, slots=True)
class NoBuilderOffersSystem:
    """No builder is of this system."""

    system: str
    until: Instant = NO_INSTANT


@dataclass(frozen=True, slots=True)
class NoBuilderOffersFeatures:
    """Builders of the system lack features; `missing` are those that the closest of them lacks."""

    system: str
    missing: tuple[str, ...]
    until: Instant = NO_INSTANT


@dataclass(frozen=True, slots=True)
class OnlyReservedBuilders:
    """Every builder that offers all this takes only steps with features that this one does not ask for."""

    builders: tuple[BuilderId, ...]
    until: Instant = NO_INSTANT


@dataclass(frozen=True, slots=True)
class BuildersFull:
    """Builders could take it, none has room. It is the `position`-th (from 1) of `ready` steps of its class.

    `position` is 0 where its class has more than `PLACED_AT_MOST` entries.
    """

    builders: tuple[BuilderId, ...]
    position: int
    ready: int


@dataclass(frozen=True, slots=True)
class BuildersQuarantined:
    """Every builder that could take it is in quarantine or drains; the first is free again at `until`."""

    builders: tuple[BuilderId, ...]
    until: Instant
    reason: str


@dataclass(frozen=True, slots=True)
class BuildersDraining:
    """Every builder that could take it finishes what it has and takes nothing new."""

    builders: tuple[BuilderId, ...]


@dataclass(frozen=True, slots=True)
class LimitReached:
    """Builders have room, and a limit keeps them from taking it: each is on probation after a quarantine."""

    builders: tuple[BuilderId, ...]
    position: int
    ready: int


@dataclass(frozen=True, slots=True)
class WaitsForFaster:
    """Builders have room, and a faster one is expected to end it earlier although it had none until `until`.

    The wait began at `since`; it ends when that no longer holds, or when it has lasted as long as it could gain.
    """

    builder: BuilderId
    since: Instant
    until: Instant


@dataclass(frozen=True, slots=True)
class WaitsForMemory:
    """Builders have room, and none has the memory that it asks for beside what it runs.

    The builder should have it at `until`; if no such step goes before, it takes nothing else that asks for memory.
    """

    builder: BuilderId
    since: Instant
    until: Instant
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class BacksOff:
    """It failed through the farm's fault, or was handed back, and is tried again at `until`."""

    until: Instant
    failures: int


@dataclass(frozen=True, slots=True)
class RetriesSpent:
    """It failed, as many others of `submission` have within the hour: its turn to be tried again comes at `until`."""

    until: Instant
    submission: SubmissionId


@dataclass(frozen=True, slots=True)
class KnownToFail:
    """`cause` failed by its own fault at `since`: submissions take that for known until `until`."""

    cause: StepKey
    since: Instant
    until: Instant


#: No builder can take the step; it is given up at `until`, where that is not 0, unless a builder comes that can.
Unserved = NoBuilderJoined | NoBuilderOffersSystem | NoBuilderOffersFeatures | OnlyReservedBuilders
Busy = BuildersFull | BuildersQuarantined | BuildersDraining | LimitReached | WaitsForFaster | WaitsForMemory
Reason = WaitsForSteps | FollowsSteps | NotWanted | Busy | BacksOff | RetriesSpent | KnownToFail | Unserved


class QueuePositions:
    """Positions of ready steps in the queue of their class: computed at the first use, valid until the state moves."""

    def __init__(self, state: FarmState) -> None:
        self._state = state
        self._by_class: dict[Requirements, tuple[dict[Step, int], int]] = {}

    def forget(self) -> None:
        """The state has moved."""
        if self._by_class:
            self._by_class = {}

    def of(self, requirements: Requirements) -> tuple[dict[Step, int], int]:
        """Return the ready steps of a class with their positions, from 1, and their count.

        Beyond `PLACED_AT_MOST` there are no positions: working them out would hold up others.
        """
        found = self._by_class.get(requirements)
        if found is None:
            queues = [queue for (wanted, _), queue in self._state.ready.queues.items() if wanted == requirements]
            entries = sum([len(lane.heap) for queue in queues for lane in queue.lanes.values()])
            ordered = in_turn(_live(queues), self._state.ready.turn) if entries <= PLACED_AT_MOST else []
            positions = {step: position for position, step in enumerate(ordered, 1)}
            found = self._by_class[requirements] = (positions, sum([queue.standing for queue in queues]))
        return found


def why(state: FarmState, positions: QueuePositions, limits: Limits, key: StepKey, now: Instant) -> Reason | None:
    """Return why a step is not running or published; None for one that is, or has finished for good.

    Raises `KeyError` for an unknown step. Costs the number of needs, or of builders, and of queues and their
    first `PLACED_AT_MOST` steps the first time that one of a class is asked for.
    """
    step = state.steps[key]
    if step.state is StepState.WAITING:
        if not step.wanted or not step.engaged:
            return NotWanted()
        unmet = [need.key for need in step.needs if need.state is not StepState.DONE]
        return WaitsForSteps(len(unmet), tuple(unmet[:NAMED]))
    if step.state in (StepState.FAILED, StepState.DOOMED):
        return _known(state, limits, step, now)
    if step.state is not StepState.READY:
        return _follows(step)
    # Until the fact that it ended: a step whose time has just come stands in no queue yet.
    if step.not_before:
        return _backs_off(state, step, now)
    requirements = step.recipe.requirements
    return unserved(state, requirements) or _busy(step, *positions.of(requirements))


def _follows(step: Step) -> FollowsSteps | None:
    """Return what a lease that was granted early waits for; a build needs nothing that is not built, as a result is."""
    built = step.state is StepState.PUBLISHING
    ahead = [need.key for need in step.follows if built or need.state is StepState.LEASED]
    return FollowsSteps(step.builder, len(ahead), tuple(ahead[:NAMED]), built) if ahead else None


def _backs_off(state: FarmState, step: Step, now: Instant) -> BacksOff | RetriesSpent:
    payer = state.wisher(step)
    if step.faults and payer is not None and state.paid_until.get(payer, NO_INSTANT) > now + ALLOWANCE_S:
        return RetriesSpent(step.not_before, payer)
    return BacksOff(step.not_before, step.faults + step.returns)


def _known(state: FarmState, limits: Limits, step: Step, now: Instant) -> KnownToFail | None:
    cause = step if step.state is StepState.FAILED else state.steps.get(step.cause or step.key)
    if cause is None or not is_known_failure(cause, limits, now):
        return None
    return KnownToFail(cause.key, cause.failed_at, Instant(cause.failed_at + limits.failure_ttl_s))


def _busy(step: Step, positions: dict[Step, int], ready: int) -> Busy:
    """Return why none of the builders that could take a ready step has."""
    held = step.held
    if held is not None and held.memory_bytes:
        return WaitsForMemory(held.builder, held.since, held.until, held.memory_bytes)
    if held is not None:
        return WaitsForFaster(held.builder, held.since, held.until)
    able = list(step.queue.builders.values()) if step.queue is not None else []
    willing = [builder for builder in able if builder.willing]
    position = positions.get(step, 0)
    if willing or not able:
        roomy = [builder.id for builder in willing if builder.probation and builder.offered > len(builder.leases)]
        if roomy and len(roomy) == len(willing):
            return LimitReached(tuple(roomy[:NAMED]), position, ready)
        return BuildersFull(tuple([builder.id for builder in willing]), position, ready)
    held_back = [builder for builder in able if builder.until]
    if held_back:
        first = min(held_back, key=lambda builder: builder.until)
        return BuildersQuarantined(tuple([builder.id for builder in able][:NAMED]), first.until, first.reason)
    return BuildersDraining(tuple([builder.id for builder in able][:NAMED]))


def unserved_classes(state: FarmState) -> dict[Requirements, Unserved]:
    """Return the classes of ready steps that no builder offers, sorted, and why. Costs the number of queues."""
    waiting: dict[Requirements, list[Queue]] = {}
    for (requirements, _), queue in state.ready.queues.items():
        if queue.lanes:
            waiting.setdefault(requirements, []).append(queue)
    found: dict[Requirements, Unserved] = {}
    for requirements in sorted(waiting, key=lambda wanted: (wanted.system, wanted.features)):
        if any(queue.builders for queue in waiting[requirements]):
            continue
        reason = unserved(state, requirements)
        if reason is None:
            raise ImpossibleError(f"the queue for {requirements} has lost its builders")
        found[requirements] = reason
    return found


def queue_reasons(state: FarmState) -> dict[Requirements, Unserved | Busy]:
    """Return why the first step of each queue has no builder yet, by what the queue requires.

    Positions are 0: places in a queue cost its length, this costs the number of queues and builders.
    """
    found: dict[Requirements, Unserved | Busy] = {}
    for (requirements, _), queue in state.ready.queues.items():
        if queue.lanes and requirements not in found:
            _, _, first = next(iter(queue.lanes.values())).heap[0]
            found[requirements] = unserved(state, requirements) or _busy(first, {}, 0)
    return found


def _live(queues: list[Queue]) -> list[Step]:
    steps: dict[Step, None] = {}
    for queue in queues:
        for lane in queue.lanes.values():
            steps.update((step, None) for _, _, step in lane.heap if step.queue is queue)
    return list(steps)


def unserved(state: FarmState, requirements: Requirements) -> Unserved | None:
    """Return why no builder can ever take this class as things stand; None where one can."""
    specs = [builder.spec for builder in state.builders.values() if builder.spec is not None]
    if not specs:
        return NoBuilderJoined()
    if any(spec.offers(requirements) for spec in specs):
        return None
    bare = Requirements(requirements.system)
    right = [spec for spec in specs if _without_mandatory(spec).offers(bare)]
    if not right:
        return NoBuilderOffersSystem(requirements.system)
    reserved = tuple(spec.id for spec in right if _without_mandatory(spec).offers(requirements))
    if reserved:
        return OnlyReservedBuilders(reserved[:NAMED])
    lacking = [tuple(feature for feature in requirements.features if feature not in spec.features) for spec in right]
    return NoBuilderOffersFeatures(requirements.system, min(lacking, key=len))


def _without_mandatory(spec: BuilderSpec) -> BuilderSpec:
    return BuilderSpec(spec.id, spec.incarnation, spec.systems, spec.features)
