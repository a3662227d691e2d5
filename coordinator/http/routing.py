"""Binds handlers to the records of the route tables, and finds the record of a request again.

A handler is served only under a `Route`; an answer whose status that does not list is logged. Handlers whose right
belongs to a cache or a browser's session are served behind a guard for that right;
`coordinator.http.middleware.require_token` checks all others.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api.route import EVERY_ROUTE, Right, Route
from coordinator.api.routes import API_PREFIX
from coordinator.errors import BadRequestError, CoordinatorError

#: Every route that an application serves.
SERVED: Final[web.AppKey[dict[web.AbstractRoute, Route[Any]]]] = web.AppKey("drover.routes", dict)
#: Rights that the middleware checks; the others have guards: those of a cache, with its own tokens, and of sessions.
OF_THE_FARM: Final = frozenset({Right.NONE, Right.API, Right.OPERATE})

_log = logging.getLogger(__name__)

_Guarded = TypeVar("_Guarded")
#: What a router calls for a request with `Expect: 100-continue`.
Expect = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def serve(app: web.Application, handlers: Mapping[Route[Any], Handler]) -> None:
    """Serve routes whose right the middleware checks. Raises `ValueError` for any other."""
    for route, handler in handlers.items():
        if route.right not in OF_THE_FARM:
            raise ValueError(f"{route.method} {route.path} is served without the guard for {route.right}")
        _add(app, route, route.path, handler, None)


def serve_below(
    app: web.Application,
    prefix: str,
    handlers: Mapping[Route[Any], _Guarded],
    guards: Mapping[Right, Callable[[_Guarded], Handler]],
    expect: Expect | None = None,
) -> None:
    """Serve routes of the cache at `prefix`, each behind the guard for its right. Raises `KeyError` without one."""
    for route, handler in handlers.items():
        _add(app, route, route.below(prefix), guards[route.right](handler), expect)


def serve_guarded(
    app: web.Application,
    handlers: Mapping[Route[Any], Handler],
    guards: Mapping[Right, Callable[[Handler], Handler]],
) -> None:
    """Serve routes of the farm, each behind the guard for its right. Raises `KeyError` for a right without one."""
    for route, handler in handlers.items():
        _add(app, route, route.path, guards[route.right](handler), None)


def right_of(request: web.Request) -> Right:
    """Return what the request must show; a route without a record wants the token, as addresses below the API do."""
    served = request.app.get(SERVED, {}).get(request.match_info.route)
    if served is not None:
        return served.right
    unknown = request.match_info.http_exception is not None and not request.path.startswith(API_PREFIX)
    return Right.NONE if unknown else Right.API


def _add(app: web.Application, route: Route[Any], path: str, handler: Handler, expect: Expect | None) -> None:
    if SERVED not in app:
        app[SERVED] = {}
    handler = _listed(route, handler)
    resource = app.router.add_resource(path)
    for method in ("HEAD", "GET") if route.method == "GET" and route.head else (route.method,):
        app[SERVED][resource.add_route(method, handler, expect_handler=expect)] = route


def _require_known(request: web.Request, known: frozenset[str]) -> None:
    """Refuse a parameter that a route of the API does not have: one that is mistyped must not change the answer."""
    unknown = next((name for name in request.query if name not in known), None)
    if unknown is not None:
        names = ", ".join(f"`{name}`" for name in sorted(known)) or "none"
        raise BadRequestError(f"there is no parameter {unknown[:40]!r} here; those of this address: {names}.")


def _listed(route: Route[Any], handler: Handler) -> Handler:
    """Return `handler` behind the names of its parameters, with a line in the log for each refusal not listed."""
    listed = frozenset((*EVERY_ROUTE, *route.errors, route.status))
    asked = frozenset(query.name for query in route.queries)

    def check(status: int) -> None:
        if status >= 400 and status not in listed:
            _log.error("%s %s answered %d, which the route table does not list", route.method, route.path, status)

    async def listing(request: web.Request) -> web.StreamResponse:
        try:
            if route.path.startswith(API_PREFIX):
                _require_known(request, asked)
            answer = await handler(request)
        except CoordinatorError as error:
            check(error.status)
            raise
        check(answer.status)
        return answer

    return listing
