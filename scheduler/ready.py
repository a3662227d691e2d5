"""Which ready steps wait where: queues by what they require, a heap of back-offs, and the builders of each queue.

An index of the state and nothing more: it can be made anew from steps and builders. Heaps are pruned where they
change, so that the top of each is always live and readers only look. Written by `evolve` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from scheduler.model import BuilderId, Instant, Requirements, StepState
from scheduler.records import NOBODY, Builder, Queue, Step


class ReadyIndex:
    """Queues and back-offs over the builders of a state. `rank` is asked whenever a step is put in a queue."""

    __slots__ = ("_builders", "_rank", "delayed", "forsaken", "queues")

    def __init__(self, builders: dict[BuilderId, Builder], rank: Callable[[Step], int]) -> None:
        self._builders = builders
        self._rank = rank
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

    def enqueue(self, step: Step) -> None:
        """Put a ready step in its queue, anew where its rank has changed."""
        queue = self._queue_of(step)
        step.rank = rank = self._rank(step)
        if not queue.builders and step.queue is not queue:
            self.forsaken[step] = None
        step.queue = queue
        heappush(queue.heap, (-rank, step.sequence, step))
        _prune(queue)

    def leave(self, step: Step) -> None:
        """Forget a step that is no longer ready."""
        queue = step.queue
        if queue is None:
            self.prune_delayed()
        else:
            step.queue = None
            self.forsaken.pop(step, None)
            _prune(queue)

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
            if queue.avoid and queue.avoid not in self._builders and not queue.heap:
                del self.queues[key]
        for builder in self._builders.values():
            builder.queues = []
        for queue in self.queues.values():
            had_builders = bool(queue.builders)
            self._match(queue)
            if had_builders and not queue.builders:
                self.forsaken.update((step, None) for _, _, step in queue.heap if step.queue is queue)

    def _queue_of(self, step: Step) -> Queue:
        if step.avoid:
            return self._queue(step.recipe.requirements, step.avoid)
        if step.home is None:
            step.home = self._queue(step.recipe.requirements, NOBODY)
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


def _prune(queue: Queue) -> None:
    heap = queue.heap
    while heap:
        rank, _, step = heap[0]
        if step.queue is queue and step.rank == -rank:
            return
        heappop(heap)
