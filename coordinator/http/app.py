"""The web application: routes, who may ask, and how errors look.

Whatever goes wrong below the API is an `ErrorView` with one sentence; a client never sees a traceback, an operator
finds it in the log.
"""

from __future__ import annotations

import logging

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from coordinator.errors import CoordinatorError
from coordinator.http.api import Api
from coordinator.http.auth import require_host, require_token
from coordinator.schema import ErrorBody, ErrorView

_log = logging.getLogger(__name__)

#: What aiohttp refuses by itself: status -> code and sentence.
_REFUSALS = {
    404: ("not_found", "there is nothing at this address."),
    405: ("method_not_allowed", "this address does not take that method."),
    413: ("too_large", "the request is larger than this coordinator takes."),
}


def make_app(api: Api, token: str, *, public_url: str, loopback: bool, max_body_bytes: int) -> web.Application:
    """Put the API behind its checks. `max_body_bytes` bounds JSON bodies; streams have bounds of their own."""
    checks: list[Middleware] = [_answer_errors]
    if loopback:
        checks.append(require_host(public_url))
    checks.append(require_token(token))
    app = web.Application(middlewares=checks, client_max_size=max_body_bytes)
    app.add_routes(api.routes())
    return app


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn exceptions into answers."""
    try:
        return await handler(request)
    except CoordinatorError as error:
        return _error(error.status, error.code, str(error))
    except web.RequestPayloadError:
        return _error(400, "bad_request", "the request's body ended too early; send it again.")
    except web.HTTPException as error:
        if error.status not in _REFUSALS:
            raise
        answer = _error(error.status, *_REFUSALS[error.status])
        if "Allow" in error.headers:
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except ConnectionError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the client gets a sentence and the operator the traceback
        _log.exception("a request failed: %s %s", request.method, request.path)
        return _error(500, "internal", "the coordinator failed to answer; its log says why.")


def _error(status: int, code: str, message: str) -> web.Response:
    view = ErrorView(error=ErrorBody(code=code, message=message))
    return web.Response(body=orjson.dumps(view.model_dump()), status=status, content_type="application/json")
