"""Rules for builders: joining, heartbeats, loss, quarantine. Yields facts, changes nothing.

Quarantine: a builder that is to blame for the ends of several steps' leases, or that calls itself unfit, gets nothing
new for a growing while. It comes back by itself, on probation: one lease at a time until one is built, and
one more fault sends it back for longer. What it runs goes on. Nothing of this is durable: builders join anew.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator

from scheduler import events as e
from scheduler import facts as f
from scheduler.model import BuilderId, Failure, FailureKind, Instant, LeaseId, StepState
from scheduler.pauses import PAUSE, PIECE, Pause, picked, unique
from scheduler.policy import Limits, Policy
from scheduler.records import Builder, Step
from scheduler.state import FarmState
from scheduler.step_rules import StepRules

_OPEN = (StepState.LEASED, StepState.PUBLISHING)


class BuilderRules:
    """The decisions about builders."""

    __slots__ = ("_limits", "_policy", "_state", "_step_rules")

    def __init__(self, state: FarmState, limits: Limits, policy: Policy, step_rules: StepRules) -> None:
        self._state = state
        self._limits = limits
        self._policy = policy
        self._step_rules = step_rules

    def joined(self, event: e.BuilderJoined, now: Instant) -> Iterator[f.FactOrPause]:
        """Admit a builder, and square the leases it names with those it should hold."""
        spec = event.builder
        builder = self._state.builders.get(spec.id)
        if builder is not None and builder.spec is not None and builder.spec.incarnation != spec.incarnation:
            listed = frozenset(event.leases)
            failure = Failure(FailureKind.WORKER_LOST, f"{spec.id} started anew")
            for step in tuple(builder.leases.values()):
                if step.lease not in listed and step.key in builder.leases:
                    yield from self._step_rules.retry(step, failure, now)
        missing = yield from self._missing(builder, event.leases, now)
        unknown = yield from self._unknown(spec.id, event.leases)
        yield f.BuilderAdmitted(spec, event.capacity, now, missing, unknown, event.draining, event.unfit)
        yield from self.judge(spec.id, now)

    def reported(self, event: e.BuilderReported, now: Instant) -> Iterator[f.FactOrPause]:
        """Take a heartbeat; one of a builder that was removed for silence brings it back."""
        builder = self._state.builders.get(event.builder)
        if builder is None or builder.spec is None:
            silent = self._state.silent.get(event.builder)
            if silent is not None and silent.incarnation == event.incarnation:
                again = e.BuilderJoined(silent, event.capacity, event.leases, event.draining, event.unfit)
                yield from self.joined(again, now)
            return
        if builder.spec.incarnation != event.incarnation:
            return
        missing = yield from self._missing(builder, event.leases, now)
        unknown = yield from self._unknown(event.builder, event.leases)
        yield f.BuilderRefreshed(
            *(event.builder, event.capacity, now, missing, unknown, event.draining, event.unfit, event.collections)
        )
        if builder.strikes or builder.until or event.unfit:
            yield from self.judge(event.builder, now)

    def refreshes(self, event: e.BuilderReported, built: Collection[e.BuildSucceeded], now: Instant) -> bool:
        """Return whether a heartbeat says nothing but that its builder is there: it lacks none but those `built`."""
        builder = self._state.builders.get(event.builder)
        if builder is None or builder.spec is None or builder.spec.incarnation != event.incarnation:
            return False
        # What it has ended it names no more.
        ended = {each.lease for each in built if each.builder == builder.id}
        names = ended.union(event.leases)
        return all(step.lease in names or not self._is_overdue(builder, step, now) for step in builder.leases.values())

    def _is_overdue(self, builder: Builder, step: Step, now: Instant) -> bool:
        return builder.spec is None or now - step.asked_at >= self._limits.start_grace_s

    def lost(self, event: e.BuilderLost, now: Instant) -> Iterator[f.FactOrPause]:
        """Remove a builder whose incarnation is confirmed to be gone."""
        builder = self._state.builders.get(event.builder)
        if builder is None:
            silent = self._state.silent.get(event.builder)
            if silent is not None and silent.incarnation == event.incarnation:
                yield f.BuilderRemoved(event.builder, event.reason, now)
        elif builder.spec is not None and builder.spec.incarnation == event.incarnation:
            yield from self._remove(builder, event.reason, now, silent=False)

    def due(self, now: Instant) -> Iterator[f.FactOrPause]:
        """Yield what the passing of time decides: silent builders, quarantines that ended."""
        state = self._state
        while state.builders:
            builder = next(iter(state.builders.values()))
            if builder.heard + self._limits.lease_ttl_s > now:
                break
            reason = f"no word from {builder.id} for {self._limits.lease_ttl_s:.0f} s"
            yield from self._remove(builder, reason, now, silent=True)
        if state.quarantined:
            for builder in tuple(state.quarantined.values()):
                if builder.until <= now:
                    yield f.QuarantineEnded(builder.id)
                    yield from self.judge(builder.id, now)

    def deadline(self) -> Iterator[Instant]:
        """Yield the instant at which `due` may next yield a fact."""
        for builder in self._state.builders.values():
            yield Instant(builder.heard + self._limits.lease_ttl_s)
            break
        for builder in self._state.quarantined.values():
            yield builder.until

    def judge(self, id_: BuilderId, now: Instant) -> Iterator[f.FactOrPause]:
        """Begin a quarantine where one is due, end one for unfitness where the builder is fit again."""
        builder = self._state.builders.get(id_)
        if builder is None or builder.spec is None:
            return
        if builder.until:
            if builder.for_unfitness and not builder.unfit:
                yield f.QuarantineEnded(id_)
            return
        if builder.unfit:
            reason = builder.unfit
        elif len(builder.strikes) >= (1 if builder.probation else self._limits.quarantine_after):
            many = len(builder.strikes)
            which = "another build" if builder.probation else f"{many} builds in a row" if many > 1 else "a build"
            reason = f"{which} ended by a fault that is not its own: {builder.trouble}"
        else:
            return
        level = builder.level + 1
        until = Instant(now + self._policy.quarantine_s(id_, level))
        yield f.BuilderQuarantined(id_, reason, until, level, bool(builder.unfit))

    def judge_others(self, but: BuilderId, now: Instant) -> Iterator[f.FactOrPause]:
        """Judge the builders that have strikes: another one has built a step that failed on some of them."""
        for builder in tuple(self._state.builders.values()):
            if builder.strikes and builder.id != but:
                yield from self.judge(builder.id, now)

    def _missing(
        self, builder: Builder | None, listed: tuple[LeaseId, ...], now: Instant
    ) -> Generator[f.FactOrPause, None, tuple[LeaseId, ...]]:
        """Return the leases to hand over again; one that was handed over too often is revoked.

        A builder known only from the journal gets its orders at once: its leases may never have been handed over.
        """
        if builder is None or not builder.leases:
            return ()
        names = yield from unique((lease.step, lease.attempt) for lease in listed)
        missing: list[LeaseId] = []
        for count, step in enumerate(tuple(builder.leases.values()), 1):
            if not count % PIECE:
                yield PAUSE
            overdue = self._is_overdue(builder, step, now)
            if (step.key, step.attempt) in names or not overdue or step.key not in builder.leases:
                continue
            if step.resends >= self._limits.start_resends:
                message = f"{builder.id} was told {step.resends + 1} times to start and does not hold the lease"
                yield from self._step_rules.retry(step, Failure(FailureKind.INFRASTRUCTURE, message), now)
            else:
                missing.append(step.lease)
        # A revocation above may have ended others (a step that failed dooms what stands on it).
        return tuple(lease for lease in missing if lease.step in builder.leases)

    def _unknown(self, builder: BuilderId, listed: tuple[LeaseId, ...]) -> Generator[Pause, None, tuple[LeaseId, ...]]:
        """Return the leases a builder names without a right. One being published may be named until acknowledged."""
        steps = self._state.steps

        def has(lease: LeaseId) -> bool:
            step = steps.get(lease.step)
            return step is not None and (step.attempt, step.builder) == (lease.attempt, builder) and step.state in _OPEN

        return (yield from picked(listed, lambda piece: [lease for lease in piece if not has(lease)]))

    def _remove(self, builder: Builder, reason: str, now: Instant, *, silent: bool) -> Iterator[f.FactOrPause]:
        failure = Failure(FailureKind.WORKER_LOST, reason)
        # All at once: to find the first of a dictionary whose front is gone costs as much as that front.
        for step in tuple(builder.leases.values()):
            if step.key in builder.leases:
                yield from self._step_rules.retry(step, failure, now)
        yield f.BuilderRemoved(builder.id, reason, now, silent)
