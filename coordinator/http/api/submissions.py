"""The JSON API: a small handler for each of most routes of `coordinator.api.routes`.

Handlers read the request, ask one room and answer with one model; whatever they raise becomes an `ErrorView` in
`coordinator.http.app`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import routes
from coordinator.api.limits import MAX_ROOTS
from coordinator.api.models import FarmView, RetryView, StepStatus
from coordinator.api.requests import BumpRequest, GrowRequest, IntakeQuery, SealRequest, SubmitRequest
from coordinator.api.route import Route
from coordinator.config import LimitSettings
from coordinator.engine.engine import Engine
from coordinator.errors import BadRequestError, ForbiddenError, NotFoundError
from coordinator.http.answers import answer
from coordinator.http.api.events import WatchStreams
from coordinator.http.api.pages import Page, answer_page, cut, limit_of, position_of, words_of
from coordinator.http.api.submission_filter import SubmissionFilter
from coordinator.http.bodies import STREAM_PATIENCE_S, BodyBounds, body_chunks, read_model
from coordinator.http.middleware import CLIENT
from coordinator.intake.growth import Growth
from coordinator.intake.intake import Intake
from coordinator.intake.submissions import Submissions
from coordinator.readmodel.explain import attempts, no_log
from coordinator.readmodel.rows import StepRow
from coordinator.readmodel.views import ROOTS_LISTED, Views
from coordinator.stores.logs import LogStore
from infra.slices import free_in_slices

#: Body of a submission: room for `MAX_ROOTS` roots as Nix names them.
SUBMIT_BYTES = 48 * 1024 * 1024
#: A root names an attribute, a derivation, limits and most often a few outputs.
ITEMS_PER_ROOT = 16
CONTAINERS_PER_ROOT = 3


@dataclass(frozen=True, slots=True)
class ApiBounds:
    """Bounds on the bodies of the two large requests."""

    question: BodyBounds
    submission: BodyBounds

    @classmethod
    def of(cls, limits: LimitSettings) -> ApiBounds:
        """Return the bounds that follow from the farm's limits."""
        members = 2 * limits.graph_size
        roots = min(limits.graph_size, MAX_ROOTS)
        return cls(
            BodyBounds(limits.request_bytes, items=members + 64, containers=16),
            BodyBounds(
                min(limits.request_bytes, SUBMIT_BYTES),
                items=roots * ITEMS_PER_ROOT + 64,
                containers=roots * CONTAINERS_PER_ROOT + 16,
            ),
        )


