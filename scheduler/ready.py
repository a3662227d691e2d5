"""Queues of ready steps by what they require, a heap of back-offs, and the builders of each queue.

A grant is decided on two levels. Owners share each queue by weight: an owner has a tag, which grows by a stride (less
for more weight) with each of its grants, and the lowest tag goes first. One that begins to wait begins a stride behind
the last that was served (`Queue.virtual`), so nothing is paid back for time in which it did not wait, and none comes
in before those that wait already. A queue has one lane for each stake (`shares`) of an owner; the lane that was served
longest ago goes first, where a priority counts as having waited `AGE_TURNS` grants longer. So a higher one goes before,
and a lower one starves only for so long. Between equals the rank of the step decides.

What is served counts in all queues that its builder serves. A step that several submissions want is served as soon as
one of them may, and counts for all. There are as many lanes as stakes, which are bounded, and so is what one grant
costs.

An index of the state and nothing more: it can be made anew from steps and builders. Heaps are pruned where they
change, so that once a fact is applied (`pruning`) the top of each is live and readers only look. Written by `evolve`
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from heapq import heappop, heappush
from typing import Final

from scheduler.model import BuilderId, Instant, Requirements, StepState
from scheduler.pauses import PAUSE, PIECE, Pause
from scheduler.records import NO_BUILDER, Builder, Lane, OwnerLanes, Queue, Step
from scheduler.shares import Shares

#: Grants of the farm that one more of priority is worth. More than there are stakes, so that a lane that was just
#: served stands before all of a lower priority that have not waited for long.
AGE_TURNS: Final = 512
#: Steps that leave a lane from below its top before what they left there is dropped.
FEW_STALE: Final = 32
#: What a grant adds to the tag of an owner of weight 1.
STRIDE: Final = 1 << 40


class ReadyIndex:
    """Queues and back-offs over the builders of a state. `rank` is called whenever a step is put in a queue."""

    __slots__ = (
        "_builders",
        "_homes",
        "_rank",
        "_shares",
        "_turn",
        "_weigh",
        "buried",
        "crowded",
        "delayed",
        "deserted",
        "discarded",
        "forsaken",
        "queues",
    )

    def __init__(
        self,
        builders: dict[BuilderId, Builder],
        rank: Callable[[Step], int],
        shares: Shares,
        weigh: Callable[[str], int],
    ) -> None:
        self._shares = shares
        self._builders = builders
        self._rank = rank
        self._weigh = weigh
        self._turn = 0
        #: One queue per class and avoided builder ever met; those of builders that are gone are dropped when empty.
        self.queues: dict[tuple[Requirements, BuilderId], Queue] = {}
        #: Those where no builder is avoided, by system and features; never dropped.
        self._homes: dict[tuple[str, tuple[str, ...]], Queue] = {}
        #: Back-offs as (not_before, sequence, step); the first is always live.
        self.delayed: list[tuple[Instant, int, Step]] = []
        #: Steps that have come to stand where no builder can take them (taken by `scheduler.forsaken`).
        self.forsaken: dict[Step, None] = {}
        #: Queues that have lost their last builder: all that stands there is forsaken (taken likewise).
        self.deserted: dict[Queue, None] = {}
        #: Lanes with much that is stale at the top, with their queues and stakes (taken by `pruning`).
        self.buried: dict[Lane, tuple[Queue, int]] = {}
        #: Lanes more than half of which may be stale, with their queues (taken by `sweeping`).
        self.crowded: dict[Lane, Queue] = {}
        #: What closed and swept lanes have left; `shed` frees it piece by piece.
        self.discarded: list[list[tuple[int, int, Step]]] = []

    @property
    def turn(self) -> int:
        """Number of leases ever granted."""
        return self._turn

    def delay(self, step: Step) -> None:
        """Let a step that has become ready wait for the end of its back-off."""
        heappush(self.delayed, (step.not_before, step.sequence, step))

    def enqueue(self, step: Step, standing: tuple[int, ...] = ()) -> None:
        """Put a ready step in the lanes of its queue, anew where its rank or its owners have changed.

        `standing` are owners in whose lanes of the queue it stands already: unless its rank is another one by now,
        these stay as they are, so that many submissions of one graph leave one entry in each lane.
        """
        queue = step.home
        if queue is None or step.avoid:
            queue = self._queue_of(step)
        rank = self._rank(step)
        entry = (-rank, step.sequence, step)
        if step.queue is queue:
            before, step.rank = step.rank, rank
            self._enter_anew(entry, queue, standing, moves=before != rank)
            return
        if step.queue is not None:
            step.queue.standing -= 1
            step.queue.ready_ms -= step.work_ms
            step.held = None
        step.queue, step.rank = queue, rank
        queue.standing += 1
        queue.ready_ms += step.work_ms
        if not queue.builders:
            self.forsaken[step] = None
        lanes = queue.lanes
        for stake in step.owners:
            lane = lanes.get(stake) or self._open_lane(queue, stake)
            if lane is not None:
                heappush(lane.heap, entry)

    def _enter_anew(
        self, entry: tuple[int, int, Step], queue: Queue, standing: tuple[int, ...], *, moves: bool
    ) -> None:
        """Put a step that stands in a queue into all lanes of its owners, or those that are not `standing`."""
        step = entry[2]
        stays = frozenset() if moves else frozenset(standing)
        for stake in step.owners:
            if stake in stays:
                continue
            lane = queue.lanes.get(stake) or self._open_lane(queue, stake)
            if lane is None:
                continue
            heappush(lane.heap, entry)
            top = lane.heap[0]
            # Only what the step itself had left there can be stale.
            if top[2] is step and top is not entry:
                self._prune(queue, stake, lane)
            elif moves:
                self._weigh_lane(queue, lane)

    def _open_lane(self, queue: Queue, stake: int) -> Lane | None:
        """Return a new lane; None for what an ended submission has left on a step."""
        if not self._shares.is_live(stake):
            return None
        owner = self._shares.owner_of(stake)
        group = queue.groups.get(owner)
        if group is None:
            stride = STRIDE // self._weigh(owner)
            group = queue.groups[owner] = OwnerLanes(owner, stride, queue.virtual + stride, self._turn)
        ahead = AGE_TURNS * self._shares.priority_of(stake)
        lane = queue.lanes[stake] = group.lanes[stake] = Lane(group, self._turn - ahead, ahead)
        return lane

    def leave(self, step: Step) -> None:
        """Forget a step that is no longer ready."""
        queue = step.queue
        if queue is None:
            self.prune_delayed()
            return
        step.queue = step.held = None
        queue.standing -= 1
        queue.ready_ms -= step.work_ms
        if self.forsaken:
            self.forsaken.pop(step, None)
        lanes = queue.lanes
        if not queue.standing:
            # All that is left is stale, and may be much.
            for stake in tuple(lanes):
                self._close(queue, stake)
            return
        for stake in step.owners:
            lane = lanes.get(stake)
            if lane is None:
                continue
            if lane.heap[0][2] is step:
                self._uncover(queue, stake, lane)
            else:
                lane.stale += 1
                # One that is to be pruned may hold nothing else.
                if lane.stale > FEW_STALE and lane not in self.buried:
                    _skim(queue, lane)
                    self._weigh_lane(queue, lane)

    def taken(self, step: Step, builder: Builder | None) -> None:
        """A builder takes a step: it leaves its queue, and its owners come last in all that the builder can take.

        None is a builder that is only known from a journal.
        """
        self._turn += 1
        if builder is not None and step.queue is not None:
            self._serve(step, step.queue, builder)
        self.leave(step)

    def _serve(self, step: Step, queue: Queue, builder: Builder) -> None:
        # Behind those that begin to wait before the next lease is granted.
        turn = self._turn + 1
        tags: dict[str, int] = {}
        least = -1
        for stake in step.owners:
            lane = queue.lanes.get(stake)
            if lane is not None:
                group = lane.group
                tags[group.owner] = group.tag + group.stride
                if least < 0 or group.tag < least:
                    least = group.tag
        if not tags:
            return
        for other in builder.queues:
            if other.virtual < least:  # noqa: PLR1730  calling max takes longer, here and below
                other.virtual = least
            if other.lanes:
                _charge(other, step, tags, turn)

    def close_lanes(self, stake: int) -> None:
        """A submission waits for nothing any more: what others want too stands in their lanes."""
        for queue in self.queues.values():
            if stake in queue.lanes:
                self._close(queue, stake)

    def _close(self, queue: Queue, stake: int) -> None:
        heap = queue.lanes[stake].heap
        queue.close(stake)
        if len(heap) > PIECE:
            self.discarded.append(heap)

    def _uncover(self, queue: Queue, stake: int, lane: Lane) -> None:
        """The first step of a lane has left it: most often what comes up is live."""
        heap = lane.heap
        heappop(heap)
        if not heap:
            queue.close(stake)
        elif heap[0][2].queue is not queue or heap[0][2].rank != -heap[0][0]:
            self._prune(queue, stake, lane)

    def _prune(self, queue: Queue, stake: int, lane: Lane) -> None:
        if not _is_pruned(queue, stake, lane, FEW_STALE):
            self.buried[lane] = queue, stake

    def pruning(self) -> Generator[Pause, None, None]:
        """Bring to the top of lanes what stands there: after a fact, before anything is decided by them."""
        for lane, (queue, stake) in self.buried.items():
            while queue.lanes.get(stake) is lane and not _is_pruned(queue, stake, lane, PIECE):
                yield PAUSE
        self.buried.clear()

    def _weigh_lane(self, queue: Queue, lane: Lane) -> None:
        if len(lane.heap) > 2 * queue.standing + 2 * FEW_STALE:
            self.crowded[lane] = queue

    def sweeping(self) -> Generator[Pause, None, None]:
        """Drop what is stale from lanes of which it is more than half; nothing else may change them meanwhile.

        That costs no more than what has come since the last time.
        """
        while self.crowded:
            lane, queue = self.crowded.popitem()
            if not any(lane is each for each in queue.lanes.values()):
                continue
            fresh: list[tuple[int, int, Step]] = []
            for count, entry in enumerate(lane.heap, 1):
                if entry[2].queue is queue and entry[2].rank == -entry[0]:
                    heappush(fresh, entry)
                if not count % PIECE:
                    yield PAUSE
            self.discarded.append(lane.heap)
            lane.heap, lane.stale = fresh, 0

    def shed(self) -> None:
        """Free a piece of what closed lanes have left: all of a large one in one go takes milliseconds."""
        last = self.discarded[-1]
        del last[-PIECE:]
        if not last:
            self.discarded.pop()

    def reprioritise(self, stake: int) -> None:
        """The priority of a stake has changed: its lanes count as having waited longer, or less long."""
        ahead = AGE_TURNS * self._shares.priority_of(stake)
        for queue in self.queues.values():
            lane = queue.lanes.get(stake)
            if lane is not None:
                lane.due += lane.ahead - ahead
                lane.ahead = ahead

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
        # Queues that shared no builder may share one now: what each owner had of one does not count in another.
        latest = max([queue.virtual for queue in self.queues.values()], default=0)
        for queue in self.queues.values():
            queue.advance(latest)
            had_builders = bool(queue.builders)
            self._match(queue)
            if had_builders and not queue.builders:
                self.deserted[queue] = None

    def home_of(self, requirements: Requirements) -> Queue | None:
        """Return the queue of steps that avoid no builder; None for requirements that were never met."""
        return self._homes.get((requirements.system, requirements.features))

    def _queue_of(self, step: Step) -> Queue:
        requirements = step.recipes[step.active].requirements
        if step.avoid:
            return self._queue(requirements, step.avoid)
        if step.home is None:
            # Every step comes here once, and the hash of requirements takes as long as all else.
            key = requirements.system, requirements.features
            step.home = self._homes.get(key)
            if step.home is None:
                step.home = self._homes[key] = self._queue(requirements, NO_BUILDER)
        return step.home

    def _queue(self, requirements: Requirements, avoid: BuilderId) -> Queue:
        queue = self.queues.get((requirements, avoid))
        if queue is None:
            queue = self.queues[requirements, avoid] = Queue(requirements, avoid)
            self._match(queue)
            beside = [other.virtual for builder in queue.builders.values() for other in builder.queues]
            queue.virtual = max(beside, default=0)
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
        speeds = {builder.id: builder.speed(queue.requirements.system) for builder in capable.values()}
        willing = [builder for builder in capable.values() if builder.willing]
        memories = [builder.spec.memory_bytes for builder in willing if builder.spec is not None]
        queue.most_memory_bytes = max(memories, default=0) if 0 not in memories else 0
        queue.speeds, queue.by_speed = {}, ()
        if len(set(speeds.values())) > 1:
            queue.speeds = speeds
            queue.by_speed = tuple(sorted(willing, key=lambda builder: (-speeds[builder.id], builder.id)))
        queue.measure_power()
        for builder in capable.values():
            builder.queues.append(queue)


def _charge(queue: Queue, step: Step, tags: dict[str, int], turn: int) -> None:
    """Let the owners of a step that was served wait for their next turn in a queue, with these tags at least."""
    for owner, tag in tags.items():
        group = queue.groups.get(owner)
        if group is not None:
            group.turn = turn
            if group.tag < tag:  # noqa: PLR1730
                group.tag = tag
    lanes = queue.lanes
    for stake in step.owners:
        lane = lanes.get(stake)
        if lane is not None:
            lane.due = turn - lane.ahead


def _skim(queue: Queue, lane: Lane) -> None:
    """Drop what steps have left near the top of a lane, where others than the first go before those that wait.

    Who reads the lane in order would pass it each time. What lies deeper costs nothing but memory (`sweeping`).
    """
    heap = lane.heap
    first = [heappop(heap) for _ in range(min(len(heap), lane.stale + FEW_STALE))]
    for entry in first:
        if entry[2].queue is queue and entry[2].rank == -entry[0]:
            heappush(heap, entry)
    lane.stale = 0


def _is_pruned(queue: Queue, stake: int, lane: Lane, most: int) -> bool:
    """Drop what is stale from the top of a lane, and the lane where nothing is left; False if `most` is not all."""
    heap = lane.heap
    for _ in range(most):
        rank, _, step = heap[0]
        if step.queue is queue and step.rank == -rank:
            return True
        heappop(heap)
        if not heap:
            queue.close(stake)
            return True
    return False
