"""Explainer of waiting steps: turns the core's reasons into sentences and wire values, and reads last lines of logs.

The core names builders; what is shown names workers.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import assert_never

from coordinator.api.models import StepStatus, WaitingKind, WaitingView
from coordinator.api.questions import CandidateView, CostView, EstimateSource, PlacingView
from coordinator.readmodel.rows import StepRow
from coordinator.stores.logs import LogStore
from infra.clock import Clock
from scheduler import reasons as r
from scheduler.farm import Farm
from scheduler.forsaken import describe_unserved
from scheduler.model import FAR_OFF, NO_INSTANT, Instant, Requirements, StepKey

#: Needs of one step that are looked at.
NEEDS_LOOKED_AT = 256
#: Dependents that are looked at for one that waits: a compiler has tens of thousands.
DEPENDENTS_LOOKED_AT = 64
#: The last second that a date can name.
_LAST_INSTANT = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


#: By name, system and features of a derivation, and by its step.
SourceOf = Callable[[str, str, Sequence[str], str], tuple[EstimateSource, int]]
CostsOf = Callable[[str, str, Sequence[str]], tuple[CostView, ...]]


class FarmExplainer:
    """`coordinator.readmodel.views.Explainer` over a farm and its logs. `name_of` gives a step's name, or nothing."""

    def __init__(self, farm: Farm, logs: LogStore, clock: Clock) -> None:
        self._farm = farm
        self._logs = logs
        self._clock = clock
        #: Gives what a derivation's expected work is taken from, by name, system and features, and of how many builds;
        #: and what else is expected of it.
        self.source: SourceOf = lambda _name, _system, _features, _step: ("nothing", 0)
        self.costs: CostsOf = lambda _name, _system, _features: ()

    def placing(self, step: StepKey, name: str, system: str) -> PlacingView | None:
        """Return how urgent a step is and where it would be built; None for one that the core does not know."""
        try:
            found = self._farm.considered(step, Instant(self._clock.now()))
        except KeyError:
            return None
        features, held = self._farm.features_of(step), found.held
        source, builds = self.source(name, system, features, step)
        return PlacingView(
            rank_s=found.rank_ms / 1000,
            takes_s=found.work_ms / 1000,
            source=source,
            builds=builds,
            candidates=tuple(
                [
                    CandidateView(
                        worker=each.builder,
                        state=each.standing.value,
                        speed=each.speed,
                        leases=each.leases,
                        capacity=each.capacity,
                        room_at=_known_instant(each.room_at),
                        ends_at=_known_instant(each.ends_at),
                        here_bytes=each.here_bytes,
                        missing_bytes=each.missing_bytes,
                        fetch_s=each.fetch_s,
                    )
                    for each in found.candidates
                ]
            ),
            count=found.count,
            waits_for="" if held is None else held.builder,
            waits_since=0.0 if held is None else held.since,
            waits_until=0.0 if held is None else held.until,
            memory_bytes=found.memory_bytes,
            output_bytes=found.output_bytes,
            costs=self.costs(name, system, features),
        )

    def waiting(self, step: StepKey, name_of: Callable[[StepKey], str]) -> tuple[str, WaitingView | None]:
        """Return why a step does not run."""
        now = Instant(self._clock.now())
        try:
            reason = self._farm.why(step, now)
        except KeyError:
            reason = None
        if reason is None:
            return "", None
        return sentence_of(reason, now, name_of), value_of(reason)

    def unschedulable(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:
        """Return a sentence for each class of ready steps (counted by requirements) that no worker can take."""
        if not ready:
            return ()
        classes = self._farm.unserved()
        # Several classes may wait for the same thing; it is said once.
        counts: dict[str, int] = {}
        for requirements, count in ready.items():
            if requirements in classes:
                why = describe_unserved(classes[requirements])
                counts[why] = counts.get(why, 0) + count
        return tuple(f"{_steps(count)}: {why}" for why, count in counts.items())

    def queued(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:
        """Return a sentence for each class of ready steps (counted by requirements) that a worker could take."""
        if not ready:
            return ()
        now, reasons = Instant(self._clock.now()), self._farm.queue_reasons()
        sentences = []
        for requirements, count in ready.items():
            reason = reasons.get(requirements)
            if not isinstance(reason, r.Unserved):
                why = "tried again after a pause" if reason is None else queue_sentence(reason, now)
                sentences.append(f"{_steps(count)} for {requirements.system}: {why}")
        return tuple(sentences)

    def queues(self) -> dict[Requirements, str]:
        """Return what each class of ready steps waits for; a class whose steps all back off is absent."""
        now = Instant(self._clock.now())
        return {wanted: queue_sentence(reason, now) for wanted, reason in self._farm.queue_reasons().items()}

    def holding(self) -> dict[Requirements, WaitingKind]:
        """Return the kind of what holds each class of ready steps; a class whose steps all back off is absent."""
        return {wanted: value_of(reason).kind for wanted, reason in self._farm.queue_reasons().items()}

    def unmet(self, step: StepKey) -> int:
        """Return how many needs of a step are not done."""
        return self._farm.unmet(step)

    def open_needs(self, step: StepKey) -> Sequence[StepKey]:
        """Return some of the needs of a wanted step that are not done."""
        return self._farm.open_needs(step, NEEDS_LOOKED_AT)

    def above(self, step: StepKey) -> Sequence[StepKey]:
        """Return some of the wanted steps that need this one, those nearest to a root first."""
        return self._farm.above(step, DEPENDENTS_LOOKED_AT)

    def log_tail(self, step: StepKey, attempt: int) -> str:
        """Return the last lines of an attempt's log."""
        return self._logs.tail(step, attempt)


def no_log(row: StepRow) -> str:
    """Return the sentence that says why a step that was never leased has no log, and what to do."""
    match row.state:
        case StepStatus.DONE:
            return f"step {row.key} was not built here, because the cache had it, so there is no log."
        case StepStatus.DOOMED:
            return (
                f"step {row.key} cannot be built, because a step that it stands on failed: "
                f"`drover log {shlex.quote(row.life.cause)}` shows why."
            )
        case _:
            return f"step {row.key} has not been started yet, so there is no log; `drover why` says what it waits for."


def attempts(row: StepRow) -> str:
    """Return how many attempts a step had, in words."""
    return f"{row.life.attempt} attempt{'' if row.life.attempt == 1 else 's'}"


def _steps(count: int) -> str:
    return f"{count} {'step waits' if count == 1 else 'steps wait'}"


def sentence_of(  # noqa: C901, PLR0911, PLR0912  one way for each reason
    reason: r.Reason, now: Instant, name_of: Callable[[StepKey], str]
) -> str:
    """Return the sentence for a reason at `now`; `name_of` gives a step's name, or nothing."""
    match reason:
        case r.WaitsForSteps():
            return f"waits for {_names(reason.count, reason.examples, name_of)}"
        case r.FollowsSteps():
            names = _names(reason.count, reason.examples, name_of)
            if reason.built:
                return f"is built, and is published after {names}"
            return f"begins on worker {reason.builder} as soon as that has built {names}"
        case r.NotWanted():
            return "no submission stands on it now"
        case r.BuildersFull(workers):
            who = f"all {len(workers)} workers that could are" if len(workers) > 1 else None
            who = who or f"worker {workers[0]}, the only one, is"
            return f"{who} full; {_place(reason.position, reason.ready)} in the queue"
        case r.LimitReached(workers):
            who = f"worker {', '.join(workers)} takes one step at a time after its failures"
            return f"{who}; {_place(reason.position, reason.ready)}"
        case r.BuildersQuarantined(workers):
            wait = f"for {max(0.0, reason.until - now):.0f} s"
            return f"worker {', '.join(workers)} gets no work {wait}: {reason.reason}"
        case r.BuildersDraining(workers):
            return f"worker {', '.join(workers)} is draining"
        case r.WaitsForFaster():
            room = f"is expected to have room in {max(0.0, reason.until - now):.0f} s"
            return f"waits for worker {reason.builder}, which {room} and ends it earlier than those that have some now"
        case r.WaitsForMemory():
            asked = f"asks for {reason.memory_bytes / 2**30:.1f} GiB of memory, which no worker with room has now"
            return f"{asked}; worker {reason.builder} should have it in {max(0.0, reason.until - now):.0f} s"
        case r.BacksOff():
            return f"tried again in {max(0.0, reason.until - now):.0f} s after {reason.failures} failures"
        case r.RetriesSpent():
            wait = f"tried again in {max(0.0, reason.until - now):.0f} s"
            return f"{wait}: too many attempts of its submission failed within the hour"
        case r.KnownToFail():
            name = name_of(reason.cause) or reason.cause
            return f"{name} is known to fail; build it again: drover retry {reason.cause}"
        case r.NoBuilderJoined() | r.NoBuilderOffersSystem() | r.NoBuilderOffersFeatures() | r.OnlyReservedBuilders():
            return f"{describe_unserved(reason)}; it waits for one {_until(reason.until)}"
        case _:
            assert_never(reason)


def _names(count: int, examples: Sequence[StepKey], name_of: Callable[[StepKey], str]) -> str:
    more = f" and {count - len(examples)} more" if count > len(examples) else ""
    return ", ".join(name_of(key) or key for key in examples) + more


def queue_sentence(reason: r.Unserved | r.Busy, now: Instant) -> str:
    """Return the sentence for what a whole class of ready steps waits for."""
    match reason:
        case r.BuildersFull(workers) if len(workers) > 1:
            return f"all {len(workers)} workers that could are full"
        case r.BuildersFull(workers):
            return f"worker {workers[0]}, the only one that could, is full"
        case r.LimitReached(workers):
            return f"worker {', '.join(workers)} takes one step at a time after its failures"
        case r.BuildersQuarantined() | r.BuildersDraining() | r.WaitsForFaster() | r.WaitsForMemory():
            return sentence_of(reason, now, str)
        case _:
            return describe_unserved(reason)


def _place(position: int, ready: int) -> str:
    return f"number {position} of {ready}" if position else f"one of {ready}"


def value_of(reason: r.Reason) -> WaitingView:  # noqa: C901, PLR0911, PLR0912  one way for each reason
    """Return what programs read of a reason."""
    match reason:
        case r.WaitsForSteps():
            return WaitingView(kind="steps", count=reason.count, steps=reason.examples)
        case r.FollowsSteps():
            return WaitingView(kind="follows", count=reason.count, steps=reason.examples, workers=(reason.builder,))
        case r.NotWanted():
            return WaitingView(kind="not_wanted")
        case r.NoBuilderJoined():
            return WaitingView(kind="no_worker", until=reason.until)
        case r.NoBuilderOffersSystem():
            return WaitingView(kind="no_system", system=reason.system, until=reason.until)
        case r.NoBuilderOffersFeatures():
            features, until = reason.missing, reason.until
            return WaitingView(kind="no_feature", system=reason.system, features=features, until=until)
        case r.OnlyReservedBuilders():
            return WaitingView(kind="reserved", workers=reason.builders, until=reason.until)
        case r.BuildersFull() | r.LimitReached():
            kind: WaitingKind = "slots" if isinstance(reason, r.BuildersFull) else "limit"
            workers = reason.builders[: r.NAMED]
            return WaitingView(kind=kind, workers=workers, position=reason.position, count=reason.ready)
        case r.BuildersQuarantined():
            return WaitingView(kind="quarantined", workers=reason.builders, until=reason.until, reason=reason.reason)
        case r.BuildersDraining():
            return WaitingView(kind="draining", workers=reason.builders)
        case r.WaitsForFaster():
            return WaitingView(kind="faster", workers=(reason.builder,), since=reason.since, until=reason.until)
        case r.WaitsForMemory():
            return WaitingView(
                kind="memory",
                workers=(reason.builder,),
                since=reason.since,
                until=reason.until,
                memory_bytes=reason.memory_bytes,
            )
        case r.BacksOff():
            return WaitingView(kind="back_off", until=reason.until, count=reason.failures)
        case r.RetriesSpent():
            return WaitingView(kind="retries_spent", until=reason.until)
        case r.KnownToFail():
            return WaitingView(kind="known_failure", steps=(reason.cause,), since=reason.since, until=reason.until)


def _known_instant(instant: Instant) -> float:
    return NO_INSTANT if instant >= FAR_OFF else instant


def _until(instant: Instant) -> str:
    if not instant:
        return "for ever"
    return f"until {datetime.fromtimestamp(min(instant, _LAST_INSTANT), UTC):%Y-%m-%d %H:%M:%S} UTC"