class Api:
    """The handlers, with the rooms that they ask."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        engine: Engine,
        views: Views,
        intake: Intake,
        submissions: Submissions,
        growth: Growth,
        logs: LogStore,
        farm: Callable[[], FarmView],
        streams: WatchStreams,
        *,
        bounds: ApiBounds,
    ) -> None:
        self._engine = engine
        self._views = views
        self._intake = intake
        self._submissions = submissions
        self._growth = growth
        self._logs = logs
        self._farm = farm
        self._streams = streams
        self._bounds = bounds

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            routes.MISSING: self.missing,
            routes.PUT_DERIVATIONS: self.put_derivations,
            routes.PUT_SOURCES: self.put_sources,
            routes.SUBMIT: self.submit,
            routes.SUBMISSIONS: self.submissions,
            routes.SUBMISSION: self.submission,
            routes.CANCEL: self.cancel,
            routes.BUMP: self.bump,
            routes.RETRY: self.retry,
            routes.ROOTS: self.roots,
            routes.GROW: self.grow,
            routes.SEAL: self.seal,
            routes.STEPS: self.steps,
            routes.EVENTS: self.events,
            routes.STEP: self.step,
            routes.RETRY_STEP: self.retry_step,
            routes.LOG: self.log,
            routes.WORKERS: self.workers,
            routes.FARM: self.farm,
            routes.HEALTH: self.health,
        }

    async def missing(self, request: web.Request) -> web.Response:
        """Answer what of a closure must be sent."""
        return answer(await self._intake.missing(await read_model(request, IntakeQuery, self._bounds.question)))

    async def put_derivations(self, request: web.Request) -> web.Response:
        """Take a stream of .drv files."""
        await self._intake.add_derivations(body_chunks(request, STREAM_PATIENCE_S), request.remote or "")
        return web.Response(status=204)

    async def put_sources(self, request: web.Request) -> web.Response:
        """Take a stream of input sources."""
        await self._intake.add_sources(body_chunks(request, STREAM_PATIENCE_S))
        return web.Response(status=204)

    async def submit(self, request: web.Request) -> web.Response:
        """Take a submission; the answer leaves once it is durable, and names few of its roots."""
        wish = await read_model(request, SubmitRequest, self._bounds.submission)
        row = await self._submissions.submit(wish, request[CLIENT].owner)
        roots: list[object] = list(wish.roots)
        del wish
        await free_in_slices(roots)
        return answer(self._views.submission_view(row, ROOTS_LISTED), status=201)

    async def grow(self, request: web.Request) -> web.Response:
        """Take further roots of an open submission; the answer leaves once they are durable."""
        wish = await read_model(request, GrowRequest, self._bounds.submission)
        self._require_owner(request)
        row = await self._growth.grow(request.match_info["id"], wish)
        return answer(self._views.submission_view(row, ROOTS_LISTED))

    async def seal(self, request: web.Request) -> web.Response:
        """End the growth of a submission."""
        wish = await read_model(request, SealRequest, self._bounds.submission)
        self._require_owner(request)
        row = await self._growth.seal(request.match_info["id"], wish)
        return answer(self._views.submission_view(row, ROOTS_LISTED))

    async def retry(self, request: web.Request) -> web.Response:
        """Let a submission run again."""
        self._require_owner(request)
        row = await self._submissions.retry(request.match_info["id"])
        return answer(self._views.submission_view(row, ROOTS_LISTED))

    async def retry_step(self, request: web.Request) -> web.Response:
        """Build a failed step again."""
        step, submissions = await self._submissions.retry_step(request.match_info["key"], request[CLIENT].may_change)
        names = tuple(row.id for row in submissions)
        return answer(RetryView(step=self._views.step_view(step), submissions=names))

    async def submissions(self, request: web.Request) -> web.Response:
        """List submissions, newest first, all or some, with a few of their roots each."""
        chosen = SubmissionFilter.of(request, self._engine.now())
        page = Page(*self._views.submissions_like(chosen.passes, request.query.get("after", ""), limit_of(request)))
        return await answer_page(request, page, lambda row: self._views.submission_view(row, ROOTS_LISTED))

    async def roots(self, request: web.Request) -> web.Response:
        """List the roots of a submission, all or those in the named states."""
        row = self._views.submission(request.match_info["id"])
        states = _states(request, routes.ROOTS)
        roots = self._views.note(row.id).roots
        found, end = self._views.roots_after(roots, states, position_of(request), limit_of(request))
        page = Page(found, str(end) if end < len(roots) else "")
        return await answer_page(request, page, self._views.root_view)

    async def submission(self, request: web.Request) -> web.Response:
        """Show one submission."""
        return answer(self._views.submission_view(self._views.submission(request.match_info["id"])))

    async def cancel(self, request: web.Request) -> web.Response:
        """Withdraw a submission."""
        self._require_owner(request)
        row = await self._submissions.cancel(request.match_info["id"])
        return answer(self._views.submission_view(row, ROOTS_LISTED))

    async def bump(self, request: web.Request) -> web.Response:
        """Give a submission another priority."""
        wish = await read_model(request, BumpRequest)
        self._require_owner(request)
        row = await self._submissions.bump(request.match_info["id"], wish.priority)
        return answer(self._views.submission_view(row, ROOTS_LISTED))

    def _require_owner(self, request: web.Request) -> None:
        """Raise `NotFoundError` or `ForbiddenError` unless the client may change the submission of the address."""
        row = self._views.submission(request.match_info["id"])
        owner = self._views.note(row.id).origin.owner
        if not request[CLIENT].may_change(owner):
            raise ForbiddenError(
                f"submission {row.id} is {owner or 'the farm'}'s; only its owner's tokens and the farm's own change it."
            )

    async def steps(self, request: web.Request) -> web.Response:
        """List the steps of a submission, all or those in the named states."""
        states = _states(request, routes.STEPS)
        row = self._views.submission(request.match_info["id"])
        rows, end = self._views.steps_after(row, states, position_of(request), limit_of(request))
        await self._views.recipes.fetch_failed(rows)
        following = str(end) if end < len(row.members) else ""
        return await answer_page(request, Page(rows, following), self._views.step_view)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Stream the changes of a submission."""
        return await self._streams.serve(request, self._views.submission(request.match_info["id"]))

    async def step(self, request: web.Request) -> web.Response:
        """Show one step."""
        row = self._views.step(request.match_info["key"])
        await self._views.recipes.fetch([row])
        return answer(self._views.step_view(row))

    async def log(self, request: web.Request) -> web.StreamResponse:
        """Send the log of one attempt, following it while it runs if asked to."""
        row = self._views.step(request.match_info["key"])
        attempt = _attempt(request, row)
        # The last lease of a doomed step may have followed what failed, and never begun.
        doomed = row.state is StepStatus.DOOMED and "attempt" not in request.query
        if doomed and await self._logs.file(row.key, attempt) is None:
            raise NotFoundError(no_log(row))
        follow = request.query.get("follow", "") in ("1", "true")
        response = web.StreamResponse(
            headers={"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
        )
        await response.prepare(request)
        running = (lambda: _runs(row, attempt)) if follow else None
        async for data in self._logs.read(row.key, attempt, running):
            await response.write(data)
        await response.write_eof()
        return response

    async def workers(self, request: web.Request) -> web.Response:
        """List workers, all or those that the filters let through."""
        states, system = words_of(request, routes.WORKERS.named("state")), request.query.get("system", "")
        views = [
            view
            for view in self._views.workforce.views()
            if (not states or view.state in states) and (not system or system in (*view.systems, *view.emulated))
        ]
        page = cut(views, position_of(request), limit_of(request))
        return await answer_page(request, page, lambda view: view)

    async def farm(self, _request: web.Request) -> web.Response:
        """Say how to use the cache, and what is wrong."""
        return answer(self._farm())

    async def health(self, _request: web.Request) -> web.Response:
        """Say whether the engine runs."""
        if self._engine.running:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "stopped"}, status=503)


def _states(request: web.Request, route: Route[Any]) -> frozenset[StepStatus]:
    return frozenset(map(StepStatus, words_of(request, route.named("state"))))


def _attempt(request: web.Request, row: StepRow) -> int:
    if row.life.attempt == 0:
        raise NotFoundError(no_log(row))
    text = request.query.get("attempt", str(row.life.attempt))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise BadRequestError("an attempt is a number.")
    if not 0 < int(text) <= row.life.attempt:
        raise NotFoundError(f"step {row.key} had {attempts(row)}; there is no attempt {text}.")
    return int(text)


def _runs(row: StepRow, attempt: int) -> bool:
    return row.state is StepStatus.RUNNING and row.life.attempt == attempt
