"""The routes of the upload protocol; `infra.upload.protocol` says what is sent, `infra.cache.uploads.uploads` does it.

Who may: writers of the cache (any path), and workers with the token of one lease (exactly its outputs, not publishing).
Errors are an `ErrorView` whose `code` a sender acts on. A piece that ends early is kept as far as it came.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import cache
from typing import Any, Final, TypeAlias, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import RootModel

from coordinator.api import cache_routes
from coordinator.api.route import Right, Route
from coordinator.caches.opening import OpenCache
from coordinator.errors import BadRequestError
from coordinator.http.answers import answer, error_answer
from coordinator.http.binary_cache.access import challenge, may_write
from coordinator.http.bodies import BodyBounds, Pace, read_model
from coordinator.http.connections import mark_known
from coordinator.http.routing import serve_below
from coordinator.security.tokens import told_token
from coordinator.security.upload_tokens import UploadTokens
from infra.cache.uploads.errors import UploadError, WrongOffsetError
from infra.cache.uploads.uploads import Sender, Uploads
from infra.objects.errors import CacheError, StoreFullError
from infra.upload.protocol import (
    HASHES_HEADER,
    HASHES_MADE,
    MAX_MESSAGE_BYTES,
    MAX_PACK_BYTES,
    MAX_PATHS,
    PIECE_BYTES,
    Begin,
    Commit,
    PartsWanted,
    SentOffset,
    UploadMessage,
    Urls,
    UrlsWanted,
)

#: Seconds without a byte, or behind `bodies.LEAST_BYTES_PER_S`, after which a sender is given up.
SILENCE_S: Final = 60.0
#: MAX_PATHS objects, with references and entity tags as far as MAX_MESSAGE_BYTES go.
MESSAGE_BOUNDS: Final = BodyBounds(MAX_MESSAGE_BYTES, items=1_500_000, containers=3 * MAX_PATHS)

_STATUS: Final[Mapping[str, int]] = {
    "unknown_upload": 404,
    "forbidden_path": 403,
    "bad_upload": 400,
    "too_many_uploads": 429,
    # A sender goes on after it.
    "too_slow": 408,
}
_Message = TypeVar("_Message", bound=UploadMessage)
_ForSender: TypeAlias = Callable[[web.Request, Sender], Awaitable[web.StreamResponse]]


class _PieceSlowError(UploadError, ConnectionError):
    """A piece came too slowly; what came of it is kept."""

    code = "too_slow"


class _PieceShortError(UploadError, ConnectionError):
    """A piece ended early; what came of it is kept."""

    code = "bad_upload"


class _BadMessageError(UploadError):
    """The body is not the message that it should be."""

    code = "bad_upload"


def add_upload_routes(
    app: web.Application, served: OpenCache, uploads: Uploads, tokens: UploadTokens, now: Callable[[], float]
) -> None:
    """Take uploads for a cache below its prefix; must be added before the cache's own routes."""
    routes = UploadRoutes(served, uploads, tokens, now)
    handlers: dict[Route[Any], _ForSender] = {
        cache_routes.BEGIN: routes.begin,
        cache_routes.URLS: routes.urls,
        cache_routes.PARTS: routes.parts,
        cache_routes.PACK: routes.pack,
        cache_routes.COMMIT: routes.commit,
        cache_routes.RENEW: routes.renew,
        cache_routes.END: routes.end,
        cache_routes.OFFSET: routes.offset,
        cache_routes.APPEND: routes.append,
    }
    serve_below(app, served.prefix, handlers, {Right.UPLOAD: routes.sender})


