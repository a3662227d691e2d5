"""Estimate of the time until each submission ends, and of what bounds it: pure arithmetic over the open steps.

Theory. A submission cannot end before its longest path of open steps is built one after the other, nor before the
workers of each kind of step have done the work of that kind: the larger of these is `sooner_s`. List scheduling ends
no later than that path and the work beside it, done by as many workers as there are (Graham 1966): `later_s` is

    max over paths of sum(step_s * (1 - 1/slots))  +  sum over kinds of work_s / slots

where the work is that of all submissions, and of others at most as much as each one's turns take (`scheduler.ready`).
For one chain without others both are the sum of its steps. More slots make neither larger.

What is not known: a step without history counts nothing in `sooner_s` and the mean of those known in `later_s`; one
that has run longer than usual the same, and as long as usual once more. The longest of those without history may
decide the end: it is added to `later_s`, as `surprise` expects it. Where nothing is known, or a kind has no worker,
there is no `later_s`. All of these are counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, Protocol, TypeAlias, TypeVar

from scheduler.model import Requirements
from scheduler.pauses import PAUSE, PIECE, Pause

#: Steps of a path that are named: the first ones, which are built next.
PATH_NAMED: Final = 24

#: `path`: its longest path. `capacity`: the work of one kind. `no_worker`: a kind that nothing builds now.
#: `unknown`: no step has a history.
Bound: TypeAlias = Literal["path", "capacity", "no_worker", "unknown"]


class OpenStep(Protocol):
    """An unfinished step, as the core keeps it."""

    @property
    def needs(self) -> Iterable[OpenStep]:
        """Steps that come before it, finished ones among them."""

    @property
    def depth(self) -> int:
        """A number that is smaller than that of each of its needs."""


_Step = TypeVar("_Step", bound=OpenStep)
_Holder = TypeVar("_Holder", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Expected:
    """Seconds that a build takes at least and at most, as far as that can be expected."""

    least_s: float
    most_s: float


@dataclass(frozen=True, slots=True)
class BuildPace:
    """Speed of the workers of one kind of step: how many builds they do at one time, and how fast."""

    slots: int = 0
    #: The mean of the slots, and the fastest of them; 1 is usual.
    mean: float = 1.0
    fastest: float = 1.0

    @property
    def lead(self) -> float:
        """Part of the time of the mean that the fastest takes."""
        return self.mean / self.fastest

    @staticmethod
    def of(workers: Iterable[tuple[int, float]]) -> BuildPace:
        """Return the pace of workers with so many slots of such a speed."""
        known = [(slots, speed) for slots, speed in workers if slots]
        slots = sum([each for each, _ in known])
        if not slots:
            return BuildPace()
        return BuildPace(
            slots, sum([each * speed for each, speed in known]) / slots, max([speed for _, speed in known])
        )


def rest_of(expected: Expected | None, speed: float, age_s: float | None) -> tuple[Expected | None, bool]:
    """Return what a step still takes at a speed, where it has run so long (None: it does not), and if it is overdue."""
    if expected is None:
        return None, False
    least_s, most_s = expected.least_s / speed, expected.most_s / speed
    if age_s is None:
        return Expected(least_s, most_s), False
    if age_s >= most_s:
        # How long it still takes is as unknown as of one that never ran.
        return Expected(0.0, most_s), True
    return Expected(max(0.0, least_s - age_s), most_s - age_s), False


@dataclass(frozen=True, slots=True)
class Outlook(Generic[_Holder]):
    """Knowledge of an open step: who wants it, what it requires, how long it still takes."""

    #: Steps that the same submissions want share one tuple.
    holders: tuple[_Holder, ...]
    kind: Requirements
    #: None where it has no history.
    rest: Expected | None
    #: It has run for longer than expected.
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """The open work of one kind: of one submission, and of all."""

    kind: Requirements
    steps: int
    least_s: float
    most_s: float
    all_s: float
    #: Submissions with open work of this kind.
    holders: int
    slots: int

    @property
    def sooner_s(self) -> float:
        """Seconds that the workers need for this submission's work alone."""
        return self.least_s / self.slots if self.slots else 0.0

    @property
    def later_s(self) -> float:
        """Seconds that they need where other submissions take their turns."""
        return min(self.all_s, self.most_s * max(1, self.holders)) / self.slots if self.slots else 0.0


@dataclass(frozen=True, slots=True)
class Estimate(Generic[_Step]):
    """End of one submission in seconds from now, and the reason that it is not earlier."""

    sooner_s: float
    #: None where no end can be foreseen.
    later_s: float | None
    bound: Bound
    #: What `capacity` and `no_worker` are about.
    bound_kind: Requirements | None
    #: Open steps; those without history, and those that run longer than expected.
    steps: int
    unknown: int
    overdue: int
    #: The first steps of the longest path, in the order of building; all `path_steps` take `path_s` if they take long.
    path: tuple[_Step, ...]
    path_steps: int
    path_s: float
    #: The kind that takes longest first.
    loads: tuple[Load, ...]


