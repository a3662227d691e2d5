"""Handlers of remote evaluation."""

from __future__ import annotations

import re
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import evaluation_routes
from coordinator.api.requests import RemoteEvaluationRequest
from coordinator.api.route import Route
from coordinator.errors import BadRequestError, IntakeError
from coordinator.http.answers import answer
from coordinator.http.bodies import STREAM_PATIENCE_S, BodyBounds, body_chunks, read_model
from coordinator.http.middleware import CLIENT
from coordinator.remote_evaluation.evaluations import RemoteEvaluations

#: A thousand attributes and a few expressions.
EVALUATION_BODY: Final = BodyBounds(size_bytes=4 * 1024 * 1024, items=4096, containers=1024)
_TREE: Final = re.compile(r"[0-9a-f]{64}")


class EvaluationApi:
    """The handlers, with the room that they ask."""

    def __init__(self, evaluations: RemoteEvaluations) -> None:
        self._evaluations = evaluations

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            evaluation_routes.PUT_TREE: self.put_tree,
            evaluation_routes.EVALUATE: self.evaluate,
            evaluation_routes.EVALUATION: self.evaluation,
            evaluation_routes.CANCEL_EVALUATION: self.cancel,
        }

    async def put_tree(self, request: web.Request) -> web.Response:
        """Take a tree."""
        name = request.match_info["tree"]
        if not _TREE.fullmatch(name):
            raise BadRequestError("a tree is named by 64 hexadecimal digits, the SHA-256 of its NAR.")
        self._evaluations.require()
        await self._evaluations.trees.add(body_chunks(request, STREAM_PATIENCE_S), name)
        return web.Response(status=204)

    async def evaluate(self, request: web.Request) -> web.Response:
        """Begin an evaluation."""
        ask = await read_model(request, RemoteEvaluationRequest, EVALUATION_BODY)
        if any(character < " " for character in ask.file + ask.directory):
            raise IntakeError("`file` and `directory` are paths in the tree; there are no control characters in them.")
        return answer(self._evaluations.begin(ask, request[CLIENT].owner), status=201)

    async def evaluation(self, request: web.Request) -> web.Response:
        """Show an evaluation."""
        name, seen = request.match_info["id"], request.query.get("seen", "")
        return answer(await self._evaluations.view(name, request[CLIENT].may_change, seen))

    async def cancel(self, request: web.Request) -> web.Response:
        """End an evaluation."""
        return answer(await self._evaluations.cancel(request.match_info["id"], request[CLIENT].may_change))
