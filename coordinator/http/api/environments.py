"""Handlers of tracked environments and of their coverage."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import environment_routes as routes
from coordinator.api.environments import CoverageView, EnvironmentView
from coordinator.api.requests import PushSubmissionRequest, RollbackRequest, TrackRequest
from coordinator.api.route import Route
from coordinator.environments.model import NAME, Environment, SourceKind, TrackedSource
from coordinator.environments.reading import SourceContent, mark_of, wishes_of
from coordinator.environments.reports import CoverageReports, environment_view
from coordinator.environments.submitted import SubmittedContent
from coordinator.environments.tracker import EnvironmentTracker
from coordinator.errors import BadRequestError, ForbiddenError, IntakeError
from coordinator.http.answers import answer
from coordinator.http.api.pages import answer_page, cut, limit_of, position_of
from coordinator.http.bodies import STREAM_PATIENCE_S, BodyBounds, BodyTooLargeError, body_chunks, read_model
from coordinator.http.middleware import CLIENT
from coordinator.security.clients import Client
from coordinator.wishes.model import MAX_FILE_BYTES
from infra.clock import Clock
from infra.nix.store_path import StoreDir

#: A source and sixteen owners.
TRACK_BODY: Final = BodyBounds(size_bytes=16 * 1024, items=64, containers=16)
#: Characters of a file's name and of a mark.
_MAX_NAME: Final = 255


class EnvironmentApi:
    """The handlers, with the rooms that they ask."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        tracker: EnvironmentTracker,
        reports: CoverageReports,
        submitted: SubmittedContent,
        store_dir: StoreDir,
        system: str,
        clock: Clock,
    ) -> None:
        """`system` is that of store paths which do not say theirs."""
        self._tracker = tracker
        self._reports = reports
        self._submitted = submitted
        self._store_dir = store_dir
        self._system = system
        self._clock = clock

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            routes.ENVIRONMENTS: self.environments,
            routes.ENVIRONMENT: self.environment,
            routes.TRACK: self.track,
            routes.FORGET_ENVIRONMENT: self.forget,
            routes.LOOK: self.look,
            routes.PUSH_CONTENT: self.push_content,
            routes.PUSH_SUBMISSION: self.push_submission,
            routes.ROLL_BACK: self.roll_back,
            routes.COVERAGES: self.coverages,
            routes.COVERAGE: self.coverage,
        }

    async def environments(self, request: web.Request) -> web.Response:
        """List environments, with the newest revision of each."""
        page = cut(await self._tracker.store.environments(), position_of(request), limit_of(request))
        views = {each.name: await self._view(each, newest=1) for each in page.rows}
        return await answer_page(request, page, lambda each: views[each.name])

    async def environment(self, request: web.Request) -> web.Response:
        """Show an environment."""
        return answer(await self._view(await self._found(request)))

    async def track(self, request: web.Request) -> web.Response:
        """Track an environment."""
        name, client = request.match_info["environment"], request[CLIENT]
        if not NAME.fullmatch(name):
            raise IntakeError(
                "an environment is named by a small letter or a digit and at most 62 more of these, - and _."
            )
        wish = await read_model(request, TrackRequest, TRACK_BODY)
        before = await self._tracker.store.environment(name)
        if before is not None:
            _require_owner(client, before)
        kind = SourceKind(wish.kind)
        if kind is SourceKind.FILE:
            if not client.is_operator:
                raise ForbiddenError("a file of the coordinator's machine is tracked with the farm's own token alone.")
            if not Path(wish.path).is_absolute():
                raise IntakeError("a file is tracked by its absolute path on the coordinator's machine.")
        owners = wish.owners or (client.owner,)
        if not client.is_operator:
            if client.owner not in owners:
                raise ForbiddenError(
                    f"the owners of {name} must have {client.owner} among them: you could not change it."
                )
            # Builds for it are the first one's.
            owners = (client.owner, *owners)
        source = TrackedSource(kind, wish.path, wish.url, wish.ref, wish.system or self._system)
        wanted = Environment(name, source, tuple(dict.fromkeys(owners)), self._clock.now())
        return answer(await self._view(await self._tracker.track(wanted, before)))

    async def forget(self, request: web.Request) -> web.Response:
        """Forget an environment."""
        environment = await self._owned(request)
        await self._tracker.forget(environment.name)
        return web.Response(status=204)

    async def look(self, request: web.Request) -> web.Response:
        """Look at a source now."""
        return answer(await self._view(await self._tracker.look(await self._owned(request))))

    async def push_content(self, request: web.Request) -> web.Response:
        """Take a file as a revision."""
        environment = await self._owned(request)
        if (request.content_length or 0) > MAX_FILE_BYTES:
            raise _too_large()
        name, mark = (request.query.get(each, "") for each in ("file", "mark"))
        if any(len(text) > _MAX_NAME or not text.isprintable() for text in (name, mark)):
            raise BadRequestError(f"`file` and `mark` have at most {_MAX_NAME} printable characters.")
        data = bytearray()
        async for chunk in body_chunks(request, STREAM_PATIENCE_S):
            data += chunk
            if len(data) > MAX_FILE_BYTES:
                raise _too_large()
        whole = bytes(data)
        content = SourceContent(mark or mark_of(whole), name or "the content", whole)
        system = request.query.get("system", "") or environment.source.system or self._system
        wishes = await asyncio.to_thread(wishes_of, content, self._store_dir, system)
        return answer(await self._view(await self._tracker.push(environment, wishes, content.mark, "")))

    async def push_submission(self, request: web.Request) -> web.Response:
        """Take the roots of a submission as a revision."""
        wish = await read_model(request, PushSubmissionRequest)
        environment = await self._owned(request)
        content, commit = await self._submitted.content(wish.submission, self._system)
        mark = wish.mark or commit or content.digest
        note = f"These are the roots of submission {wish.submission}."
        return answer(await self._view(await self._tracker.push(environment, content, mark, note)))

    async def roll_back(self, request: web.Request) -> web.Response:
        """Move pointers back."""
        wish = await read_model(request, RollbackRequest)
        environment = await self._owned(request)
        await self._tracker.roll_back(environment, wish.systems, wish.to)
        return answer(await self._view(environment))

    async def coverages(self, request: web.Request) -> web.Response:
        """List how much of each environment can be fetched."""
        page = cut(await self._tracker.store.environments(), position_of(request), limit_of(request))
        views: dict[str, CoverageView] = {}
        for each in page.rows:
            views[each.name] = await self._reports.brief(each.name)
        return await answer_page(request, page, lambda each: views[each.name])

    async def coverage(self, request: web.Request) -> web.Response:
        """Show how much of an environment can be fetched."""
        return answer(await self._reports.whole((await self._found(request)).name))

    async def _found(self, request: web.Request) -> Environment:
        return await self._tracker.environment(request.match_info["environment"])

    async def _owned(self, request: web.Request) -> Environment:
        environment = await self._found(request)
        _require_owner(request[CLIENT], environment)
        return environment

    async def _view(self, environment: Environment, newest: int = 0) -> EnvironmentView:
        revisions = await self._tracker.store.revisions(environment.name)
        pointers = await self._tracker.store.pointers(environment.name)
        return environment_view(environment, revisions[:newest] if newest else revisions, pointers)


def _too_large() -> BodyTooLargeError:
    return BodyTooLargeError(f"the content has more than {MAX_FILE_BYTES} bytes, the limit.")


def _require_owner(client: Client, environment: Environment) -> None:
    if not client.is_operator and client.owner not in environment.owners:
        raise ForbiddenError(
            f"{environment.name} belongs to {', '.join(environment.owners) or 'the operator'}, not to {client.owner}."
        )