@dataclass(slots=True)
class _Sum:
    """Open work of one kind that the same submissions want."""

    steps: int = 0
    unknown: int = 0
    overdue: int = 0
    least_s: float = 0.0
    most_s: float = 0.0


@dataclass(slots=True)
class _Group(Generic[_Holder]):
    """The steps that the same submissions want, by kind, and the longest paths that end in one of them."""

    holders: tuple[_Holder, ...]
    sums: dict[int, _Sum] = field(default_factory=dict)
    least_s: float = 0.0
    slack_s: float = 0.0
    #: Seconds, length and last step of the longest path; the longer one where seconds say nothing.
    longest: tuple[float, int, int] = (0.0, 0, -1)


class _Survey(Generic[_Step, _Holder]):
    """All open steps with what is known of each, in columns: there may be hundreds of thousands."""

    def __init__(self, usual_s: float) -> None:
        self._usual_s = usual_s
        self.steps: list[_Step] = []
        self.least = array("d")
        #: -1 where it is not known.
        self.most = array("d")
        self.kind_of = array("l")
        self.group_of = array("l")
        self.kinds: dict[Requirements, int] = {}
        self.groups: list[_Group[_Holder]] = []
        self.by_depth: dict[int, list[int]] = {}
        self._by_holders: dict[int, int] = {}
        self._known, self._known_s = 0, 0.0

    def take(self, step: _Step, outlook: Outlook[_Holder]) -> None:
        """Take in one step."""
        rest, number = outlook.rest, len(self.steps)
        kind = self.kinds.setdefault(outlook.kind, len(self.kinds))
        # By identity: the hash of a tuple costs its length.
        group = self._by_holders.setdefault(id(outlook.holders), len(self.groups))
        if group == len(self.groups):
            self.groups.append(_Group(outlook.holders))
        total = self.groups[group].sums.setdefault(kind, _Sum())
        total.steps += 1
        total.overdue += outlook.overdue
        if rest is None:
            total.unknown += 1
        else:
            total.least_s += rest.least_s
            total.most_s += rest.most_s
            self._known += 1
            self._known_s += rest.most_s
        self.steps.append(step)
        self.least.append(rest.least_s if rest is not None else 0.0)
        self.most.append(rest.most_s if rest is not None else -1.0)
        self.kind_of.append(kind)
        self.group_of.append(group)
        self.by_depth.setdefault(step.depth, []).append(number)

    @property
    def guess_s(self) -> float:
        """Seconds that stand for those of a step without history."""
        return max(self._usual_s, self._known_s / self._known) if self._known else 0.0


def estimating(
    steps: Iterable[_Step],
    look: Callable[[_Step], Outlook[_Holder] | None],
    slots: Callable[[Requirements], int],
    wanted: Iterable[_Holder],
    *,
    lead: Callable[[Requirements], float] = lambda _: 1.0,
    surprise: Callable[[int], float] = lambda _: 0.0,
    usual_s: float = 0.0,
) -> Generator[Pause, None, dict[_Holder, Estimate[_Step]]]:
    """Return the estimate of each of `wanted`, with pauses; one without open steps has none.

    Every path of every submission is in `steps`. `look` may return None for a step that is finished by then. `slots`
    are the builds that workers do at one time for a kind, `lead` is what a step takes on the fastest of them, as a part
    of what it takes on the mean. `surprise` are the seconds of the longest of so many steps without
    history, `usual_s` those of one, at least.
    """
    survey: _Survey[_Step, _Holder] = _Survey(usual_s)
    for count, step in enumerate(steps, 1):
        outlook = look(step)
        if outlook is not None:
            survey.take(step, outlook)
        if not count % PIECE:
            yield PAUSE
    slots_of = {number: slots(kind) for kind, number in survey.kinds.items()}
    leads = {number: lead(kind) for kind, number in survey.kinds.items()}
    via = yield from _paths(survey, slots_of, leads)
    loads = yield from _loads(survey, slots_of)
    return (yield from _estimates(survey, via, loads, wanted, surprise))


def _paths(
    survey: _Survey[_Step, _Holder], slots_of: Mapping[int, int], leads: Mapping[int, float]
) -> Generator[Pause, None, array[int]]:
    """Find the longest path that ends in each step, by its group; returns the step before each one on it, or -1.

    The deepest steps come first, so that a step comes after its needs.
    """
    count = len(survey.steps)
    guess_s = survey.guess_s
    beside = {kind: 1 - 1 / slots if slots else 0.0 for kind, slots in slots_of.items()}
    least, most, slack = array("d", bytes(8 * count)), array("d", bytes(8 * count)), array("d", bytes(8 * count))
    length, via = array("l", bytes(array("l").itemsize * count)), array("l", [-1]) * count
    number_of: dict[OpenStep, int] = {}
    looked_at = 0
    for depth in sorted(survey.by_depth, reverse=True):
        for number in survey.by_depth[depth]:
            step = survey.steps[number]
            low = high = beside_s = 0.0
            longest, before = 0, -1
            for need in step.needs:
                looked_at += 1
                at = number_of.get(need)
                if at is None:
                    continue
                low, beside_s = max(low, least[at]), max(beside_s, slack[at])
                if (most[at], length[at]) > (high, longest):
                    high, longest, before = most[at], length[at], at
                if looked_at >= PIECE:
                    looked_at = 0
                    yield PAUSE
            rest_s = survey.most[number] if survey.most[number] >= 0 else guess_s
            kind = survey.kind_of[number]
            least[number], most[number] = low + survey.least[number] * leads[kind], high + rest_s
            slack[number] = beside_s + rest_s * beside[kind]
            length[number], via[number] = longest + 1, before
            number_of[step] = number
            group = survey.groups[survey.group_of[number]]
            group.least_s = max(group.least_s, least[number])
            group.slack_s = max(group.slack_s, slack[number])
            group.longest = max(group.longest, (most[number], longest + 1, number))
            looked_at += 1
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
    return via


