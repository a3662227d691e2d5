"""Graph of the known steps: which engage which, who wants them, and when one becomes ready.

Theory: a step *engages* its needs while it is wanted and unfinished. `dependents` of a step are exactly the steps that
engage it, so "wanted" is `roots or dependents` and a need that becomes done knows its dependents. Everything else here
is an index over that: ready steps (`ready`) and the submissions that wait for each (`shares`).

Written by `FarmState.evolve` alone. Nothing here recurses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from heapq import heappop, heappush

from scheduler.model import BuilderId, ImpossibleError, LeaseId, StepKey, StepState, SubmissionId
from scheduler.pauses import PAUSE, PIECE, Pause, emptied, whole
from scheduler.ready import ReadyIndex
from scheduler.records import Builder, Step
from scheduler.shares import Shares
from scheduler.transitions import LAPSED, LEGAL

_WAITING, _READY, _DONE = StepState.WAITING, StepState.READY, StepState.DONE

#: Owners of a step and stakes that join them, with what comes of it: for the time of one fact.
Merged = dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]


class StepGraph:
    """The steps, their engagements, and the indexes over these."""

    def __init__(self, rank: Callable[[Step], int], weigh: Callable[[str], int]) -> None:
        #: Every step that is known, in order of becoming known.
        self.steps: dict[StepKey, Step] = {}
        #: Counts how often something let go of an unfinished step: its limit may be shorter since.
        self.partings = 0
        #: Builders by their last report, the oldest first.
        self.builders: dict[BuilderId, Builder] = {}
        #: Which submissions wait, for fairness between them.
        self.shares = Shares()
        #: Where ready steps wait.
        self.ready = ReadyIndex(self.builders, rank, self.shares, weigh)
        self.shares.moved = self.ready.reprioritise
        #: Engaged steps that no submission wants any more; `decide` abandons them, empty between calls of `handle`.
        self.orphans: dict[StepKey, Step] = {}
        #: Edges that facts without pauses of their own have changed since `Farm` last paused.
        self.edges_changed = 0
        #: Steps that became ready, or wait again, and those that submissions began to stand on because a step fell
        #: back: since `Farm` last made facts of them.
        self.turned: list[Step] = []
        self.joined: list[tuple[Step, list[Step]]] = []

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
        below = step.below
        if below is None:
            if not step.recipes:
                return ()
            # Taking a submission asks three times. What a recipe names stays known for as long as its step is.
            needs = step.recipes[step.active].needs
            below = step.below = tuple(map(self.steps.__getitem__, dict.fromkeys(needs)))
        return below

    def descend(self, starts: Iterable[Step], *, below_done: bool = False) -> list[Step]:
        """Return every step reachable from `starts` through recipes in use, each before its needs.

        It stops at done and at failed steps unless `below_done`. Raises `ImpossibleError` where that runs in a circle.
        """
        return whole(self.descending(starts, below_done=below_done))

    def descending(
        self, starts: Iterable[Step], *, below_done: bool = False, known: Collection[StepKey] = ()
    ) -> Generator[Pause, None, list[Step]]:
        """Do the work of `descend`, with pauses; engaged steps that are `known` are passed over with all below them."""
        order: list[Step] = []
        closed: dict[Step, bool] = {}
        looked_at = 0
        for start in starts:
            if start in closed or (known and start.engaged and start.key in known):
                continue
            closed[start] = False
            below = self._below(start, below_done)
            stack = [(start, iter(below))]
            looked_at += 1 + len(below)
            while stack:
                if looked_at >= PIECE:
                    looked_at = 0
                    yield PAUSE
                step, rest = stack[-1]
                for need in rest:
                    if known and need.engaged and need.key in known:
                        continue
                    seen = closed.get(need)
                    if seen is None:
                        closed[need] = False
                        below = self._below(need, below_done)
                        stack.append((need, iter(below)))
                        looked_at += 1 + len(below)
                        break
                    if not seen:
                        raise ImpossibleError(f"{need.key} needs itself through {step.key}")
                else:
                    stack.pop()
                    closed[step] = True
                    order.append(step)
                    looked_at += 1
        yield from emptied(closed)
        order.reverse()
        return order

    def _below(self, step: Step, below_done: bool) -> tuple[Step, ...]:
        ends = step.state is _DONE or step.state is StepState.FAILED
        return () if ends and not below_done else self.needs_of(step)

    def wisher(self, step: Step) -> SubmissionId | None:
        """Return a submission that wants the step, the first by the graph's own order; None where there is none."""
        while not step.roots:
            if not step.dependents:
                return None
            step = next(iter(step.dependents))
        return step.roots[0]

    def _move(self, step: Step, target: StepState) -> None:
        source = step.state
        if target not in LEGAL[source]:
            raise ImpossibleError(f"{step} cannot become {target.value}")
        step.state = target
        if source is _READY:
            self.ready.leave(step)

    def _engage(self, order: Iterable[Step]) -> Iterator[Pause]:
        """Engage the wanted steps of `order` (each before its needs), raise depths and tails, make ready what can."""
        merged: Merged = {}
        looked_at = 0
        for step in order:
            looked_at += 1
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
            if step.state is _DONE or step.state in LAPSED:
                continue
            fresh = not step.engaged and step.wanted
            if fresh:
                self._take_needs(step)
            looked_at += len(step.needs)
            depth, tail_ms = step.depth + 1, step.tail_ms
            owners = step.owners
            for need in step.needs:
                if need.owners is not owners:
                    self._own(need, owners, merged)
                need.depth = max(need.depth, depth)
                tail = tail_ms + need.work_ms
                if need.tail_ms < tail:
                    need.tail_ms = tail
                    if need.queue is not None:
                        self.ready.enqueue(need)
            if fresh and step.unmet == 0:
                self._become_ready(step)

    def _retail(self, changed: Iterable[Step]) -> Iterator[Pause]:
        """Compute the tails of steps whose work has changed, and of what stands below where that changes anything.

        By depth, which is less for a dependent than for its needs: so each step is looked at once.
        """
        open_: list[tuple[int, int, Step]] = []
        seen: dict[Step, None] = {}
        looked_at = 0
        for step in changed:
            heappush(open_, (step.depth, step.sequence, step))
            seen[step] = None
            looked_at += 1
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
        while open_:
            _, _, step = heappop(open_)
            tail_ms = step.work_ms + max([above.tail_ms for above in step.dependents], default=0)
            looked_at += 1 + len(step.dependents)
            if tail_ms != step.tail_ms:
                step.tail_ms = tail_ms
                if step.queue is not None:
                    self.ready.enqueue(step)
                looked_at += len(step.needs)
                for need in step.needs:
                    if need not in seen:
                        seen[need] = None
                        heappush(open_, (need.depth, need.sequence, need))
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
        yield from emptied(seen)

    def _own(self, step: Step, stakes: tuple[int, ...], merged: Merged) -> None:
        """Count that more submissions want a step; `merged` keeps equal tuples one, as most of a graph's are."""
        key = (step.owners, stakes)
        owners = merged.get(key)
        if owners is None:
            owners = merged[key] = self.shares.live((*step.owners, *stakes))
        if owners != step.owners:
            before, step.owners = step.owners, owners
            if step.queue is not None:
                self.ready.enqueue(step, before)
        else:
            step.owners = owners

    def _end_share(self, submission: SubmissionId) -> None:
        stake = self.shares.end(submission)
        if stake is not None:
            self.ready.close_lanes(stake)

    def _take_needs(self, step: Step) -> None:
        step.needs = self.needs_of(step)
        step.below = None
        step.engaged = True
        unmet, orphans = 0, self.orphans
        for need in step.needs:
            need.gain(step)
            if need.state is not _DONE:
                unmet += 1
                if orphans:
                    orphans.pop(need.key, None)
        step.unmet = unmet

    def _release(self, step: Step) -> None:
        """Let go of the needs; those that no other step or root wants become orphans."""
        if not step.engaged:
            return
        needs = step.needs
        self.edges_changed += len(needs)
        for need in needs:
            need.lose(step)
            if need.engaged:
                self.partings += 1
                if not need.dependents and not need.roots:
                    self.orphans[need.key] = need
        step.engaged = False
        step.needs = ()
        step.unmet = 0

    def _meet(self, dependents: Iterable[Step]) -> None:
        """A need of these is done."""
        for dependent in dependents:
            unmet = dependent.unmet = dependent.unmet - 1
            if not unmet and dependent.state is _WAITING:
                self._become_ready(dependent)

    def _meet_in_pieces(self, dependents: Collection[Step]) -> Iterator[Pause]:
        for piece in pieces(tuple(dependents)):
            self._meet(piece)
            yield PAUSE

    def _become_ready(self, step: Step) -> None:
        self._move(step, _READY)
        self.turned.append(step)
        if step.not_before:
            self.ready.delay(step)
        else:
            self.ready.enqueue(step)


def pieces(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """Yield the steps in tuples of `PIECE`, between which work may pause."""
    return (steps[start : start + PIECE] for start in range(0, len(steps), PIECE))
