"""Queues of ready steps by what they require, a heap of back-offs, and the builders of each queue.

A queue has one lane for each submission that waits in it, and submissions take turns at each builder: one that begins
to wait goes behind those that wait, and one that was served to the end; between equals the rank decides. So a
submission waits for about one step of each other one, however many steps these have. A step that several submissions
want is served as soon as one of them may, and counts for all. There are as many lanes as stakes (`shares`), which are
bounded, and so is what one grant costs.

An index of the state and nothing more: it can be made anew from steps and builders. Heaps are pruned where they
change, so that the top of each is always live and readers only look. Written by `evolve` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from scheduler.model import BuilderId, Instant, Requirements, StepState
from scheduler.records import NO_BUILDER, Builder, Lane, Queue, Step


class ReadyIndex:
    """Queues and back-offs over the builders of a state. `rank` is called whenever a step is put in a queue."""

    __slots__ = ("_builders", "_is_live", "_rank", "_turn", "delayed", "forsaken", "queues")

    def __init__(
        self, builders: dict[BuilderId, Builder], rank: Callable[[Step], int], is_live: Callable[[int], bool]
    ) -> None:
        self._is_live = is_live
        self._builders = builders
        self._rank = rank
        #: How many leases were ever granted.
        self._turn = 0
        #: One queue per class and avoided builder ever met; those of builders that are gone are dropped when empty.
        self.queues: dict[tuple[Requirements, BuilderId], Queue] = {}
        #: Back-offs as (not_before, sequence, step); the first is always live.
        self.delayed: list[tuple[Instant, int, Step]] = []
        #: Steps that have come to stand where no builder can take them (taken by `scheduler.forsaken`).
        self.forsaken: dict[Step, None] = {}

    def put(self, step: Step) -> None:
        """Take in a step that has become ready."""
        if step.not_before:
            heappush(self.delayed, (step.not_before, step.sequence, step))
        else:
            self.enqueue(step)

    def enqueue(self, step: Step, standing: tuple[int, ...] = ()) -> None:
        """Put a ready step in the lanes of its queue, anew where its rank or its owners have changed.

        `standing` are owners in whose lanes of the queue it stands already: unless its rank is another one by now,
        these stay as they are, so that many submissions of one graph leave one entry in each lane.
        """
        queue = self._queue_of(step)
        rank = self._rank(step)
        stays = frozenset(standing) if step.queue is queue and step.rank == rank else frozenset()
        step.rank = rank
        if step.queue is not queue:
            if step.queue is not None:
                step.queue.standing -= 1
            queue.standing += 1
            step.queue = queue
            if not queue.builders:
                self.forsaken[step] = None
        entry = (-rank, step.sequence, step)
        for stake in step.owners:
            if stake in stays:
                continue
            lane = queue.lanes.get(stake)
            if lane is None:
                # What an ended submission has left on the step opens no lane.
                if not self._is_live(stake):
                    continue
                lane = queue.lanes[stake] = Lane(self._turn)
            heappush(lane.heap, entry)
            top = lane.heap[0]
            # Only what the step itself had left there can be stale.
            if top[2] is step and top is not entry:
                _prune(queue, stake, lane)

    def leave(self, step: Step) -> None:
        """Forget a step that is no longer ready."""
        queue = step.queue
        if queue is None:
            self.prune_delayed()
            return
        step.queue = None
        queue.standing -= 1
        self.forsaken.pop(step, None)
        for stake in step.owners:
            lane = queue.lanes.get(stake)
            # What lies below the first one is dropped when it comes up.
            if lane is not None and lane.heap[0][2] is step:
                _prune(queue, stake, lane)

    def served(self, step: Step, builder: Builder) -> None:
        """A builder has taken a step: its owners come last in all that the builder can take."""
        self._turn += 1
        # Behind those that begin to wait before the next lease is granted.
        turn = self._turn + 1
        owners = step.owners
        for queue in builder.queues:
            lanes = queue.lanes
            if lanes:
                for stake in owners:
                    if stake in lanes:
                        lanes[stake].turn = turn

    def close_lanes(self, stake: int) -> None:
        """A submission waits for nothing any more: what others want too stands in their lanes."""
        for queue in self.queues.values():
            queue.lanes.pop(stake, None)

    def prune_delayed(self) -> None:
        """Drop what no longer backs off from the top of the heap."""
        heap = self.delayed
        while heap:
            until, _, step = heap[0]
            if step.state is StepState.READY and step.not_before == until:
                return
            heappop(heap)

    def rematch(self) -> None:
        """Builders changed: find those of every queue anew, and forget empty queues of builders that are gone."""
        for key, queue in tuple(self.queues.items()):
            if queue.avoid and queue.avoid not in self._builders and not queue.lanes:
                del self.queues[key]
        for builder in self._builders.values():
            builder.queues = []
        for queue in self.queues.values():
            had_builders = bool(queue.builders)
            self._match(queue)
            if had_builders and not queue.builders:
                for lane in queue.lanes.values():
                    self.forsaken.update((step, None) for _, _, step in lane.heap if step.queue is queue)

    def _queue_of(self, step: Step) -> Queue:
        if step.avoid:
            return self._queue(step.recipe.requirements, step.avoid)
        if step.home is None:
            step.home = self._queue(step.recipe.requirements, NO_BUILDER)
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
            for builder in self._builders.values()
            if builder.spec is not None and builder.spec.offers(queue.requirements)
        }
        if any(builder.willing for builder in capable.values() if builder.id != queue.avoid):
            capable.pop(queue.avoid, None)
        queue.builders = capable
        for builder in capable.values():
            builder.queues.append(queue)


def _prune(queue: Queue, stake: int, lane: Lane) -> None:
    """Drop what is stale from the top of a lane, and the lane where nothing is left."""
    heap = lane.heap
    while heap:
        rank, _, step = heap[0]
        if step.queue is queue and step.rank == -rank:
            return
        heappop(heap)
    del queue.lanes[stake]