@dataclass(slots=True)
class _All:
    """All open work of one kind."""

    slots: int
    work_s: float = 0.0
    holders: set[Hashable] = field(default_factory=set)


def _loads(survey: _Survey[_Step, _Holder], slots_of: Mapping[int, int]) -> Generator[Pause, None, dict[int, _All]]:
    guess_s = survey.guess_s
    loads = {kind: _All(slots) for kind, slots in slots_of.items()}
    looked_at = 0
    for group in survey.groups:
        for kind, own in group.sums.items():
            loads[kind].work_s += own.most_s + own.unknown * guess_s
            loads[kind].holders.update(group.holders)
            looked_at += 1 + len(group.holders)
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
    return loads


def _estimates(
    survey: _Survey[_Step, _Holder],
    via: array[int],
    loads: Mapping[int, _All],
    wanted: Iterable[_Holder],
    surprise: Callable[[int], float],
) -> Generator[Pause, None, dict[_Holder, Estimate[_Step]]]:
    groups: dict[_Holder, list[_Group[_Holder]]] = {holder: [] for holder in wanted}
    looked_at = 0
    for group in survey.groups:
        for holder in groups.keys() & group.holders:
            groups[holder].append(group)
        looked_at += 1 + len(group.holders)
        if looked_at >= PIECE:
            looked_at = 0
            yield PAUSE
    found: dict[_Holder, Estimate[_Step]] = {}
    for holder, its in groups.items():
        if its:
            found[holder] = yield from _estimate(survey, via, loads, its, surprise)
    return found


def _estimate(
    survey: _Survey[_Step, _Holder],
    via: array[int],
    loads: Mapping[int, _All],
    groups: list[_Group[_Holder]],
    surprise: Callable[[int], float],
) -> Generator[Pause, None, Estimate[_Step]]:
    sums: dict[int, _Sum] = {}
    for count, group in enumerate(groups, 1):
        for kind, part in group.sums.items():
            total = sums.setdefault(kind, _Sum())
            total.steps += part.steps
            total.unknown += part.unknown
            total.overdue += part.overdue
            total.least_s += part.least_s
            total.most_s += part.most_s
        if not count % PIECE:
            yield PAUSE
    kinds = list(survey.kinds)
    own = [
        Load(
            kinds[kind],
            total.steps,
            total.least_s,
            total.most_s + total.unknown * survey.guess_s,
            loads[kind].work_s,
            len(loads[kind].holders),
            loads[kind].slots,
        )
        for kind, total in sums.items()
    ]
    own.sort(key=lambda load: (bool(load.slots), -load.later_s, -load.steps, load.kind.system, load.kind.features))
    steps, unknown = sum(total.steps for total in sums.values()), sum(total.unknown for total in sums.values())
    least_s = max(group.least_s for group in groups)
    busiest = max(own, key=lambda load: load.sooner_s)
    sooner_s = max(least_s, busiest.sooner_s)
    bound: Bound = "path" if least_s >= busiest.sooner_s else "capacity"
    later_s: float | None = (
        max(group.slack_s for group in groups)
        + sum(load.later_s for load in own)
        + (surprise(unknown) if unknown else 0.0)
    )
    kind_of_bound = busiest.kind if bound == "capacity" else None
    if not own[0].slots:
        bound, kind_of_bound, later_s = "no_worker", own[0].kind, None
    elif unknown == steps:
        bound, kind_of_bound, later_s = "unknown", None, None
    path_s, path_steps, last = max(group.longest for group in groups)
    path = yield from _path(survey, via, last)
    return Estimate(
        sooner_s=sooner_s,
        # Both are sums of the same numbers in another order.
        later_s=None if later_s is None else max(later_s, sooner_s),
        bound=bound,
        bound_kind=kind_of_bound,
        steps=steps,
        unknown=unknown,
        overdue=sum(total.overdue for total in sums.values()),
        path=path,
        path_steps=path_steps,
        path_s=path_s,
        loads=tuple(own),
    )


def _path(survey: _Survey[_Step, _Holder], via: array[int], last: int) -> Generator[Pause, None, tuple[_Step, ...]]:
    """Return the first steps of the path that ends in `last`."""
    way: list[int] = []
    while last >= 0:
        way.append(last)
        last = via[last]
        if not len(way) % PIECE:
            yield PAUSE
    return tuple([survey.steps[number] for number in way[: -PATH_NAMED - 1 : -1]])
