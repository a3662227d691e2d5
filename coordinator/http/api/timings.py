"""Handlers of the timelines of steps and submissions, and of the history of a package."""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import routes
from coordinator.api.route import Route
from coordinator.api.timeline_models import AttemptView
from coordinator.engine.timing_writer import TimingWriter
from coordinator.errors import NotFoundError
from coordinator.http.answers import answer
from coordinator.http.api.pages import Page, answer_page, cut, limit_of, position_of, words_of
from coordinator.readmodel.history import attempt_view, history_view
from coordinator.readmodel.views import Views
from coordinator.stores.timings import AttemptTiming, TimingStore
from infra.clock import Clock

#: Newest attempts that a history is made of.
HISTORY_ROWS: Final = 500


class TimingApi:
    """The handlers, with the rooms that they ask. What is not written yet is written first."""

    def __init__(self, views: Views, store: TimingStore, writer: TimingWriter, clock: Clock) -> None:
        self._views = views
        self._store = store
        self._writer = writer
        self._clock = clock

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            routes.TIMELINE: self.step,
            routes.SUBMISSION_TIMELINE: self.submission,
            routes.HISTORY: self.history,
        }

    async def step(self, request: web.Request) -> web.Response:
        """List the attempts of one step, the first one first; also of one that is forgotten, by its whole key."""
        text = request.match_info["key"]
        missing: NotFoundError | None = None
        try:
            key = str(self._views.step(text).key)
        except NotFoundError as error:
            missing, key = error, text
        await self._writer.flush()
        timings = await self._store.of_steps([key])
        if missing is not None and not timings:
            raise missing
        return await answer_page(request, cut(timings, position_of(request), limit_of(request)), self._view)

    async def submission(self, request: web.Request) -> web.Response:
        """List the attempts of a submission's steps since it came; a page is of so many steps, in their order."""
        row = self._views.submission(request.match_info["id"])
        position, limit = position_of(request), limit_of(request)
        outcomes = words_of(request, routes.SUBMISSION_TIMELINE.named("outcome"))
        worker = request.query.get("worker", "")
        members = row.members[position : position + limit]
        await self._writer.flush()
        timings = [
            timing
            for timing in await self._store.of_steps(members)
            if (timing.ended_at is None or timing.ended_at >= row.created_at)
            and (not outcomes or (timing.outcome or "running") in outcomes)
            and (not worker or timing.worker == worker)
        ]
        end = position + len(members)
        following = str(end) if end < len(row.members) else ""
        return await answer_page(request, Page(timings, following), self._view)

    async def history(self, request: web.Request) -> web.Response:
        """Show the summary of a package's attempts; `name` is with or without its version."""
        name, system = request.match_info["name"], request.query.get("system", "")
        await self._writer.flush()
        timings = await self._store.of_package(name, system, HISTORY_ROWS)
        if not timings:
            raise NotFoundError(
                f"no build of {name[:80]!r} is remembered; its name is that of the derivation, such as hello or "
                "hello-2.12."
            )
        return answer(history_view(name, timings))

    def _view(self, timing: AttemptTiming) -> AttemptView:
        if timing.outcome is None and timing.measured is None:
            timing.measured = self._views.timelines.so_far(timing.step, timing.attempt, self._clock.now())
        return attempt_view(timing)
