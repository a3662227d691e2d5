"""The whole core behind one object: events in, facts and effects out, one deadline.

The engine appends the durable facts of a call in one commit and then runs the effects. If the append fails it must
exit and replay: the state here is already ahead of the journal.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

from scheduler.considered import Considered, considered
from scheduler.decide import Decider
from scheduler.effects import Effect
from scheduler.events import BuilderReported, BuildSucceeded, Event, OutputsPublished
from scheduler.facts import Fact, FactOrPause, FarmResumed, MembersJoined, StepReady, StepWaiting
from scheduler.model import NO_INSTANT, BuilderId, Instant, LeaseId, Requirements, StepKey, StepState, SubmissionId
from scheduler.opening import Opening
from scheduler.pauses import FACTS_PIECE, PAUSE, PIECE, Pause, whole
from scheduler.placement import Rooms
from scheduler.policy import Limits, LongestPathFirst, Policy
from scheduler.react import REACTIONS, react
from scheduler.reasons import (
    Busy,
    QueuePositions,
    Reason,
    Unserved,
    queue_reasons,
    unserved_classes,
    why,
)
from scheduler.records import Step
from scheduler.resource_limits import ResourceLimits, in_force
from scheduler.snapshot import tell_all
from scheduler.state import FarmState
from scheduler.succession import handing_back

#: Work of one call, with what it gives in the end.
Handling = Generator[Pause, None, tuple[list[Fact], list[Effect]]]


class Farm:
    """The pure scheduler. Not safe for use by several threads; it holds no clock: `now` is in epoch seconds."""

    def __init__(self, limits: Limits | None = None, policy: Policy | None = None) -> None:
        policy = LongestPathFirst() if policy is None else policy
        self._limits = Limits() if limits is None else limits
        #: For reading only.
        self.state = FarmState(policy.rank, policy.weight)
        self._queue_positions = QueuePositions(self.state)
        self._opening = Opening(self.state)
        #: Queues are being swept, in pieces.
        self._sweeps = False
        self._decider = Decider(self.state, self._limits, policy, self._opening.around)

    def handle(self, event: Event, now: Instant) -> tuple[list[Fact], list[Effect]]:
        """Take one event in; return what was decided and what must now be done, both in order.

        Raises `SubmissionRefusedError` for a submission whose graph is not closed or runs in a circle; nothing has
        changed then. Any other `ImpossibleError` is a bug, and the state must be thrown away for a replay.
        """
        return self.handle_many((event,), now)

    def handle_many(self, events: Iterable[Event], now: Instant) -> tuple[list[Fact], list[Effect]]:
        """Take a batch in, in order, and grant leases once at its end; otherwise as `handle`.

        A refused submission loses the facts of the events before it: hand submissions over one by one.
        """
        return whole(self.handling(events, now))

    def handling(self, events: Iterable[Event], now: Instant, *, grant: bool = True) -> Handling:
        """Do the work of `handle_many`, with pauses, so that an event of many steps does not hold up the loop.

        Between the pauses callers may read the farm (`why`, `unserved`), and it takes nothing else in but `passing`.
        Without `grant` no lease is granted, and time does not pass: a later call does both.
        """
        facts: list[Fact] = []
        effects: list[Effect] = []
        decider = self._decider
        self._queue_positions.forget()
        decided = decider.decide(events, now)
        yield from self._take(chain(decided, decider.due(now)) if grant else decided, now, facts, effects)
        if grant:
            if self.state.ready.crowded:
                self._sweeps = True
                yield from self.state.ready.sweeping()
                self._sweeps = False
            yield from self._take(decider.grants.grant(now), now, facts, effects)
            if now >= decider.grants.ahead.look_at:
                yield from decider.grants.ahead.look(now, effects)
        # Those that were computed at a pause are of a state that is gone.
        self._queue_positions.forget()
        return facts, effects

    @property
    def lets_pass(self) -> bool:
        """True if what `may_pass` may be taken in with `passing`, between two calls or at this pause of one."""
        return self._opening.lets_pass and not (self._sweeps or self.state.ready.buried)

    def may_pass(self, events: Sequence[Event], now: Instant) -> bool:
        """Return whether events tell the ends of builds and that builders are there, and nothing that has failed."""
        built = [event for event in events if isinstance(event, BuildSucceeded)]
        return all(
            self._decider.refreshes(event, built, now)
            if isinstance(event, BuilderReported)
            else isinstance(event, BuildSucceeded | OutputsPublished)
            for event in events
        )

    def passing(self, events: Iterable[Event], now: Instant) -> tuple[list[Fact], list[Effect]]:
        """Take in events that `may_pass` at a pause of `handling`, as if they had come before all that it does.

        Their facts may go to the journal before those of that call, and have the same state follow. Leases are granted
        where the submission that is taken in stands on nothing yet.
        """
        facts: list[Fact] = []
        effects: list[Effect] = []
        turned, self.state.turned[:] = list(self.state.turned), ()
        whole(self._take(self._decider.decide(events, now), now, facts, effects))
        if self._opening.lets_grant:
            whole(self._take(self._decider.grants.grant(now), now, facts, effects))
        self.state.turned[:] = turned
        return facts, effects

    def _take(  # noqa: C901  the core's innermost loop
        self, decided: Iterable[FactOrPause], now: Instant, facts: list[Fact], effects: list[Effect]
    ) -> Generator[Pause, None, None]:
        state = self.state
        turned, joined, discarded, buried = state.turned, state.joined, state.ready.discarded, state.ready.buried
        apply, reaction_to = state.apply, REACTIONS.get
        until_pause = FACTS_PIECE
        successors = state.early.successors
        for fact in decided:
            if fact is PAUSE:
                yield PAUSE
                continue
            if successors:
                yield from self._take(handing_back(state, fact, now), now, facts, effects)
            rest = apply(fact)
            if rest is not None:
                yield from rest
            if buried:
                yield from state.ready.pruning()
            facts.append(fact)
            if turned or joined:
                if joined or len(turned) > PIECE:
                    yield from self._telling(now, facts)
                else:
                    for step in turned:
                        facts.append(_turning(step, now))  # noqa: PERF401  most are one, for which a list takes longer
                    turned.clear()
            reaction = reaction_to(type(fact))
            if reaction is not None:
                effects += reaction(state, fact)
            if discarded:
                # That takes as long as many facts.
                state.ready.shed()
                until_pause = 1
            until_pause -= 1
            if not until_pause or state.edges_changed >= PIECE:
                until_pause, state.edges_changed = FACTS_PIECE, 0
                yield PAUSE

    def _telling(self, now: Instant, facts: list[Fact]) -> Iterator[Pause]:
        for count, derived in enumerate(self._derived(now), 1):
            facts.append(derived)
            if not count % PIECE:
                yield PAUSE

    def _derived(self, at: Instant) -> Iterator[Fact]:
        """Yield what `evolve` has derived since the last call, as facts."""
        state = self.state
        for step, members in state.joined:
            yield MembersJoined(step.key, tuple([member.key for member in members]))
        state.joined.clear()
        for step in state.turned:
            yield _turning(step, at)
        state.turned.clear()

    def deadline(self) -> Instant | None:
        """Return when to call again at the latest, with `TimePassed` if nothing else happens; None for never."""
        return self._decider.deadline()

    def snapshot(self) -> list[Fact]:
        """Return facts that rebuild the durable state when they are replayed into a new farm.

        They stand for the whole journal so far: replaying them and what was appended since gives what replaying
        everything gives. The facts are immutable and no longer part of the state: they may be encoded later, elsewhere.
        """
        return list(tell_all(self.state))

    def replay(self, facts: Iterable[Fact]) -> None:
        """Take in the facts of a journal, in order; those that are not durable are passed over.

        A journal may begin with a snapshot. Raises `ImpossibleError` for a journal that contradicts itself.
        """
        for _ in self.replaying(facts):
            pass

    def replaying(self, facts: Iterable[Fact]) -> Iterator[Fact]:
        """Do the work of `replay`; yield each durable fact once it is taken in, then what the state derived from it."""
        state = self.state
        turned, joined = state.turned, state.joined
        newest = NO_INSTANT
        for fact in facts:
            if not fact.durable:
                continue
            state.evolve(fact)
            newest = max(newest, getattr(fact, "at", newest))
            yield fact
            if turned or joined:
                yield from self._derived(newest)

    def resume(self, now: Instant) -> list[Effect]:
        """Return the effects of all open leases, once after `replay`; their silence counts from now on."""
        fact = FarmResumed(now)
        self.state.evolve(fact)
        return list(react(self.state, fact))

    def why(self, step: StepKey, now: Instant) -> Reason | None:
        """Return why a step is not running; None for one that runs or has finished for good. Raises `KeyError`."""
        reason = why(self.state, self._queue_positions, self._limits, step, now)
        if isinstance(reason, Unserved):
            until = self._decider.gives_up_at(self.state.steps[step])
            return reason if until is None else replace(reason, until=until)
        return reason

    def considered(self, step: StepKey, now: Instant) -> Considered:
        """Return the rank of a step and the builders that it is, or would be, placed on. Raises `KeyError`."""
        return considered(self.state, Rooms(), self.state.steps[step], now)

    def unserved(self) -> dict[Requirements, Unserved]:
        """Return the classes of ready steps that no builder of the farm can take, sorted, and why."""
        return unserved_classes(self.state)

    def queue_reasons(self) -> dict[Requirements, Unserved | Busy]:
        """Return why the first ready step of each class has no builder; costs the number of classes and builders."""
        return queue_reasons(self.state)

    def recipe_of(self, step: StepKey) -> int:
        """Return the index of the recipe that a step has in use; 0 for one that is not known."""
        known = self.state.steps.get(step)
        return 0 if known is None else known.active

    def features_of(self, step: StepKey) -> tuple[str, ...]:
        """Return the features that the recipe in use asks for; none for a step that is not known or never built."""
        known = self.state.steps.get(step)
        return known.recipe.requirements.features if known is not None and known.recipes else ()

    def unmet(self, step: StepKey) -> int:
        """Return how many needs of a step are not done; 0 for one that is finished, not wanted or not known."""
        known = self.state.steps.get(step)
        return 0 if known is None else known.unmet

    def above(self, step: StepKey, most: int) -> list[StepKey]:
        """Return wanted steps that need this one, those nearest to a root first; `most` are looked at."""
        known = self.state.steps.get(step)
        nearest = islice(() if known is None else known.dependents, most)
        return [each.key for each in sorted(nearest, key=lambda each: (each.depth, each.sequence))]

    def open_needs(self, step: StepKey, most: int) -> list[StepKey]:
        """Return the first `most` of the needs of a wanted step that are not done."""
        known = self.state.steps.get(step)
        needs = () if known is None else known.needs
        return [need.key for need in islice((n for n in needs if n.state is not StepState.DONE), most)]

    def needs(self, step: StepKey) -> tuple[StepKey, ...]:
        """Return the needs of the recipe in use, finished or not."""
        known = self.state.steps.get(step)
        return known.recipes[known.active].needs if known is not None and known.recipes else ()

    def serving(self, wanted: Requirements) -> list[BuilderId]:
        """Return the builders that take steps of one class now, whether they have room or not."""
        builders = self.state.builders.values()
        return [each.id for each in builders if each.spec is not None and each.willing and each.spec.offers(wanted)]

    def speeds(self, wanted: Requirements) -> dict[BuilderId, float]:
        """Return the builders that take steps of one class now, as `serving`, with how fast they build these."""
        builders = self.state.builders
        return {name: builders[name].speed(wanted.system) for name in self.serving(wanted)}

    def limits_of(self, step: StepKey) -> ResourceLimits:
        """Return what a build of the step may use, by the limits of the submissions that want it now."""
        known = self.state.steps.get(step)
        return in_force([] if known is None else self.state.limits_wanted(known), self._limits.build)

    def is_held_by(self, lease: LeaseId, builder: BuilderId) -> bool:
        """Return whether the builder has this lease: its step is built or published under it."""
        step = self.state.steps.get(lease.step)
        return step is not None and step.attempt == lease.attempt and bool(builder) and step.builder == builder

    def was_held_by(self, lease: LeaseId, builder: BuilderId, incarnation: str, now: Instant) -> bool:
        """Return whether this incarnation of the builder had the lease, which has ended, `ended_leases.LATE_S` ago."""
        return self.state.ended_leases.had(lease, builder, incarnation, now)

    def is_open(self, lease: LeaseId) -> bool:
        """Return whether this lease is the one under which its step is built or published now."""
        step = self.state.steps.get(lease.step)
        open_states = (StepState.LEASED, StepState.PUBLISHING)
        return step is not None and step.attempt == lease.attempt and step.state in open_states

    def failed(self) -> Iterator[LeaseId]:
        """Yield the last lease of each step that has failed, the newest step first."""
        for step in reversed(self.state.steps.values()):
            if step.state is StepState.FAILED:
                yield LeaseId(step.key, step.attempt)

    def ended_in_failure(self, lease: LeaseId) -> bool:
        """Return whether this lease was the last one of a step that has failed."""
        step = self.state.steps.get(lease.step)
        return step is not None and step.attempt == lease.attempt and step.state is StepState.FAILED

    def holds(self, builder: BuilderId, incarnation: str) -> bool:
        """Return whether the builder joined last with this incarnation, silent or not, and is not lost since."""
        known = self.state.builders.get(builder)
        spec = self.state.silent.get(builder) if known is None else known.spec
        return spec is not None and spec.incarnation == incarnation

    def ended(self, submission: SubmissionId) -> bool:
        """Return whether nothing is left to wait for, nor may come.

        It stays so where a root is lost or revived for another later.
        True also for a submission that is withdrawn or unknown.
        """
        return self.state.has_ended(submission)


def _turning(step: Step, at: Instant) -> StepReady | StepWaiting:
    if step.state is StepState.READY:
        return StepReady(step.key, at, step.recipes[step.active].requirements)
    return StepWaiting(step.key)
