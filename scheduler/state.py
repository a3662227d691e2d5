"""What the core knows, and `evolve`, the only thing that changes it.

Theory: a step *engages* its needs while it is wanted and unfinished. `dependents` of a step are exactly the steps that
engage it, so "wanted" is `roots or dependents` and a need that becomes done knows whom to tell. Everything else here
is an index over that: queues of ready steps per class of requirements, a heap of back-offs, builders by last word.

Rules: no function but `evolve` mutates; `evolve` reads no clock and asks no policy but for the rank (an index, never
a fact), so the same durable facts give the same durable state for ever. Heaps are pruned where they change, so that
the top of each is always live and readers only look. Nothing here recurses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import assert_never

from scheduler import facts as f
from scheduler.failures import CONSEQUENCES, is_fault
from scheduler.model import (
    NO_INSTANT,
    BuilderId,
    BuilderSpec,
    Failure,
    FailureKind,
    ImpossibleError,
    Instant,
    LeaseId,
    Recipe,
    Requirements,
    StepKey,
    StepSpec,
    SubmissionId,
)
from scheduler.transitions import LAPSED, LEGAL, SUBJECT, StepState

_WAITING, _READY, _LEASED = StepState.WAITING, StepState.READY, StepState.LEASED
_PUBLISHING, _DONE = StepState.PUBLISHING, StepState.DONE
_NOBODY = BuilderId("")


class Step:
    """One step. Read by everyone, written by `evolve` alone."""

    __slots__ = (
        "active",
        "asked_at",
        "attempt",
        "avoid",
        "born",
        "builder",
        "cause",
        "dependents",
        "depth",
        "done_at",
        "ended",
        "engaged",
        "evidence",
        "failure",
        "faults",
        "home",
        "key",
        "needs",
        "not_before",
        "queue",
        "rank",
        "recipes",
        "resends",
        "returns",
        "roots",
        "sequence",
        "state",
        "strikes",
        "tried",
        "unmet",
    )

    def __init__(self, key: StepKey, recipes: tuple[Recipe, ...], sequence: int, state: StepState) -> None:
        self.key = key
        #: Grows only; empty only for a step that entered as held.
        self.recipes = recipes
        #: Order of becoming known: the last tie-break, the same after replay.
        self.sequence = sequence
        self.state = state
        #: Index of the recipe in use.
        self.active = 0
        #: Recipes proven failing in this life, never in use again before the next.
        self.tried: frozenset[int] = frozenset()
        #: Leases ever granted; the attempt of the open lease where there is one. Never falls.
        self.attempt = 0
        #: Infrastructure failures of the recipe in use, and returned leases, of this life.
        self.faults = 0
        self.returns = 0
        #: The kinds of those of `faults` that have a budget of their own.
        self.strikes: tuple[FailureKind, ...] = ()
        #: Values of the state's `life` counter when this life began and when it lapsed.
        self.born = 0
        self.ended = 0
        #: When the result was last seen to be there.
        self.done_at = NO_INSTANT
        #: Live submissions that have this step as a root; empty once the step is finished.
        self.roots: tuple[SubmissionId, ...] = ()
        #: The steps that engage this one; a dict for its order.
        self.dependents: dict[Step, None] = {}
        #: True exactly while wanted and unfinished, orphans of a running `handle` aside.
        self.engaged = False
        #: The needs of the recipe in use, without repeats, while engaged; else empty.
        self.needs: tuple[Step, ...] = ()
        #: While engaged, how many of `needs` are not done.
        self.unmet = 0
        #: Length of the longest path up to a root, over all engagements ever; so it may overstate, never understate.
        self.depth = 0
        #: The policy's rank when the step was last put in a queue.
        self.rank = 0
        #: The queue of its requirements where no builder is avoided, once known.
        self.home: Queue | None = None
        #: The queue in which it stands: set exactly while ready and not backing off.
        self.queue: Queue | None = None
        #: The builder that last gave this step back or lost it; others come first.
        self.avoid = _NOBODY
        #: When not 0, the step may not be leased before; cleared by `BackOffEnded`.
        self.not_before = NO_INSTANT
        #: The builder of the open lease (leased or publishing), else nobody.
        self.builder = _NOBODY
        #: When the builder was last told to start, and how often it was told again.
        self.asked_at = NO_INSTANT
        self.resends = 0
        #: What the builder said of its outputs, while publishing.
        self.evidence = b""
        #: Why it failed (state failed), or which step's failure doomed it (state doomed).
        self.failure: Failure | None = None
        self.cause: StepKey | None = None

    def __repr__(self) -> str:
        return f"<Step {self.key} {self.state.value} attempt {self.attempt}>"

    @property
    def lease(self) -> LeaseId:
        """The last lease granted."""
        return LeaseId(self.key, self.attempt)

    @property
    def wanted(self) -> bool:
        """Whether a live submission stands on this step."""
        return bool(self.roots or self.dependents)

    @property
    def recipe(self) -> Recipe:
        """The recipe in use. Raises `ImpossibleError` for a step that only ever was held."""
        if not self.recipes:
            raise ImpossibleError(f"{self.key} has no recipe")
        return self.recipes[self.active]


class Queue:
    """Ready steps that the same builders can take: one class of requirements, one avoided builder or none."""

    __slots__ = ("avoid", "builders", "heap", "requirements")

    def __init__(self, requirements: Requirements, avoid: BuilderId) -> None:
        self.requirements = requirements
        self.avoid = avoid
        #: (-rank, sequence, step), the first always live; stale ones below are dropped when they come up.
        self.heap: list[tuple[int, int, Step]] = []
        #: Builders that may take these steps; the avoided one only where there is no other.
        self.builders: dict[BuilderId, Builder] = {}


class Builder:
    """One builder, or only the name of one that a replayed lease mentions (`spec` is None until it joins)."""

    __slots__ = ("capacity", "heard", "id", "leases", "queues", "spec")

    def __init__(self, id_: BuilderId, heard: Instant) -> None:
        self.id = id_
        self.spec: BuilderSpec | None = None
        #: Leases it is willing to hold in all; may fall below what it holds.
        self.capacity = 0
        #: Steps leased to it, not those publishing.
        self.leases: dict[StepKey, Step] = {}
        #: Its last sign of life.
        self.heard = heard
        #: The queues in whose `builders` it stands.
        self.queues: list[Queue] = []

    @property
    def free(self) -> int:
        """Leases it would still take; may be negative."""
        return self.capacity - len(self.leases)


class FarmState:
    """Everything the core knows."""

    def __init__(self, rank: Callable[[Step], int]) -> None:
        self._rank = rank
        #: Every step ever known, in order of becoming known.
        self.steps: dict[StepKey, Step] = {}
        #: Submissions neither withdrawn nor forgotten, with their roots.
        self.submissions: dict[SubmissionId, tuple[Step, ...]] = {}
        #: Builders from the longest silent to the last heard.
        self.builders: dict[BuilderId, Builder] = {}
        #: Exactly the builders that joined and have `free > 0`.
        self.free: dict[BuilderId, Builder] = {}
        #: Builders removed for silence, which their next heartbeat brings back; at most `silent_limit`.
        self.silent: dict[BuilderId, BuilderSpec] = {}
        self.silent_limit = 1024
        #: One queue per class and avoided builder ever met; those of builders that are gone are dropped when empty.
        self.queues: dict[tuple[Requirements, BuilderId], Queue] = {}
        #: Back-offs as (not_before, sequence, step); the first is always live.
        self.delayed: list[tuple[Instant, int, Step]] = []
        #: Engaged steps that nobody wants any more; `decide` abandons them, empty between calls of `handle`.
        self.orphans: dict[StepKey, Step] = {}
        #: Counts beginnings and ends of lives: orders a failure against the life of the step that meets it.
        self.life = 0

    def lease_holder(self, lease: LeaseId, state: StepState) -> Step | None:
        """Return the step if this lease is its open one and the step is in `state`; None for a stale lease."""
        step = self.steps.get(lease.step)
        if step is None or step.state is not state or step.attempt != lease.attempt:
            return None
        return step

    def needs_of(self, step: Step) -> tuple[Step, ...]:
        """Return the needs of the recipe in use, whether the step engages them or not."""
        if step.engaged:
            return step.needs
        if not step.recipes:
            return ()
        steps = self.steps
        return tuple([steps[key] for key in dict.fromkeys(step.recipes[step.active].needs)])

    def descend(self, starts: Iterable[Step], *, below_done: bool = False) -> list[Step]:
        """Return every step reachable from `starts` through recipes in use, each before its needs.

        It stops at done steps unless `below_done`. Raises `ImpossibleError` where that runs in a circle.
        """
        order: list[Step] = []
        closed: dict[Step, bool] = {}
        for start in starts:
            if start in closed:
                continue
            closed[start] = False
            stack = [(start, iter(self._below(start, below_done)))]
            while stack:
                step, rest = stack[-1]
                for need in rest:
                    seen = closed.get(need)
                    if seen is None:
                        closed[need] = False
                        stack.append((need, iter(self._below(need, below_done))))
                        break
                    if not seen:
                        raise ImpossibleError(f"{need.key} needs itself through {step.key}")
                else:
                    stack.pop()
                    closed[step] = True
                    order.append(step)
        order.reverse()
        return order

    def _below(self, step: Step, below_done: bool) -> tuple[Step, ...]:
        return () if step.state is _DONE and not below_done else self.needs_of(step)

    def evolve(self, fact: f.Fact) -> None:  # noqa: C901, PLR0912, PLR0915  one arm per fact, most frequent first
        """Apply one fact. Raises `ImpossibleError` for a fact that cannot follow from this state."""
        match fact:
            case f.StepLeased():
                self._leased(fact)
            case f.StepBuilt():
                self._built(fact)
            case f.StepDone():
                step = self._subject(fact, fact.lease.step)
                step.done_at = fact.at
                self._finish(step, _DONE)
            case f.BuilderRefreshed():
                self._refreshed(fact)
            case f.StepAdded():
                self._added(fact.spec)
            case f.RecipeAdded():
                step = self._subject(fact, fact.step)
                step.recipes = (*step.recipes, fact.recipe)
            case f.StepHeld():
                self._held(fact)
            case f.SubmissionAccepted():
                self._accepted(fact)
            case f.LeaseRevoked():
                self._revoked(fact)
            case f.BackOffEnded():
                self._back_off_ended(fact)
            case f.StepFailed():
                step = self._subject(fact, fact.step)
                self._finish(step, StepState.FAILED)
                step.failure = fact.failure
            case f.StepDoomed():
                step = self._subject(fact, fact.step)
                self._finish(step, StepState.DOOMED)
                step.cause = fact.cause
            case f.StepAbandoned():
                self._finish(self._subject(fact, fact.step), StepState.ABANDONED)
            case f.StepFellBack():
                self._fell_back(fact)
            case f.StepRevived():
                self._revived(fact)
            case f.StepLost():
                self._lost(fact)
            case f.SubmissionWithdrawn():
                self._withdrawn(fact)
            case f.BuilderAdmitted():
                self._admitted(fact)
            case f.BuilderRemoved():
                self._removed(fact)
            case f.FarmResumed():
                self._resumed(fact)
            case _:
                assert_never(fact)

    def _subject(self, fact: f.Fact, key: StepKey) -> Step:
        step = self.steps.get(key)
        if step is None or step.state not in SUBJECT[type(fact)]:
            raise ImpossibleError(f"{type(fact).__name__} cannot be said of {step or key}")
        return step

    def _move(self, step: Step, target: StepState) -> None:
        source = step.state
        if target not in LEGAL[source]:
            raise ImpossibleError(f"{step} cannot become {target.value}")
        step.state = target
        if source is _READY:
            queue = step.queue
            if queue is None:
                self._prune_delayed()
            else:
                step.queue = None
                _prune(queue)

    def _added(self, spec: StepSpec) -> None:
        if spec.key in self.steps or not spec.recipes:
            raise ImpossibleError(f"{spec.key} is known, or has no recipe")
        self._know(spec.key, spec.recipes, _WAITING)

    def _know(self, key: StepKey, recipes: tuple[Recipe, ...], state: StepState) -> None:
        self.life += 1
        step = Step(key, recipes, len(self.steps), state)
        step.born = self.life
        self.steps[key] = step

    def _held(self, fact: f.StepHeld) -> None:
        if fact.step in self.steps:
            self._finish(self._subject(fact, fact.step), _DONE)
        else:
            self._know(fact.step, (), _DONE)
        self.steps[fact.step].done_at = fact.at

    def _accepted(self, fact: f.SubmissionAccepted) -> None:
        roots = tuple(self.steps[key] for key in dict.fromkeys(fact.roots))
        self.submissions[fact.submission] = roots
        for root in roots:
            if root.state is not _DONE:
                root.roots = (*root.roots, fact.submission)
                self.orphans.pop(root.key, None)
        self._engage(self.steps[key] for key in fact.members)

    def _withdrawn(self, fact: f.SubmissionWithdrawn) -> None:
        for root in self.submissions.pop(fact.submission):
            root.roots = tuple(other for other in root.roots if other != fact.submission)
            if root.engaged and not root.wanted:
                self.orphans[root.key] = root

    def _engage(self, order: Iterable[Step]) -> None:
        """Engage the wanted steps of `order` (each before its needs), raise depths, make ready what can run."""
        for step in order:
            if step.state is _DONE:
                continue
            fresh = not step.engaged and step.wanted
            if fresh:
                self._take_needs(step)
            depth = step.depth + 1
            for need in step.needs:
                if need.depth < depth:
                    need.depth = depth
                    if need.queue is not None:
                        self._enqueue(need)
            if fresh and step.unmet == 0:
                self._become_ready(step)

    def _take_needs(self, step: Step) -> None:
        step.needs = self.needs_of(step)
        step.engaged = True
        step.unmet = 0
        for need in step.needs:
            need.dependents[step] = None
            if need.state is not _DONE:
                step.unmet += 1
                self.orphans.pop(need.key, None)

    def _release(self, step: Step) -> None:
        """Let go of the needs; those that nobody else wants become orphans."""
        if not step.engaged:
            return
        for need in step.needs:
            dependents = need.dependents
            del dependents[step]
            if need.engaged and not dependents and not need.roots:
                self.orphans[need.key] = need
        step.engaged = False
        step.needs = ()

    def _finish(self, step: Step, target: StepState) -> None:
        """Enter one of the finished states: nothing is wanted of the step, and it wants nothing."""
        if step.state is _LEASED:
            self._free_slot(step)
        self._move(step, target)
        step.roots = ()
        step.builder = _NOBODY
        step.evidence = b""
        if self.orphans:
            self.orphans.pop(step.key, None)
        self._release(step)
        if target is _DONE:
            for dependent in step.dependents:
                dependent.unmet -= 1
                if dependent.unmet == 0 and dependent.state is _WAITING:
                    self._become_ready(dependent)
        else:
            self.life += 1
            step.ended = self.life

    def _begin_life(self, step: Step) -> None:
        self.life += 1
        step.born = self.life
        step.tried = frozenset()
        step.faults = step.returns = 0
        step.strikes = ()
        step.avoid, step.not_before = _NOBODY, NO_INSTANT
        step.failure = step.cause = None

    def _revived(self, fact: f.StepRevived) -> None:
        step = self._subject(fact, fact.step)
        self._move(step, _WAITING)
        self._begin_life(step)
        self._use(step, fact.recipe)

    def _use(self, step: Step, recipe: int) -> None:
        if recipe >= len(step.recipes):
            raise ImpossibleError(f"{step.key} has no recipe {recipe}")
        step.active = recipe
        step.home = None

    def _lost(self, fact: f.StepLost) -> None:
        step = self._subject(fact, fact.step)
        self._move(step, _WAITING)
        self._begin_life(step)
        for dependent in step.dependents:
            dependent.unmet += 1
            if dependent.state is _READY:
                self._move(dependent, _WAITING)
        if step.dependents:
            self._engage(self.descend((step,)))

    def _fell_back(self, fact: f.StepFellBack) -> None:
        step = self._subject(fact, fact.step)
        if step.state is _LEASED:
            self._free_slot(step)
            step.builder = _NOBODY
            self._move(step, _WAITING)
        self._release(step)
        step.tried = step.tried | {step.active}
        step.faults, step.strikes = 0, ()
        step.avoid, step.not_before = _NOBODY, NO_INSTANT
        self._use(step, fact.recipe)
        self._engage(self.descend((step,)))

    def _leased(self, fact: f.StepLeased) -> None:
        step = self._subject(fact, fact.lease.step)
        if fact.lease.attempt != step.attempt + 1 or fact.recipe != step.active or step.unmet:
            raise ImpossibleError(f"{fact.lease} cannot follow {step}")
        # A replayed lease was granted after its back-off, whose end the journal does not tell.
        step.not_before = NO_INSTANT
        step.attempt = fact.lease.attempt
        step.builder = fact.builder
        step.asked_at, step.resends = fact.at, 0
        self._move(step, _LEASED)
        builder = self.builders.get(fact.builder)
        if builder is None:
            builder = self.builders[fact.builder] = Builder(fact.builder, fact.at)
        builder.leases[step.key] = step
        if len(builder.leases) >= builder.capacity:
            self.free.pop(builder.id, None)

    def _free_slot(self, step: Step) -> None:
        builder = self.builders[step.builder]
        del builder.leases[step.key]
        self._count_slots(builder)

    def _count_slots(self, builder: Builder) -> None:
        if builder.spec is not None and builder.capacity > len(builder.leases):
            self.free[builder.id] = builder
        else:
            self.free.pop(builder.id, None)

    def _open(self, fact: f.LeaseRevoked | f.StepBuilt) -> Step:
        step = self._subject(fact, fact.lease.step)
        if step.attempt != fact.lease.attempt or step.builder != fact.builder:
            raise ImpossibleError(f"{fact.lease} is not the open lease of {step}")
        return step

    def _built(self, fact: f.StepBuilt) -> None:
        step = self._open(fact)
        self._free_slot(step)
        self._move(step, _PUBLISHING)
        step.evidence = fact.evidence

    def _revoked(self, fact: f.LeaseRevoked) -> None:
        step = self._open(fact)
        if step.state is _LEASED:
            self._free_slot(step)
        step.builder = _NOBODY
        step.evidence = b""
        kind = fact.failure.kind
        if is_fault(kind):
            step.faults += 1
            if CONSEQUENCES[kind].tries is not None:
                step.strikes = (*step.strikes, kind)
        elif kind is FailureKind.RETURNED:
            step.returns += 1
        if kind is not FailureKind.CANCELLED:
            step.avoid = fact.builder
        step.not_before = fact.not_before
        if step.unmet:
            self._move(step, _WAITING)
        else:
            self._become_ready(step)

    def _back_off_ended(self, fact: f.BackOffEnded) -> None:
        step = self._subject(fact, fact.step)
        step.not_before = NO_INSTANT
        self._prune_delayed()
        self._enqueue(step)

    def _become_ready(self, step: Step) -> None:
        self._move(step, _READY)
        if step.not_before:
            heappush(self.delayed, (step.not_before, step.sequence, step))
        else:
            self._enqueue(step)

    def _enqueue(self, step: Step) -> None:
        """Put a ready step in its queue, anew where its rank has changed."""
        queue = self._queue_of(step)
        step.rank = rank = self._rank(step)
        step.queue = queue
        heappush(queue.heap, (-rank, step.sequence, step))
        _prune(queue)

    def _queue_of(self, step: Step) -> Queue:
        if step.avoid:
            return self._queue(step.recipe.requirements, step.avoid)
        if step.home is None:
            step.home = self._queue(step.recipe.requirements, _NOBODY)
        return step.home

    def _queue(self, requirements: Requirements, avoid: BuilderId) -> Queue:
        queue = self.queues.get((requirements, avoid))
        if queue is None:
            queue = self.queues[requirements, avoid] = Queue(requirements, avoid)
            self._match(queue)
        return queue

    def _match(self, queue: Queue) -> None:
        """Find the builders of a queue, which no builder lists yet."""
        capable = {
            builder.id: builder
            for builder in self.builders.values()
            if builder.spec is not None and builder.spec.offers(queue.requirements)
        }
        if len(capable) > 1:
            capable.pop(queue.avoid, None)
        queue.builders = capable
        for builder in capable.values():
            builder.queues.append(queue)

    def _rematch(self) -> None:
        """Builders changed: find those of every queue anew, and forget empty queues of builders that are gone."""
        for key, queue in tuple(self.queues.items()):
            if queue.avoid and queue.avoid not in self.builders and not queue.heap:
                del self.queues[key]
        for builder in self.builders.values():
            builder.queues = []
        for queue in self.queues.values():
            self._match(queue)

    def _prune_delayed(self) -> None:
        heap = self.delayed
        while heap:
            until, _, step = heap[0]
            if step.state is _READY and step.not_before == until:
                return
            heappop(heap)

    def _admitted(self, fact: f.BuilderAdmitted) -> None:
        spec = fact.builder
        self.silent.pop(spec.id, None)
        builder = self.builders.pop(spec.id, None) or Builder(spec.id, fact.at)
        self.builders[spec.id] = builder
        changed = builder.spec != spec
        builder.spec = spec
        if changed:
            self._rematch()
        self._heard(builder, fact.capacity, fact.at, fact.missing)

    def _refreshed(self, fact: f.BuilderRefreshed) -> None:
        builder = self.builders.pop(fact.builder)
        self.builders[fact.builder] = builder
        self._heard(builder, fact.capacity, fact.at, fact.missing)

    def _heard(self, builder: Builder, capacity: int, at: Instant, missing: tuple[LeaseId, ...]) -> None:
        builder.heard = at
        builder.capacity = capacity
        self._count_slots(builder)
        for lease in missing:
            step = builder.leases[lease.step]
            step.asked_at = at
            step.resends += 1

    def _removed(self, fact: f.BuilderRemoved) -> None:
        self.silent.pop(fact.builder, None)
        builder = self.builders.pop(fact.builder, None)
        self.free.pop(fact.builder, None)
        if builder is None:
            return
        if builder.leases:
            raise ImpossibleError(f"builder {fact.builder} is removed with open leases")
        if fact.silent and builder.spec is not None:
            self.silent[fact.builder] = builder.spec
            if len(self.silent) > self.silent_limit:
                del self.silent[next(iter(self.silent))]
        self._rematch()

    def _resumed(self, fact: f.FarmResumed) -> None:
        for builder in tuple(self.builders.values()):
            if builder.spec is None and not builder.leases:
                del self.builders[builder.id]
                continue
            builder.heard = fact.at
            for step in builder.leases.values():
                step.asked_at = fact.at


def _prune(queue: Queue) -> None:
    heap = queue.heap
    while heap:
        rank, _, step = heap[0]
        if step.queue is queue and step.rank == -rank:
            return
        heappop(heap)


def is_lapsed(step: Step) -> bool:
    """Whether the step finished without a result."""
    return step.state in LAPSED
