"""Why a step does not run, as a value. Texts are made by whoever shows them (`str` gives a plain sentence)."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.model import BuilderId, BuilderSpec, ImpossibleError, Instant, Requirements, StepKey, StepState
from scheduler.records import Step
from scheduler.state import FarmState

#: How many names a reason gives at most.
NAMED = 5


@dataclass(frozen=True, slots=True)
class WaitsForSteps:
    """Some needs are not done; `some` names the first few of `count`."""

    count: int
    some: tuple[StepKey, ...]

    def __str__(self) -> str:
        more = f" and {self.count - len(self.some)} more" if self.count > len(self.some) else ""
        return f"waits for {', '.join(self.some)}{more}"


@dataclass(frozen=True, slots=True)
class NotWanted:
    """No submission stands on it: a need of a recipe that is not in use."""

    def __str__(self) -> str:
        return "no submission stands on it now"


@dataclass(frozen=True, slots=True)
class NoBuilderJoined:
    """The farm has no builder at all."""

    def __str__(self) -> str:
        return "no builder has joined"


@dataclass(frozen=True, slots=True)
class NoBuilderOffersSystem:
    """No builder is of this system."""

    system: str

    def __str__(self) -> str:
        return f"no builder offers the system {self.system}"


@dataclass(frozen=True, slots=True)
class NoBuilderOffersFeatures:
    """Builders of the system lack features; `missing` are those that the closest of them lacks."""

    system: str
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"no builder of {self.system} offers the feature {', '.join(self.missing)}"


@dataclass(frozen=True, slots=True)
class OnlyReservedBuilders:
    """Every builder that offers all this takes only steps with features that this one does not ask for."""

    builders: tuple[BuilderId, ...]

    def __str__(self) -> str:
        return f"needs a builder without mandatory features; {', '.join(self.builders)} demand some"


@dataclass(frozen=True, slots=True)
class BuildersFull:
    """Builders could take it, none has room; `ready` steps of its class wait in all."""

    builders: tuple[BuilderId, ...]
    ready: int

    def __str__(self) -> str:
        return f"all {len(self.builders)} builders that could are full ({self.ready} steps are ready for them)"


@dataclass(frozen=True, slots=True)
class BacksOff:
    """It failed through the farm's fault, or was handed back, and is tried again at `until`."""

    until: Instant
    failures: int

    def __str__(self) -> str:
        return f"backs off until {self.until:.0f} after {self.failures} failures"


Unserved = NoBuilderJoined | NoBuilderOffersSystem | NoBuilderOffersFeatures | OnlyReservedBuilders
Reason = WaitsForSteps | NotWanted | BuildersFull | BacksOff | Unserved


@dataclass(frozen=True, slots=True)
class StuckClass:
    """Ready steps that nobody can take: `count` of them, the first few by name, and why."""

    requirements: Requirements
    count: int
    some: tuple[StepKey, ...]
    reason: Unserved


def why(state: FarmState, key: StepKey, now: Instant) -> Reason | None:
    """Return why an unfinished step is not running; None for one that runs, publishes or has finished.

    Raises `KeyError` for an unknown step. Costs the number of needs, or of builders and of steps in the same queue.
    """
    step = state.steps[key]
    if step.state is StepState.WAITING:
        if not step.wanted:
            return NotWanted()
        unmet = [need.key for need in step.needs if need.state is not StepState.DONE]
        return WaitsForSteps(len(unmet), tuple(unmet[:NAMED]))
    if step.state is not StepState.READY:
        return None
    if step.not_before > now:
        return BacksOff(step.not_before, step.faults + step.returns)
    requirements = step.recipe.requirements
    unserved = _unserved(state, requirements)
    if unserved is not None:
        return unserved
    queue = step.queue
    able = tuple(queue.builders) if queue is not None else ()
    return BuildersFull(able, len(_live(state, requirements)))


def stuck(state: FarmState) -> list[StuckClass]:
    """Return one line per class of requirements with ready steps that no builder offers, sorted by class.

    Costs the number of classes, and for each stuck one the number of its ready steps.
    """
    found: list[StuckClass] = []
    classes = dict.fromkeys(requirements for requirements, _ in state.ready.queues)
    for requirements in sorted(classes, key=lambda wanted: (wanted.system, wanted.features)):
        heaps = [queue for key, queue in state.ready.queues.items() if key[0] == requirements and queue.heap]
        if not heaps or any(queue.builders for queue in heaps):
            continue
        reason = _unserved(state, requirements)
        if reason is None:
            raise ImpossibleError(f"the queue for {requirements} has lost its builders")
        steps = _live(state, requirements)
        found.append(StuckClass(requirements, len(steps), tuple(step.key for step in steps[:NAMED]), reason))
    return found


def _live(state: FarmState, requirements: Requirements) -> list[Step]:
    steps: dict[Step, None] = {}
    for (wanted, _), queue in state.ready.queues.items():
        if wanted == requirements:
            steps.update((step, None) for _, _, step in queue.heap if step.queue is queue)
    return list(steps)


def _unserved(state: FarmState, requirements: Requirements) -> Unserved | None:
    """Say why no builder can ever take this class as things stand; None where one can."""
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
