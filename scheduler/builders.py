"""Builders as the core knows them: what they offer, hold and are suspected of, and which may get leases.

Written by `FarmState.evolve` alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler import facts as f
from scheduler.early import is_follower
from scheduler.ended_leases import EndedLeases
from scheduler.failures import CONSEQUENCES, is_fault, suspects_recipe
from scheduler.locality import LEAST_BYTES, arrive
from scheduler.model import NO_INSTANT, BuilderId, BuilderSpec, Failure, ImpossibleError, Instant, StepKey, StepState
from scheduler.ready import ReadyIndex
from scheduler.records import NO_BUILDER, NO_SPEEDS, SUSPICIONS, Builder, Step

#: Builders removed for silence that are remembered; the longest gone are forgotten first.
SILENT = 1024


class Builders:
    """All builders with their leases; `known` is shared with the index of ready steps."""

    __slots__ = ("_rates", "_ready", "_speeds", "ended", "free", "known", "quarantined", "silent")

    def __init__(self, known: dict[BuilderId, Builder], ready: ReadyIndex) -> None:
        self._ready = ready
        self.ended = EndedLeases()
        #: As they were last measured, also of builders that are not here.
        self._speeds: dict[BuilderId, dict[str, float]] = {}
        self._rates: dict[BuilderId, int] = {}
        #: By their last report, the oldest first.
        self.known = known
        #: Exactly the builders that are `willing` and have `free > 0`.
        self.free: dict[BuilderId, Builder] = {}
        #: Builders removed for silence, which their next heartbeat brings back; at most `SILENT`.
        self.silent: dict[BuilderId, BuilderSpec] = {}
        #: Builders that get no new leases for now.
        self.quarantined: dict[BuilderId, Builder] = {}

    def lease(self, step: Step, id_: BuilderId, at: Instant) -> None:
        """Give a builder a lease; one that is known only from a journal becomes known."""
        builder = self.known.get(id_)
        if builder is None:
            builder = self.known[id_] = Builder(id_, at)
        builder.leases[step.key] = step
        if step.follows and is_follower(step):
            builder.followers[step.key] = step
        else:
            builder.memory_bytes += step.memory_bytes
            builder.free -= 1
            if builder.free <= 0:
                self.free.pop(builder.id, None)
        builder.moves += 1
        for need in step.needs:
            if need.output_bytes >= LEAST_BYTES:
                arrive(step, builder.place)
                break

    def has_built(self, step: Step, id_: BuilderId) -> None:
        """Clear a builder that has built something; faults of others with that step are theirs now."""
        builder = self.known[id_]
        if builder.strikes or builder.level or builder.suspicions:
            builder.strikes, builder.suspicions, builder.level = {}, {}, 0
            builder.probation = False
            self._offer(builder, builder.offered)
        if step.faults:
            for other in self.known.values():
                if step.key in other.suspicions:
                    self._strike(other, step.key, other.suspicions.pop(step.key))

    def end_lease(self, step: Step, at: Instant) -> None:
        """Take the lease of a step, built or published, from its builder; nothing where it has none."""
        if not step.builder:
            return
        holder = self.known.get(step.builder)
        spec = None if holder is None else holder.spec
        self.ended.add(step.key, step.attempt, step.builder, "" if spec is None else spec.incarnation, at)
        if step.state is StepState.LEASED:
            self.free_slot(step)
        step.builder = NO_BUILDER

    def free_slot(self, step: Step) -> None:
        """Take a built step from its builder, which may build another."""
        builder = self.known[step.builder]
        del builder.leases[step.key]
        if not builder.followers or builder.followers.pop(step.key, None) is None:
            builder.memory_bytes -= step.memory_bytes
            builder.free += 1
        builder.moves += 1
        if builder.free > 0 and builder.willing:
            self.free[builder.id] = builder

    def take_place(self, step: Step, at: Instant) -> None:
        """Let a follower begin, whose last need was built: it counts as any lease from now on."""
        builder = self.known[step.builder]
        del builder.followers[step.key]
        builder.memory_bytes += step.memory_bytes
        builder.free -= 1
        builder.moves += 1
        step.asked_at = max(step.asked_at, at)
        self._count_slots(builder)

    def _offer(self, builder: Builder, capacity: int) -> None:
        """Note the leases that a builder may hold, and what its queues can do with these."""
        if builder.capacity != capacity:
            builder.free += capacity - builder.capacity
            builder.capacity = capacity
            for queue in builder.queues:
                queue.measure_power()

    def _count_slots(self, builder: Builder) -> None:
        if builder.free > 0 and builder.willing:
            self.free[builder.id] = builder
        else:
            self.free.pop(builder.id, None)

    def blame(self, step: Step, failure: Failure) -> None:
        """Hold a fault against the builder of the step's lease, or remember that it may have to be."""
        builder = self.known[step.builder]
        # One known only from the journal has not joined: its past is forgotten.
        if builder.spec is None or not CONSEQUENCES[failure.kind].blames_builder:
            return
        if not suspects_recipe(failure):
            self._strike(builder, step.key, failure.message)
        elif step.key not in builder.strikes:
            builder.suspicions.pop(step.key, None)
            builder.suspicions[step.key] = failure.message
            if len(builder.suspicions) > SUSPICIONS:
                del builder.suspicions[next(iter(builder.suspicions))]

    def _strike(self, builder: Builder, step: StepKey, message: str) -> None:
        builder.strikes[step] = None
        builder.trouble = message

    def acquit(self, step: Step, failure: Failure) -> None:
        """A step is at fault itself: no builder is suspected for its sake any more."""
        if step.faults and not is_fault(failure.kind):
            for builder in self.known.values():
                builder.suspicions.pop(step.key, None)

    def admitted(self, fact: f.BuilderAdmitted) -> None:
        """Take in what a builder that joined offers and holds."""
        spec = fact.builder
        self.silent.pop(spec.id, None)
        builder = self.known.pop(spec.id, None) or Builder(spec.id, fact.at)
        self.known[spec.id] = builder
        changed = builder.spec != spec
        if builder.spec is None or builder.spec.incarnation != spec.incarnation:
            builder.forget_store()
            builder.collections, builder.since = 0, fact.at
        builder.spec, builder.speeds = spec, self._speeds.get(spec.id, NO_SPEEDS)
        builder.fetch_rate = self._rates.get(spec.id, 0)
        self._heard(builder, fact)
        if changed:
            self._ready.rematch()

    def refreshed(self, fact: f.BuilderRefreshed) -> None:
        """Take in a heartbeat."""
        builder = self.known.pop(fact.builder)
        self.known[fact.builder] = builder
        if builder.collections != fact.collections:
            builder.collections = fact.collections
            builder.forget_store()
        self._heard(builder, fact)

    def _heard(self, builder: Builder, fact: f.BuilderAdmitted | f.BuilderRefreshed) -> None:
        builder.heard = fact.at
        builder.offered = fact.capacity
        self._offer(builder, min(fact.capacity, 1) if builder.probation else fact.capacity)
        if builder.draining is not fact.draining or builder.unfit != fact.unfit:
            builder.draining, builder.unfit = fact.draining, fact.unfit
            self._ready.rematch()
        self._count_slots(builder)
        for lease in fact.missing:
            step = builder.leases[lease.step]
            step.asked_at = fact.at
            step.resends += 1

    def quarantine(self, fact: f.BuilderQuarantined) -> None:
        """Give a builder no new leases for a while."""
        builder = self.quarantined[fact.builder] = self.known[fact.builder]
        builder.until, builder.level, builder.reason = fact.until, fact.level, fact.reason
        builder.for_unfitness, builder.probation = fact.for_unfitness, True
        self._offer(builder, min(builder.offered, 1))
        self._count_slots(builder)
        self._ready.rematch()

    def end_quarantine(self, fact: f.QuarantineEnded) -> None:
        """Trust a builder again, with one lease at first."""
        builder = self.quarantined.pop(fact.builder)
        builder.until = NO_INSTANT
        builder.strikes, builder.suspicions = {}, {}
        self._count_slots(builder)
        self._ready.rematch()

    def rated(self, fact: f.BuildersRated) -> None:
        """Take in how fast builders are."""
        self._speeds = {}
        for id_, system, speed in fact.speeds:
            self._speeds.setdefault(id_, {})[system] = speed
        self._rates = dict(fact.fetch_rates)
        for builder in self.known.values():
            builder.speeds = self._speeds.get(builder.id, NO_SPEEDS)
            builder.fetch_rate = self._rates.get(builder.id, 0)
            builder.moves += 1
        self._ready.rematch()

    def removed(self, fact: f.BuilderRemoved) -> None:
        """Forget a builder; one that was removed for silence may come back by itself."""
        self.silent.pop(fact.builder, None)
        builder = self.known.pop(fact.builder, None)
        self.free.pop(fact.builder, None)
        self.quarantined.pop(fact.builder, None)
        if builder is None:
            return
        builder.place.is_known = False
        if builder.leases:
            raise ImpossibleError(f"builder {fact.builder} is removed with open leases")
        if fact.silent and builder.spec is not None:
            self.silent[fact.builder] = builder.spec
            if len(self.silent) > SILENT:
                del self.silent[next(iter(self.silent))]
        self._ready.rematch()

    def restored(self, id_: BuilderId, heard: Instant, leases: Iterable[Step]) -> None:
        """Take in a builder of a snapshot with its leases, oldest first."""
        builder = self.known[id_] = Builder(id_, heard)
        builder.leases = {step.key: step for step in leases}
        builder.memory_bytes = sum([step.memory_bytes for step in builder.leases.values()])
        builder.free = -len(builder.leases)

    def resumed(self, at: Instant) -> None:
        """Start the time of all leases anew; forget the builders of a journal that have none."""
        for builder in tuple(self.known.values()):
            if builder.spec is None and not builder.leases:
                del self.known[builder.id]
                continue
            builder.heard = at
            builder.moves += 1
            builder.forget_store()
            for step in builder.leases.values():
                step.asked_at = at
