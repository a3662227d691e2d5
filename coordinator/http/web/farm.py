"""View of the farm's page: what runs where, what each queue waits for, submissions, troubles."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from coordinator.api.estimates import ThroughputView
from coordinator.api.models import EtaView, FarmView, StepStatus, WorkerView
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.lines import QueueLine, SlotLine, SubmissionLine, queue_lines, slot_lines, submission_line
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.throughput import ThroughputCard, throughput_card
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.throughput import DAY, HOUR, Throughput
from coordinator.readmodel.views import Views
from infra.slices import in_slices
from scheduler.model import Requirements
from workers.wire.messages import Stage

#: Workers on the page, slots and queues of each; their own pages have the rest.
WORKERS_SHOWN: Final = 100
SLOTS_SHOWN: Final = 64
#: Free slots of one worker that have a cell each; more share one, so that queues and troubles stay in sight.
FREE_SHOWN: Final = 4
QUEUES_SHOWN: Final = 30
SUBMISSIONS_SHOWN: Final = 12
#: Minutes over which the rate is taken.
RATE_MINUTES: Final = 5
#: Submissions looked at between two pauses.
_ROWS_LOOKED_AT: Final = 500
#: Stages in which a lease has a slot.
_IN_SLOT: Final = (Stage.FETCHING, Stage.BUILDING)
_PRESENT: Final = ("online", "draining", "quarantined", "silent")


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """A worker with its slots."""

    view: WorkerView
    leases: tuple[SlotLine, ...]
    #: Slots that nothing runs in, and leases that are not shown.
    free: int
    more: int

    @property
    def free_cells(self) -> Sequence[str]:
        """Texts of the cells of free slots."""
        return ("free",) * self.free if self.free <= FREE_SHOWN else (f"{self.free:,} free",)


@dataclass(frozen=True, slots=True)
class FarmData:
    """The whole page."""

    farm: FarmView
    workers: tuple[WorkerLine, ...]
    worker_total: int
    #: Names of workers that are no longer there.
    gone: tuple[str, ...]
    slots: int
    counts: Mapping[str, int]
    queues: tuple[QueueLine, ...]
    queue_total: int
    submissions: tuple[SubmissionLine, ...]
    submission_total: int
    submissions_running: int
    #: Foreseen ends of those that run, by submission.
    ends: Mapping[str, EtaView | None]
    throughput: tuple[ThroughputCard, ...]
    #: Builds a minute, lately.
    rate: str

    @property
    def waiting(self) -> int:
        """Steps that wait for others."""
        return self.counts.get(StepStatus.WAITING, 0)


class FarmPage:
    """The page at `/`."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        views: Views,
        farm: Callable[[], FarmView],
        queues: Callable[[], Mapping[Requirements, str]],
        throughput: Throughput,
        renderer: PageRenderer,
        streams: LiveStreams,
    ) -> None:
        self._throughput = throughput
        self._views = views
        self._farm = farm
        self._queues = queues
        self._renderer = renderer
        self._streams = streams

    async def show(self, request: web.Request) -> web.Response:
        """Show the farm."""
        data = await self._data()
        return html(await self._renderer.page("farm.html", visitor=request[VISITOR], page=data))

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Stream what changes of it, for as long as the coordinator runs."""
        return await self._streams.serve(request, self._parts)

    async def _parts(self) -> tuple[Mapping[str, str], bool]:
        data = await self._data()
        return await self._renderer.parts("farm.html", page=data), False

    async def _data(self) -> FarmData:
        hour, day = await self._throughput.of(HOUR), await self._throughput.of(DAY)
        return await in_slices(self.gathering(hour, day))

    def gathering(self, hour: ThroughputView, day: ThroughputView) -> Generator[None, None, FarmData]:
        """Return what the page shows, with pauses."""
        views = self._views
        everyone = views.workforce.views()
        workers = [worker for worker in everyone if worker.state in _PRESENT]
        lines = []
        for worker in workers[:WORKERS_SHOWN]:
            yield
            lines.append(self._worker(worker))
        running: list[SubmissionRow] = []
        ended: list[SubmissionRow] = []
        rows = views.submission_rows()
        for count, row in enumerate(reversed(rows), 1):
            (ended if row.ended or row.withdrawn else running).append(row)
            if not count % _ROWS_LOOKED_AT:
                yield
        submissions = []
        shown = [*running, *ended][:SUBMISSIONS_SHOWN]
        for row in shown:
            yield
            submissions.append(submission_line(views, row))
        cards = [
            (yield from throughput_card("hour", "Last hour", hour)),
            (yield from throughput_card("day", "Last day", day)),
        ]
        newest = hour.latest(RATE_MINUTES)
        queues = queue_lines(views.ready(), self._queues())
        return FarmData(
            farm=self._farm(),
            workers=tuple(lines),
            worker_total=len(workers),
            gone=tuple(worker.name for worker in everyone if worker.state == "gone"),
            slots=sum(worker.slots for worker in workers),
            counts=views.step_counts(),
            queues=tuple(queues[:QUEUES_SHOWN]),
            queue_total=len(queues),
            submissions=tuple(submissions),
            submission_total=len(rows),
            submissions_running=len(running),
            ends={row.id: views.eta_of(row) for row in shown},
            throughput=tuple(cards),
            rate=f"{(newest.finished + newest.failed) / RATE_MINUTES:.1f}",
        )

    def _worker(self, worker: WorkerView) -> WorkerLine:
        leases = slot_lines(self._views, worker, SLOTS_SHOWN)
        return WorkerLine(
            worker,
            leases,
            free=max(0, worker.slots - sum(stage in _IN_SLOT for _, stage in worker.leases)),
            more=max(0, len(worker.leases) - SLOTS_SHOWN),
        )