class UploadRoutes:
    """The handlers."""

    def __init__(self, served: OpenCache, uploads: Uploads, tokens: UploadTokens, now: Callable[[], float]) -> None:
        self._served = served
        self._uploads = uploads
        self._tokens = tokens
        self._now = now

    def sender(self, handler: _ForSender) -> Handler:
        """Return `handler` for those only who may upload; what goes wrong becomes an answer."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            sender = self._who(request)
            if sender is None:
                return challenge(self._served.name)
            try:
                return await handler(request, sender)
            except WrongOffsetError as error:
                return answer(SentOffset(offset=error.offset), 409)
            except UploadError as error:
                return error_answer(_STATUS.get(error.code, 400), error.code, str(error))
            except StoreFullError as error:
                return error_answer(507, "store_full", str(error))
            except CacheError as error:
                return error_answer(503, "unavailable", str(error))

        return guarded

    def _who(self, request: web.Request) -> Sender | None:
        if may_write(request, self._served.access):
            return Sender("writer")
        grant = self._tokens.check(told_token(request.headers), self._now())
        if grant is None or grant.cache != self._served.name:
            return None
        mark_known(request)
        return Sender(f"lease {grant.step} {grant.attempt}", frozenset(grant.paths), publishes=False)

    async def begin(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Begin an upload."""
        begun = await self._uploads.begin(sender, await _message(request, Begin))
        headers = {HASHES_HEADER: HASHES_MADE} if self._uploads.makes_hashes(sender) else None
        return answer(begun, 201, headers)

    async def urls(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Presign small objects."""
        wish = await _message(request, UrlsWanted)
        return answer(Urls(urls=await self._uploads.urls(sender, request.match_info["id"], wish)))

    async def parts(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Presign parts of a large object."""
        wish = await _message(request, PartsWanted)
        numbers = range(wish.first, wish.first + wish.count)
        return answer(await self._uploads.parts(sender, request.match_info["id"], wish.path, numbers))

    async def pack(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Take many small objects."""
        if request.content_length is None or request.content_length > MAX_PACK_BYTES:
            raise _BadMessageError(f"a pack says its length, which is at most {MAX_PACK_BYTES} bytes")
        return answer(await self._uploads.pack(sender, request.match_info["id"], _body(request)))

    async def commit(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Put what was sent in its place and publish it."""
        wish = await _message(request, Commit)
        return answer(await self._uploads.commit(sender, request.match_info["id"], wish))

    async def renew(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Keep an upload."""
        await self._uploads.renew(sender, request.match_info["id"])
        return web.Response(status=204)

    async def end(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Give an upload up."""
        await self._uploads.end(sender, request.match_info["id"])
        return web.Response(status=204)

    async def offset(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Say how much has arrived."""
        upload, path = request.match_info["id"], request.match_info["path"]
        return answer(SentOffset(offset=await self._uploads.offset(sender, upload, path)))

    async def append(self, request: web.Request, sender: Sender) -> web.StreamResponse:
        """Take a piece."""
        text = request.query.get("offset", "")
        if not (text.isascii() and text.isdigit() and len(text) <= 15):
            raise _BadMessageError("a piece says at which offset it belongs")
        if request.content_length is None or request.content_length > PIECE_BYTES:
            raise _BadMessageError(f"a piece says its length, which is at most {PIECE_BYTES} bytes")
        upload, path = request.match_info["id"], request.match_info["path"]
        size = await self._uploads.append(sender, upload, path, int(text), _body(request))
        return answer(SentOffset(offset=size))


async def _body(request: web.Request) -> AsyncIterator[bytes]:
    """Yield what arrives. Raises `ConnectionError` where the sender leaves, ends early or is too slow."""
    pace = Pace(request, SILENCE_S)
    try:
        while chunk := await pace.read():
            yield chunk
    except TimeoutError:
        raise _PieceSlowError("the piece came too slowly; what came is kept, so go on from there") from None
    except web.RequestPayloadError:
        raise _PieceShortError("the piece ended too early; what came is kept") from None


async def _message(request: web.Request, model: type[_Message]) -> _Message:
    kind: Any = model
    try:
        message: _Message = (await read_model(request, _checked(kind), MESSAGE_BOUNDS)).root
    except BadRequestError as error:
        raise _BadMessageError(str(error)) from None
    return message


@cache
def _checked(model: Any) -> type[RootModel[Any]]:
    """Return what validates a message; made when the first one comes."""
    checked: type[RootModel[Any]] = RootModel[model]
    return checked
