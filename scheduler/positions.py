"""Order in which ready steps of one class would be granted, one after the other: what `ready` does, played ahead."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from scheduler.records import Queue, Step

#: (due, entry, index) of a lane; the index tells lanes apart.
_LaneKey = tuple[int, tuple[int, int], int]


class _PlayedGroup:
    """Lanes of one owner in one queue, with a tag and a turn of their own."""

    __slots__ = ("aheads", "dues", "order", "owner", "steps", "stride", "tag", "turn")

    def __init__(self, queue: Queue, owner: str) -> None:
        group = queue.groups[owner]
        self.owner, self.stride, self.tag, self.turn = owner, group.stride, group.tag, group.turn
        #: By stake: when it is due, and its steps, the next one last.
        self.dues: dict[int, int] = {stake: lane.due for stake, lane in group.lanes.items()}
        self.aheads: dict[int, int] = {stake: lane.ahead for stake, lane in group.lanes.items()}
        self.steps: dict[int, list[Step]] = {stake: [] for stake in group.lanes}
        self.order: list[_LaneKey] = []

    def begin(self) -> None:
        """Order the lanes, once all steps stand in them."""
        self.order = [(self.dues[stake], _entry(steps[-1]), stake) for stake, steps in self.steps.items() if steps]
        heapify(self.order)

    def head(self, granted: dict[Step, None]) -> _LaneKey | None:
        """Return the lane whose turn it is, its first step not granted yet; None where none has any."""
        order = self.order
        while order:
            due, entry, stake = order[0]
            steps = self.steps[stake]
            while steps and steps[-1] in granted:
                steps.pop()
            if not steps:
                heappop(order)
                continue
            key = self.dues[stake], _entry(steps[-1]), stake
            if key == (due, entry, stake):
                return key
            # It was served meanwhile, or its first step was: it comes up again where it belongs.
            heappop(order)
            heappush(order, key)
        return None


def in_turn(steps: list[Step], turn: int) -> list[Step]:
    """Return the ready steps of a class in the order in which `assign` would grant them after so many leases."""
    groups: dict[tuple[Queue, str], _PlayedGroup] = {}
    # From the last to the first, so that the next step of each lane is at the end of its list.
    for step in sorted(steps, key=_entry, reverse=True):
        queue = step.queue
        for stake in step.owners:
            lane = None if queue is None else queue.lanes.get(stake)
            if queue is not None and lane is not None:
                owner = lane.group.owner
                group = groups.get((queue, owner))
                if group is None:
                    group = groups[queue, owner] = _PlayedGroup(queue, owner)
                group.steps[stake].append(step)
    if len(groups) == 1:
        (group,) = groups.values()
        if len(group.steps) == 1:
            (only,) = group.steps.values()
            return only[::-1]
    return _take_turns(list(groups.values()), turn + 1)


def _take_turns(groups: list[_PlayedGroup], turn: int) -> list[Step]:
    """Empty the lanes of these groups as grants do."""
    by_owner: dict[str, list[_PlayedGroup]] = {}
    for group in groups:
        group.begin()
        by_owner.setdefault(group.owner, []).append(group)
    granted: dict[Step, None] = {}
    while True:
        found = [(group.head(granted), index) for index, group in enumerate(groups)]
        heads = [(groups[index].tag, groups[index].turn, key, index) for key, index in found if key is not None]
        if not heads:
            return list(granted)
        _, _, (_, _, stake), index = min(heads)
        step = groups[index].steps[stake][-1]
        granted[step] = None
        turn += 1
        _serve(step, by_owner, turn)


def _serve(step: Step, by_owner: dict[str, list[_PlayedGroup]], turn: int) -> None:
    """Count a grant for all owners of a step, in all queues."""
    for played in by_owner.values():
        tags = [group.tag for group in played for stake in step.owners if stake in group.dues]
        if not tags:
            continue
        tag = min(tags) + played[0].stride
        for group in played:
            group.tag, group.turn = max(group.tag, tag), turn
            for stake in step.owners:
                if stake in group.dues:
                    group.dues[stake] = turn - group.aheads[stake]


def _entry(step: Step) -> tuple[int, int]:
    return (-step.rank, step.sequence)
