"""Handlers of paths from upstreams."""

from __future__ import annotations

from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import mirror_routes
from coordinator.api.requests import MirrorRequest
from coordinator.api.route import Route
from coordinator.caches.mirroring import Mirroring
from coordinator.http.answers import answer
from coordinator.http.bodies import BodyBounds, read_model
from coordinator.http.middleware import CLIENT

#: 10,000 paths of the longest name.
MIRROR_BODY: Final = BodyBounds(size_bytes=4 * 1024 * 1024, items=10_064, containers=16)


class MirrorApi:
    """The handlers, with the room that they ask."""

    def __init__(self, mirroring: Mirroring) -> None:
        self._mirroring = mirroring

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            mirror_routes.MIRROR: self.begin,
            mirror_routes.MIRRORING: self.run,
            mirror_routes.CANCEL_MIRRORING: self.cancel,
        }

    async def begin(self, request: web.Request) -> web.Response:
        """Begin a run."""
        wish = await read_model(request, MirrorRequest, MIRROR_BODY)
        return answer(self._mirroring.begin(wish.paths, request[CLIENT].owner, wish.keep_as), status=201)

    async def run(self, request: web.Request) -> web.Response:
        """Show a run."""
        return answer(await self._mirroring.view(request.match_info["id"], request.query.get("seen", "")))

    async def cancel(self, request: web.Request) -> web.Response:
        """End a run."""
        return answer(await self._mirroring.cancel(request.match_info["id"]))
