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
    except web.HTTPRequestEntityTooLarge:
        return _error(413, "too_large", "the request is larger than this coordinator takes.")
    except web.HTTPNotFound:
        return _error(404, "not_found", "there is nothing at this address.")
    except web.HTTPMethodNotAllowed as error:
        answer = _error(405, "method", f"this address takes {', '.join(sorted(error.allowed_methods))} only.")
        answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except web.HTTPException:
        raise
    except ConnectionError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the client gets a sentence and the operator the traceback
        _log.exception("a request failed: %s %s", request.method, request.path)
        return _error(500, "internal", "the coordinator failed to answer; its log says why.")


def _error(status: int, code: str, message: str) -> web.Response:
    view = ErrorView(error=ErrorBody(code=code, message=message))
    return web.Response(body=orjson.dumps(view.model_dump()), status=status, content_type="application/json")
