"""Short constructors for the core's inputs, and a scene: a farm that writes down all that is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scheduler import events as e
from scheduler import invariants
from scheduler.effects import Effect
from scheduler.facts import Fact
from scheduler.farm import Farm
from scheduler.model import (
    FAR_OFF,
    BuilderId,
    BuilderSpec,
    Failure,
    FailureKind,
    Instant,
    LeaseId,
    Recipe,
    Requirements,
    StepKey,
    StepSpec,
    StepState,
    SubmissionId,
)
from scheduler.policy import Limits
from scheduler.resource_limits import ResourceLimits
from scheduler.terms import NO_TERMS, Terms
from tests.scheduler.story import tell, tell_effect

LINUX = "linux"


def recipe(*needs: str, system: str = LINUX, features: Iterable[str] = ()) -> Recipe:
    return Recipe(Requirements(system, tuple(sorted(features))), tuple(StepKey(need) for need in needs))


def step(key: str, *needs: str, system: str = LINUX, features: Iterable[str] = ()) -> StepSpec:
    return StepSpec(StepKey(key), (recipe(*needs, system=system, features=features),))


def either(key: str, *recipes: Recipe) -> StepSpec:
    return StepSpec(StepKey(key), recipes)


def submit(
    name: str,
    roots: Iterable[str],
    *steps: StepSpec,
    held: Iterable[str] = (),
    asked_at: float = FAR_OFF,
    retry: bool | Iterable[str] = False,
    again: bool = False,
    replanned: bool = False,
    wait_s: int | None = None,
    limits: Mapping[str, ResourceLimits] | None = None,
    opens: bool = False,
    terms: Terms = NO_TERMS,
    supersedes: bool = False,
) -> e.SubmissionReceived:
    return e.SubmissionReceived(
        SubmissionId(name),
        tuple(StepKey(root) for root in roots),
        steps,
        tuple(StepKey(key) for key in held),
        Instant(asked_at),
        retry_failed=retry is True,
        retry=() if isinstance(retry, bool) else tuple(StepKey(key) for key in retry),
        again=again,
        replanned=replanned,
        wait_s=wait_s,
        limits=tuple((StepKey(root), said) for root, said in (limits or {}).items()),
        open=opens,
        terms=terms,
        supersedes=supersedes,
    )


def grow(
    name: str, roots: Iterable[str], *steps: StepSpec, held: Iterable[str] = (), asked_at: float = FAR_OFF
) -> e.SubmissionGrown:
    return e.SubmissionGrown(
        SubmissionId(name),
        tuple(StepKey(root) for root in roots),
        steps,
        tuple(StepKey(key) for key in held),
        Instant(asked_at),
    )


def seal(name: str, incomplete: str = "") -> e.SealAsked:
    return e.SealAsked(SubmissionId(name), incomplete)


def builder(
    name: str,
    *systems: str,
    features: Iterable[str] = (),
    mandatory: Iterable[str] = (),
    incarnation: str = "1",
    successors: bool = False,
) -> BuilderSpec:
    offered = frozenset(systems or (LINUX,))
    return BuilderSpec(
        *(BuilderId(name), incarnation, offered, frozenset(features), frozenset(mandatory)),
        takes_successors=successors,
    )


def join(
    spec: BuilderSpec | str,
    capacity: int = 1,
    leases: Iterable[LeaseId] = (),
    *,
    draining: bool = False,
    unfit: str = "",
) -> e.BuilderJoined:
    offered = builder(spec) if isinstance(spec, str) else spec
    return e.BuilderJoined(offered, capacity, tuple(leases), draining, unfit)


def report(
    name: str,
    capacity: int = 1,
    *leases: LeaseId,
    incarnation: str = "1",
    draining: bool = False,
    unfit: str = "",
) -> e.BuilderReported:
    return e.BuilderReported(BuilderId(name), incarnation, capacity, leases, draining, unfit)


def lease(key: str, attempt: int = 1) -> LeaseId:
    return LeaseId(StepKey(key), attempt)


def built(key: str, by: str, attempt: int = 1) -> e.BuildSucceeded:
    return e.BuildSucceeded(lease(key, attempt), BuilderId(by), b"evidence")


def broke(
    key: str,
    by: str,
    kind: FailureKind,
    attempt: int = 1,
    message: str = "exit status 1",
    *,
    signature: str = "",
    limit: int = 0,
) -> e.BuildFailed:
    return e.BuildFailed(lease(key, attempt), BuilderId(by), Failure(kind, message, signature), limit)


def published(key: str, attempt: int = 1) -> e.OutputsPublished:
    return e.OutputsPublished(lease(key, attempt))


def unpublished(key: str, kind: FailureKind, attempt: int = 1) -> e.PublishFailed:
    return e.PublishFailed(lease(key, attempt), Failure(kind, "the store said no"))


def lost(name: str, incarnation: str = "1") -> e.BuilderLost:
    return e.BuilderLost(BuilderId(name), incarnation, f"node of {name} died")


def cancel(name: str) -> e.SubmissionCancelled:
    return e.SubmissionCancelled(SubmissionId(name))


def expire(name: str) -> e.SubmissionExpired:
    return e.SubmissionExpired(SubmissionId(name))


class Scene:
    """A farm whose every call is checked, journaled and told as lines of a trace."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits
        self.farm = Farm(limits)
        self.now = 0.0
        self.journal: list[Fact] = []
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(f"# {text}")

    def at(self, seconds: float) -> Scene:
        self.now = seconds
        return self

    def play(self, *events: e.Event) -> tuple[list[Fact], list[Effect]]:
        """Hand over one batch; return its facts and effects."""
        for event in events:
            self.lines.append(f"{self.now:7.2f} > {tell_event(event)}")
        facts, effects = self.farm.handle_many(events, Instant(self.now))
        invariants.check(self.farm.state)
        self.journal += facts
        self.lines += [f"            {tell(fact)}" for fact in facts]
        self.lines += [f"          ! {tell_effect(effect)}" for effect in effects]
        return facts, effects

    def wake(self) -> tuple[list[Fact], list[Effect]]:
        """Sleep until the farm's deadline and call it."""
        deadline = self.farm.deadline()
        assert deadline is not None
        self.now = deadline
        return self.play(e.TimePassed())

    def restart(self) -> list[Effect]:
        """Lose all but the journal and start anew."""
        before = self.farm
        self.farm = Farm(self.limits)
        self.farm.replay(self.journal)
        assert invariants.durable(self.farm.state) == invariants.durable(before.state)
        effects = self.farm.resume(Instant(self.now))
        self.lines.append(f"{self.now:7.2f} > the coordinator starts again and replays its journal")
        self.lines += [f"          ! {tell_effect(effect)}" for effect in effects]
        return effects

    def state(self, key: str) -> StepState:
        return self.farm.state.steps[StepKey(key)].state

    def states(self, *keys: str) -> list[str]:
        return [self.state(key).value for key in keys]


