"""Foreseen ends of submissions, kept in memory: worked out for those that somebody looks at, all in one pass.

Readers are answered at once with what is known by then. A pass walks all open steps of the farm in slices
(`readmodel.estimate`), because submissions share steps and slots; it runs only where something has moved since the last
one, or time has passed, and rests in proportion to what it cost. What is kept of it is bounded by `WANTED` submissions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from coordinator.api.estimates import LoadView, PathStepView
from coordinator.api.models import EtaView, StepStatus
from coordinator.readmodel.estimate import BuildPace, Estimate, Expected, Outlook, estimating, rest_of
from coordinator.readmodel.rows import StepRow, SubmissionRow, notify_submission_changed
from coordinator.readmodel.views import Views
from infra.clock import Clock
from infra.slices import in_slices
from scheduler.farm import Farm
from scheduler.forsaken import describe_unserved
from scheduler.model import Requirements, StepState, SubmissionId
from scheduler.pauses import Pause
from scheduler.reasons import unserved
from scheduler.records import Step

#: Submissions whose ends are worked out: those that were asked for last, within so many seconds.
WANTED: Final = 64
WANTED_S: Final = 90.0
#: Seconds between two passes, at least and for each step that was walked: a pass takes some 10 µs a step, and so a
#: twentieth of the loop. A part of that where an end is asked for of which nothing is worked out yet.
PAUSE_S: Final = 0.25
PAUSE_PER_STEP_S: Final = 0.000_2
PAUSE_PART_OF_NEW: Final = 0.25
#: Seconds more between two passes where nothing of that kind is asked for: people see ends to the second.
KNOWN_S: Final = 0.75
#: Seconds after which what has not moved is worked out anew, because time has passed.
STALE_S: Final = 30.0
#: Seconds by which an end has to move before watchers are sent it, at least and as a part of what is left.
MOVED_S: Final = 1.0
MOVED_PART: Final = 0.02


class Durations(Protocol):
    """Source of the seconds that builds take. Answers come at once; what is not known now may be known later."""

    @property
    def answers(self) -> int:
        """A number that changes when something new is known."""

    def expected(self, name: str, system: str) -> Expected | None:
        """Return the seconds that a build of this name takes, None where that is not known."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """The estimate of one submission, with what its sentences were made of."""

    view: EtaView
    estimate: Estimate[Step]


class Etas:
    """The foreseen ends. `run` works them out until it is cancelled."""

    def __init__(self, views: Views, farm: Farm, durations: Durations, clock: Clock) -> None:
        self._views = views
        self._farm = farm
        self._durations = durations
        self._clock = clock
        #: Submissions that are looked at, and when last.
        self._wanted: OrderedDict[SubmissionId, float] = OrderedDict()
        self._found: dict[SubmissionId, Foreseen] = {}
        self._asked = asyncio.Event()
        #: Something is asked for of which nothing is worked out.
        self._lacking = asyncio.Event()
        #: Set once the pass that is under way, or comes next, has ended.
        self._round = asyncio.Event()
        self._version: tuple[int, int] | None = None
        self._worked_out_at = 0.0
        self._walked = 0
        #: Gives the seconds of the longest of so many steps without history.
        self.surprise_s: Callable[[int], float] = lambda _: 0.0
        #: Gives the mean seconds of all that was ever built.
        self.usual_s: Callable[[], float] = lambda: 0.0
        #: Of the pass under way.
        self._paces: dict[Requirements, BuildPace] = {}

    @property
    def wanted(self) -> int:
        """Number of submissions whose ends are worked out."""
        return len(self._wanted)

    def of(self, row: SubmissionRow) -> EtaView | None:
        """Return the foreseen end of a submission; None where it has ended, or is not worked out yet."""
        found = self.foreseen(row)
        return None if found is None else found.view

    def foreseen(self, row: SubmissionRow) -> Foreseen | None:
        """Return what `of` returns, with all that it was made of."""
        if row.ended or row.withdrawn:
            return None
        self._wanted[row.id] = self._clock.now()
        self._wanted.move_to_end(row.id)
        if len(self._wanted) > WANTED:
            self._found.pop(self._wanted.popitem(last=False)[0], None)
        found = self._found.get(row.id)
        if found is None:
            self._lacking.set()
        if found is None or not self._is_fresh():
            self._asked.set()
        return found

    def wake(self) -> None:
        """Look again at once, for those who watch: something is known that was not."""
        if any(row.watchers for row in self._looked_at()):
            self._asked.set()

    async def wait_for(self, rows: Iterable[SubmissionRow], most_s: float) -> None:
        """Have the ends of some submissions worked out, and wait for that at most so long."""
        missing = [row for row in rows if self.foreseen(row) is None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while any(self.foreseen(row) is None and not (row.ended or row.withdrawn) for row in missing):
                    await self._round.wait()

    async def run(self) -> None:
        """Work out what is asked for; what is watched without a question is worked out anew each `STALE_S`.

        An end without a watcher or a question is not: its next reader has it worked out.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STALE_S):
                    await self._asked.wait()
            rows, asked = self._looked_at(), self._asked.is_set()
            self._asked.clear()
            self._lacking.clear()
            if not (asked or any(row.watchers for row in rows)):
                continue
            if rows and (not self._is_fresh() or any(row.id not in self._found for row in rows)):
                await in_slices(self.working_out(rows), can_wait=True)
            passed, self._round = self._round, asyncio.Event()
            passed.set()
            await self._rest()

    async def _rest(self) -> None:
        """Let others have the loop for a time in proportion to what the last pass cost."""
        rest_s = self._walked * PAUSE_PER_STEP_S
        await asyncio.sleep(PAUSE_S + PAUSE_PART_OF_NEW * rest_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(KNOWN_S, (1 - PAUSE_PART_OF_NEW) * rest_s)):
                await self._lacking.wait()

    def _is_fresh(self) -> bool:
        stale = self._clock.now() - self._worked_out_at >= STALE_S
        return not stale and self._version == (self._views.moves, self._durations.answers)

    def _looked_at(self) -> list[SubmissionRow]:
        """Return the submissions that were asked for lately or are watched; others are forgotten."""
        now = self._clock.now()
        rows = []
        for name, asked_at in list(self._wanted.items()):
            row = self._views.find(name)
            if row is None or row.ended or row.withdrawn or (now - asked_at > WANTED_S and not row.watchers):
                del self._wanted[name]
                self._found.pop(name, None)
            else:
                rows.append(row)
        return rows

    def working_out(self, rows: list[SubmissionRow]) -> Generator[Pause, None, None]:
        """Work out the ends of some submissions, with pauses."""
        version = (self._views.moves, self._durations.answers)
        now = self._clock.now()
        live: dict[int, tuple[tuple[SubmissionRow, ...], tuple[SubmissionRow, ...]]] = {}

        def look(step: Step) -> Outlook[SubmissionRow] | None:
            row = self._views.row_of(step.key) if step.engaged and step.state is not StepState.DONE else None
            # Without a recipe nothing can be said of it; what explains must not be what fails.
            if row is None or not step.recipes:
                return None
            # Most steps share their tuple of submissions; the first of a pair keeps its identity from being reused.
            its, holders = live.get(id(row.submissions)) or (None, ())
            if its is None:
                holders = tuple([sub for sub in row.submissions if not (sub.ended or sub.withdrawn)])
                live[id(row.submissions)] = (row.submissions, holders)
            return self._outlook(step, row, holders, now) if holders else None

        # A copy: steps may come and go at a pause.
        steps = list(self._farm.state.steps.values())
        self._paces.clear()
        found = yield from estimating(
            steps,
            look,
            lambda kind: self._pace(kind).slots,
            rows,
            lead=lambda kind: self._pace(kind).lead,
            surprise=self.surprise_s,
            usual_s=self.usual_s(),
        )
        self._walked = len(steps)
        self._version, self._worked_out_at = version, now
        for row in rows:
            estimate, before = found.get(row), self._found.pop(row.id, None)
            if estimate is None or row.id not in self._wanted:
                continue
            self._found[row.id] = fresh = Foreseen(self._view(estimate, now), estimate)
            if before is None or _differs(before.view, fresh.view):
                notify_submission_changed(row)

    def _outlook(
        self, step: Step, row: StepRow, holders: tuple[SubmissionRow, ...], now: float
    ) -> Outlook[SubmissionRow]:
        kind = step.recipe.requirements
        if row.state is StepStatus.PUBLISHING:
            return Outlook(holders, kind, Expected(0.0, 0.0))
        name = self._views.name_of(row)
        expected = self._durations.expected(name, kind.system)
        if row.state is not StepStatus.RUNNING:
            return Outlook(holders, kind, rest_of(expected, self._pace(kind).mean, None)[0])
        holder = self._farm.state.builders.get(step.builder)
        speed = 1.0 if holder is None else holder.speed(kind.system)
        # One that follows another at its builder began, or begins, after its lease.
        follows = holder is not None and step.key in holder.followers
        began_at = now if follows else max(row.life.started_at, step.asked_at)
        rest, overdue = rest_of(expected, speed, max(0.0, now - began_at))
        return Outlook(holders, kind, rest, overdue)

    def _pace(self, kind: Requirements) -> BuildPace:
        """Return how fast builds of a kind are done."""
        known = self._paces.get(kind)
        if known is None:
            slots = self._views.workforce.slots
            known = BuildPace.of((slots(name), speed) for name, speed in self._farm.speeds(kind).items())
            self._paces[kind] = known
        return known

    def _view(self, estimate: Estimate[Step], now: float) -> EtaView:
        return EtaView(
            at=now,
            sooner_at=now + estimate.sooner_s,
            later_at=0.0 if estimate.later_s is None else now + estimate.later_s,
            bound=estimate.bound,
            because=self._because(estimate),
            steps=estimate.steps,
            unknown=estimate.unknown,
            overdue=estimate.overdue,
        )

    def _because(self, estimate: Estimate[Step]) -> str:
        """Return the clause that says what bounds the end."""
        match estimate.bound, estimate.bound_kind:
            case "no_worker", Requirements() as kind:
                reason = unserved(self._farm.state, kind)
                if reason is not None:
                    return describe_unserved(reason)
                return f"every worker for {named(kind)} drains or is in quarantine"
            case "capacity", Requirements() as kind:
                load = next(load for load in estimate.loads if load.kind == kind)
                slots = f"{load.slots} slots" if load.slots != 1 else "the only slot"
                others = load.holders - 1
                shared = f", shared with {_counted(others, 'other submission')}" if others else ""
                return f"{slots} for {named(kind)} and {_counted(load.steps, 'step')} for them{shared}"
            case _:
                return self._path_clause(estimate)

    def _path_clause(self, estimate: Estimate[Step]) -> str:
        first = estimate.path[0] if estimate.path else None
        row = self._views.row_of(first.key) if first is not None else None
        if row is None:
            return "its last step"
        length = _counted(estimate.path_steps, "step")
        clause = f"the critical path of {length} through {self._views.name_of(row)}"
        if row.state is StepStatus.READY:
            waits = self._views.step_view(row).waiting_for
            return f"{clause}, which waits: {waits}" if waits else clause
        return clause

    def path(self, foreseen: Foreseen) -> tuple[PathStepView, ...]:
        """Render the first steps of the critical path to come, those that are still known."""
        shown = []
        for step in foreseen.estimate.path:
            row = self._views.row_of(step.key)
            if row is None:
                continue
            expected = self._durations.expected(self._views.name_of(row), step.recipe.requirements.system)
            running = row.state is StepStatus.RUNNING
            shown.append(
                PathStepView(
                    step=row.key,
                    name=self._views.name_of(row),
                    state=row.state,
                    worker=row.life.builder,
                    started_at=row.life.started_at if running else 0.0,
                    takes_s=None if expected is None else expected.most_s,
                )
            )
        return tuple(shown)


def _differs(before: EtaView, after: EtaView) -> bool:
    """Return whether a person should see the change: watchers get nothing for what moved by a second."""
    if (before.bound, before.because, bool(before.later_at)) != (after.bound, after.because, bool(after.later_at)):
        return True
    moved_s = max(abs(after.sooner_at - before.sooner_at), abs(after.later_at - before.later_at))
    return moved_s > max(MOVED_S, MOVED_PART * (max(after.sooner_at, after.later_at) - after.at))


def named(kind: Requirements) -> str:
    """Return a kind of steps as people call it."""
    return f"{kind.system} with {', '.join(kind.features)}" if kind.features else kind.system


def load_views(foreseen: Foreseen) -> tuple[LoadView, ...]:
    """Render the open work by kind."""
    return tuple(
        LoadView(
            system=load.kind.system,
            features=load.kind.features,
            steps=load.steps,
            work_s=load.most_s,
            slots=load.slots,
            others=max(0, load.holders - 1),
        )
        for load in foreseen.estimate.loads
    )


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
