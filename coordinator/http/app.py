"""The web application: routes, who may ask, and how errors look.

Whatever goes wrong below the API is an `ErrorView` with one sentence; a client never sees a traceback, an operator
finds it in the log. A client that leaves in the middle of its request is answered nothing and logged nowhere.
"""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from coordinator.errors import CoordinatorError, UnavailableError
from coordinator.http.answers import error_answer
from coordinator.http.api.submissions import Api
from coordinator.http.connections import RETRY_AFTER_S, is_abandoned
from coordinator.http.middleware import require_host, require_plain_head, require_token
from coordinator.http.routing import serve
from coordinator.security.clients import ClientTokens
from infra.cache.errors import MetadataError
from infra.objects.errors import ObjectStoreError, StoreFullError

_log = logging.getLogger(__name__)

#: Set on a request whose answer has begun.
_BEGUN: web.RequestKey[bool] = web.RequestKey("drover.begun", bool)
#: What aiohttp refuses by itself: status -> code and sentence.
_REFUSALS = {
    404: ("not_found", "there is nothing at this address."),
    405: ("method_not_allowed", "this address does not take that method."),
    413: ("too_large", "the request is larger than this coordinator takes."),
}


def make_app(
    api: Api, tokens: ClientTokens, *, public_url: str, loopback: bool, max_body_bytes: int
) -> web.Application:
    """Put the API behind its checks. `max_body_bytes` bounds JSON bodies; streams have bounds of their own."""
    checks: list[Middleware] = [_answer_errors, require_plain_head]
    if loopback:
        checks.append(require_host(public_url))
    checks.append(require_token(tokens))
    app = web.Application(middlewares=checks, client_max_size=max_body_bytes)
    app.on_response_prepare.append(_note_begun)
    serve(app, api.handlers())
    return app


async def _note_begun(request: web.Request, _response: web.StreamResponse) -> None:
    request[_BEGUN] = True


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn exceptions into answers; where an answer has begun, break the connection, so that its end is seen."""
    try:
        return await handler(request)
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends in an answer or in the end of one
        if is_abandoned(request, error):
            return _nothing()
        if _BEGUN not in request:
            return _answer(request, error)
        _log.exception("an answer was cut short: %s %s", request.method, request.path)
        if request.transport is not None:
            request.transport.abort()
        return _nothing()


def _nothing() -> web.Response:
    """Response object for a handler whose connection is gone: aiohttp wants one and sends nothing."""
    return web.Response(status=500)


def _answer(request: web.Request, error: Exception) -> web.StreamResponse:
    match error:
        case UnavailableError() if error.code == UnavailableError.code:
            return error_answer(error.status, error.code, str(error), {"Retry-After": str(RETRY_AFTER_S)})
        case CoordinatorError():
            return error_answer(error.status, error.code, str(error))
        case ObjectStoreError() | MetadataError():
            _log.warning("a request failed: %s %s: %s", request.method, request.path, error)
            # A full one has a word of its own: to try again in a moment does not help, and a client says so at once.
            return error_answer(503, "store_full" if isinstance(error, StoreFullError) else "unavailable", f"{error}.")
        case web.RequestPayloadError():
            return error_answer(400, "bad_request", "the request's body ended too early; send it again.")
        case web.HTTPException() if error.status in _REFUSALS:
            answer = error_answer(error.status, *_REFUSALS[error.status])
            if "Allow" in error.headers:
                answer.headers["Allow"] = error.headers["Allow"]
            return answer
        case web.HTTPException():
            raise error
        case _:
            # Whatever it is, the client gets a sentence and the operator the traceback.
            _log.error("a request failed: %s %s", request.method, request.path, exc_info=error)
            return error_answer(500, "internal", "the coordinator failed to answer; its log says why.")