def tell_event(event: e.Event) -> str:  # noqa: C901, PLR0911, PLR0912  one line per event
    """One line about an event, for traces only."""
    match event:
        case e.SubmissionReceived():
            held = f", held {' '.join(event.held)}" if event.held else ""
            retried = "everything" if event.retry_failed else " ".join(event.retry)
            retry = f", retries {retried}" if retried else ""
            replaces = ", supersedes" if event.supersedes else ""
            verb = "is to run again:" if event.again else "is open and wants" if event.open else "wants"
            return f"submission {event.submission} {verb} {' '.join(event.roots)}{held}{retry}{replaces}"
        case e.SubmissionGrown():
            held = f", held {' '.join(event.held)}" if event.held else ""
            return f"submission {event.submission} wants {' '.join(event.roots)} too{held}"
        case e.SealAsked():
            return f"submission {event.submission} is to be sealed" + (
                f": {event.incomplete}" if event.incomplete else ""
            )
        case e.SubmissionCancelled():
            return f"submission {event.submission} is cancelled"
        case e.SubmissionExpired():
            return f"nobody asks for submission {event.submission} any more"
        case e.PriorityAsked():
            wanted = "a higher priority" if event.priority is None else f"priority {event.priority}"
            return f"submission {event.submission} is to have {wanted}"
        case e.RetryAsked():
            return f"a retry of {event.step} is asked for"
        case e.BuilderJoined():
            return f"builder {event.builder.id} joins ({event.builder.incarnation}), holds {_names(event.leases)}"
        case e.BuilderReported():
            return f"builder {event.builder} reports room for {event.capacity}, holds {_names(event.leases)}"
        case e.BuilderLost():
            return f"builder {event.builder} is lost: {event.reason}"
        case e.BuildSucceeded():
            return f"{_names((event.lease,))} succeeded on {event.builder}"
        case e.BuildFailed():
            return f"{_names((event.lease,))} failed on {event.builder}: {event.failure.kind}"
        case e.OutputsPublished():
            return f"{_names((event.lease,))} is published"
        case e.PublishFailed():
            return f"{_names((event.lease,))} could not be published: {event.failure.kind}"
        case e.ResultsHeld():
            return f"the cache has {' '.join(event.steps)}"
        case e.SpeedsMeasured():
            return f"the speeds of builders are measured: {len(event.speeds)}"
        case e.WorksEstimated():
            return f"works are estimated anew: {len(event.works)}"
        case e.TimePassed():
            return "time passes"


def _names(leases: Iterable[LeaseId]) -> str:
    return " ".join(f"{item.step}@{item.attempt}" for item in leases) or "nothing"
