"""Handlers for questions of people: why a step waits or ran, what differs, what the farm does, how a name goes on.

Each looks at a bounded part of what is known and gives the event loop back while it does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import routes
from coordinator.api.estimates import RunningView, ThroughputView
from coordinator.api.models import (
    FarmView,
    StepStatus,
    StepView,
    WorkerView,
)
from coordinator.api.questions import (
    ActivityView,
    CompletionsView,
    CompletionView,
    PlacingView,
    QueueView,
    SlotView,
    StepReasonsView,
    WantedView,
    WorkerActivityView,
)
from coordinator.api.route import Route
from coordinator.errors import BadRequestError
from coordinator.http.answers import answer
from coordinator.readmodel.comparisons import WHOLE
from coordinator.readmodel.etas import Etas
from coordinator.readmodel.rows import ACTIVE, StepRow, SubmissionRow
from coordinator.readmodel.runs import Runs
from coordinator.readmodel.throughput import HOUR, Throughput
from coordinator.readmodel.views import Views
from infra.slices import in_slices
from scheduler.model import Requirements, StepKey

#: Steps that a step stands on which are looked at, and named; submissions that are named.
BELOW_LOOKED_AT: Final = 2000
BELOW_NAMED: Final = 10
WANTED_NAMED: Final = 5
#: Steps of the longest way up to a root.
WAY_UP: Final = 256
#: Rows looked at between two pauses.
_PIECE: Final = 500
#: Kinds of names.
COMPLETED: Final = ("steps", "submissions", "workers")
#: Names that one answer completes.
COMPLETIONS: Final = 100
#: Workers of one answer, and leases of each.
WORKERS_SHOWN: Final = 500
LEASES_SHOWN: Final = 64
QUEUES_SHOWN: Final = 50
#: Running submissions of one answer, and seconds for which it waits for their ends to be worked out.
RUNNING_SHOWN: Final = 20
ROOTS_NAMED: Final = 3
ETA_WAIT_S: Final = 0.2
_PRESENT: Final = ("online", "draining", "quarantined", "silent")
#: Steps that are, or will be, placed on a worker.
_PLACED: Final = frozenset({StepStatus.WAITING, StepStatus.READY, StepStatus.RUNNING})
_PAUSED: Final = "tried again after a pause"


class Questions:
    """The handlers, with what they ask. `needs` gives the needs of a step that are not done, `queues` the reasons."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        views: Views,
        farm: Callable[[], FarmView],
        needs: Callable[[StepKey], Sequence[StepKey]],
        queues: Callable[[], Mapping[Requirements, str]],
        placing: Callable[[StepKey, str, str], PlacingView | None],
        runs: Runs,
        etas: Etas,
        throughput: Throughput,
    ) -> None:
        self._etas = etas
        self._throughput = throughput
        self._views = views
        self._farm = farm
        self._needs = needs
        self._queues = queues
        self._placing = placing
        self._runs = runs

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            routes.WHY: self.why,
            routes.DIFFERENCE: self.difference,
            routes.ACTIVITY: self.activity,
            routes.COMPLETIONS: self.completions,
        }

    async def why(self, request: web.Request) -> web.Response:
        """Say why a step waits, failed or ran, and who wants it."""
        row = self._views.step(request.match_info["key"])
        cause = self._cause(row)
        await self._views.recipes.fetch([row] if cause is None else [row, cause])
        reasons = await in_slices(self._reasons(row))
        await self._runs.differences.refresh()
        run = await self._runs.of(row, WHOLE)
        if not reasons.wanted_count:
            reasons = replace(reasons, wanted_by=run.built_for, wanted_count=run.built_for_count)
        return answer(replace(reasons, ran=run.reasons, difference=run.difference))

    async def difference(self, request: web.Request) -> web.Response:
        """Say what differs between a step and the last build of its name, or another one."""
        key, other = request.match_info["key"], request.query.get("with", "")
        return answer(await self._runs.differences.between(key, other))

    def _reasons(self, row: StepRow) -> Generator[None, None, StepReasonsView]:
        below = yield from self._below(row)
        holders = self._views.submissions_of(row.key)
        cause, step = self._cause(row), self._views.step_view(row)
        wanted = []
        for submission in holders[:WANTED_NAMED]:
            wanted.append(self._wanted(row, submission))
            yield
        return StepReasonsView(
            step=step,
            cause=None if cause is None else self._views.step_view(cause),
            below=below,
            wanted_by=tuple(wanted),
            wanted_count=len(holders),
            placing=self._placing(row.key, self._views.name_of(row), step.system) if row.state in _PLACED else None,
        )

    def _cause(self, row: StepRow) -> StepRow | None:
        return self._views.row_of(StepKey(row.life.cause)) if row.state is StepStatus.DOOMED else None

    def _below(self, row: StepRow) -> Generator[None, None, tuple[StepView, ...]]:
        """Return the steps at the bottom of what a step waits for: those that run first, then those that are ready."""
        seen = {row.key}
        stack = [row]
        bottom: list[StepRow] = []
        while stack and len(seen) < BELOW_LOOKED_AT:
            for key in self._needs(stack.pop().key):
                need = self._views.row_of(key)
                if need is None or key in seen:
                    continue
                seen.add(key)
                if need.state is StepStatus.WAITING:
                    stack.append(need)
                elif need.state is not StepStatus.DONE:
                    bottom.append(need)
            yield
        bottom.sort(key=lambda each: (each.state not in ACTIVE, each.life.started_at, each.key))
        return tuple([self._views.step_view(each) for each in bottom[:BELOW_NAMED]])

    def _wanted(self, row: StepRow, submission: SubmissionRow) -> WantedView:
        """Return one way from a root of the submission down to the step."""
        way = [row]
        while len(way) < WAY_UP and (above := self._views.above(way[-1], submission)) is not None:
            way.append(above)
        note = self._views.note(submission.id)
        attr = next((root.attr for root in note.roots if root.step == way[-1].key), "")
        names = tuple([self._views.name_of(each) for each in reversed(way)])
        return WantedView(submission=submission.id, label=note.label, attr=attr, path=names)

    async def activity(self, _request: web.Request) -> web.Response:
        """Say what the farm does now."""
        rows = await in_slices(self._running())
        await self._etas.wait_for(rows, ETA_WAIT_S)
        return answer(await in_slices(self._activity(rows, await self._throughput.of(HOUR))))

    def _running(self) -> Generator[None, None, list[SubmissionRow]]:
        """Return the newest submissions that run."""
        found: list[SubmissionRow] = []
        for count, row in enumerate(reversed(self._views.submission_rows()), 1):
            if not (row.ended or row.withdrawn):
                found.append(row)
            if len(found) == RUNNING_SHOWN:
                break
            if not count % _PIECE:
                yield
        return found

    def _run(self, row: SubmissionRow) -> RunningView:
        counts = row.counts
        note = self._views.note(row.id)
        attrs = ", ".join(root.attr for root in note.roots[:ROOTS_NAMED])
        return RunningView(
            id=row.id,
            label=note.label or attrs,
            done=row.held + counts[StepStatus.DONE],
            total=len(row.members),
            created_at=row.created_at,
            eta=self._etas.of(row),
        )

    def _activity(
        self, rows: Sequence[SubmissionRow], throughput: ThroughputView
    ) -> Generator[None, None, ActivityView]:
        present = [worker for worker in self._views.workforce.views() if worker.state in _PRESENT]
        workers = []
        for worker in present[:WORKERS_SHOWN]:
            workers.append(self._worker(worker))
            yield
        reasons = self._queues()
        queues = [
            QueueView(
                system=wanted.system,
                features=tuple(sorted(wanted.features)),
                count=count,
                reason=reasons.get(wanted, _PAUSED),
            )
            for wanted, count in self._views.ready().items()
        ]
        queues.sort(key=lambda queue: (-queue.count, queue.system, queue.features))
        return ActivityView(
            troubles=self._farm().troubles,
            steps=dict(self._views.step_counts()),
            submissions=dict(self._views.submission_counts()),
            workers=tuple(workers),
            worker_count=len(present),
            queues=tuple(queues[:QUEUES_SHOWN]),
            running=tuple([self._run(row) for row in rows]),
            throughput=throughput,
        )

    def _worker(self, worker: WorkerView) -> WorkerActivityView:
        leases = []
        for key, stage in worker.leases[:LEASES_SHOWN]:
            row = self._views.row_of(StepKey(key))
            life = row.life if row is not None else None
            leases.append(
                SlotView(
                    step=key,
                    name=key if row is None else self._views.name_of(row),
                    stage=stage,
                    phase="" if life is None else life.phase,
                    started_at=0.0 if life is None else life.started_at,
                    transfer=None if life is None else life.transfer,
                )
            )
        return WorkerActivityView(
            name=worker.name,
            state=worker.state,
            slots=worker.slots,
            leases=tuple(leases),
            lease_count=len(worker.leases),
            reason=worker.reason,
            record=worker.record,
        )

    async def completions(self, request: web.Request) -> web.Response:
        """Complete the beginning of a name."""
        beginning = request.query.get("beginning", "")
        kinds = dict.fromkeys((request.query.get("of") or ",".join(COMPLETED)).split(","))
        if not kinds.keys() <= set(COMPLETED):
            raise BadRequestError("`of` is steps, submissions, workers, or several of them with commas between.")
        items = [item for kind in kinds for item in (await self._completions(kind, beginning))[:COMPLETIONS]]
        return answer(CompletionsView(items=tuple(items)))

    async def _completions(self, kind: str, beginning: str) -> list[CompletionView]:
        match kind:
            case "submissions":
                return await in_slices(self._submissions(beginning))
            case "steps":
                return await in_slices(self._steps(beginning))
            case _:
                found = [CompletionView(value=each.name, help=each.state) for each in self._views.workforce.views()]
                return [each for each in found if each.value.startswith(beginning)]

    def _submissions(self, beginning: str) -> Generator[None, None, list[CompletionView]]:
        found = []
        for count, row in enumerate(reversed(self._views.submission_rows()), 1):
            if row.id.startswith(beginning):
                found.append(CompletionView(value=row.id, help=self._views.note(row.id).label or row.state.value))
            if len(found) == COMPLETIONS:
                break
            if not count % _PIECE:
                yield
        return found

    def _steps(self, beginning: str) -> Generator[None, None, list[CompletionView]]:
        """Return keys and names that begin so; of nothing, what runs or failed in the newest submissions."""
        found: dict[str, str] = {}
        for count, row in enumerate(self._completed(beginning), 1):
            if not count % _PIECE:
                yield
            if row is None:
                continue
            name = self._views.name_of(row)
            found[name if name.startswith(beginning) else row.key] = row.state.value
            if len(found) == COMPLETIONS:
                break
        return [CompletionView(value=value, help=state) for value, state in sorted(found.items())]

    def _completed(self, beginning: str) -> Generator[StepRow | None, None, None]:
        """Yield the steps that are offered, and None for those that are not."""
        if not beginning:
            for submission in reversed(self._views.submission_rows()):
                yield from list(submission.active.values())
                yield from list(submission.failed.values())
                yield None
            return
        for row in self._views.step_rows():
            # A key is a hash, a dash and the name with perhaps an output's.
            yield row if row.key.startswith(beginning) or row.key.startswith(beginning, _HASH_AND_DASH) else None


#: Where the name begins in a step's key.
_HASH_AND_DASH: Final = 33
