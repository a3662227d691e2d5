"""View of the workers' page: what each offers, does, and why it gets no work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from aiohttp import web

from coordinator.api.models import WorkerView
from coordinator.fleet.draining import Drain, drain_worker
from coordinator.http.web.guards import FORM, VISITOR, html, seen_elsewhere
from coordinator.http.web.lines import SlotLine, slot_lines
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.rendering import PageRenderer
from coordinator.readmodel.views import Views

#: Workers on the page.
WORKERS_SHOWN: Final = 200
#: Leases of each; the farm's page has more.
LEASES_SHOWN: Final = 16


@dataclass(frozen=True, slots=True)
class WorkersData:
    """The whole page."""

    workers: tuple[WorkerView, ...]
    #: What runs on each, by its name.
    leases: Mapping[str, tuple[SlotLine, ...]]
    total: int
    counts: Mapping[str, int]


class WorkersPage:
    """The page at `/workers`."""

    def __init__(
        self,
        views: Views,
        drain: Drain,
        renderer: PageRenderer,
        streams: LiveStreams,
    ) -> None:
        self._views = views
        self._drain = drain
        self._renderer = renderer
        self._streams = streams

    async def show(self, request: web.Request) -> web.Response:
        """Show all workers."""
        return html(await self._renderer.page("workers.html", visitor=request[VISITOR], page=self.gather()))

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Stream what changes of them."""
        return await self._streams.serve(request, self._parts)

    async def drain(self, request: web.Request) -> web.StreamResponse:
        """Give a worker no new leases, or again."""
        name = request.match_info["name"]
        await drain_worker(self._views, self._drain, name, on=request[FORM].get("on") == "yes")
        return seen_elsewhere(f"/workers#worker-{quote(name, safe='')}")

    async def _parts(self) -> tuple[Mapping[str, str], bool]:
        return await self._renderer.parts("workers.html", page=self.gather()), False

    def gather(self) -> WorkersData:
        """Return what the page shows."""
        workers = self._views.workforce.views()
        shown = tuple(workers[:WORKERS_SHOWN])
        leases = {worker.name: slot_lines(self._views, worker, LEASES_SHOWN) for worker in shown}
        return WorkersData(shown, leases, len(workers), self._views.workforce.counts())
