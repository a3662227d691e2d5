"""The routes below a cache's prefix as data; `coordinator.api.routes` says what a record holds.

The order is the router's: uploads first, then what Nix reads, then the 404 of every other address, then what Nix sends.
HEAD is answered wherever GET is. What is unknown, malformed or cannot be looked up just now is 404, because a client
would fail its build for any 5xx; `coordinator.http.binary_cache` says more.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, FailFast, Field

from coordinator.api.route import Content, Right, Route
from infra.nix.base32 import SHA256_PATTERN
from infra.nix.store_path import HASH_PART_PATTERN
from infra.upload.protocol import (
    Begin,
    Begun,
    Commit,
    Committed,
    PackTaken,
    Parts,
    PartsWanted,
    SentOffset,
    Urls,
    UrlsWanted,
)

#: Paths of one question, which a stranger may ask where the cache is public: some 10 ms of the loop and a megabyte.
MAX_QUESTION: Final = 500

_HASH_PART: Final = f"{{hash_part:{HASH_PART_PATTERN}}}"
_FILE: Final = f"{{file:{SHA256_PATTERN}(-[0-9a-z]+)?[.]nar([.](zst|xz|bz2))?}}"
_ENVIRONMENT: Final = "{prefix}/environments/{environment:[a-z0-9][a-z0-9_-]{0,62}}"
_UPLOADS: Final = "{prefix}/uploads"
_UPLOAD: Final = f"{_UPLOADS}/{{id:[0-9a-f]{{32}}}}"

_NAMED: Final = (404,)
#: A message comes too slowly, or is too large.
_MESSAGE: Final = (408, 413)
#: There is no such upload; it does not have that path.
_OPEN: Final = (404,)
_PATH: Final = (403, 404)
#: Refusals of what Nix sends, none of which it retries: no length, too large.
_SENT: Final = (411, 413)
#: The store failed. Nix would retry a 5xx.
_STORED: Final = (*_SENT, 424)
#: Something else was published before; what it refers to is not here.
_SIGNED: Final = (409, *_STORED, 422)


class NarinfosQuestion(BaseModel):
    """Body of POST narinfos: what is wanted of which paths.

    Attributes:
        paths: Base names, or their first 32 characters alone, as a client has them that was asked for a narinfo.
        closure: All that they reach is wanted too.
        after: The `next` of the answer before, where one did not hold all; the rest of the question stays the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: Annotated[tuple[Annotated[str, Field(max_length=255)], ...], Field(max_length=MAX_QUESTION), FailFast()]
    closure: bool = True
    after: Annotated[str, Field(max_length=20, pattern="^[0-9]*$")] = ""


BEGIN: Final = Route("POST", _UPLOADS, Right.UPLOAD, body=Begin, answer=Begun, status=201, errors=(403, 429, *_MESSAGE))
URLS: Final = Route("POST", f"{_UPLOAD}/urls", Right.UPLOAD, body=UrlsWanted, answer=Urls, errors=(*_PATH, *_MESSAGE))
PARTS: Final = Route(
    "POST", f"{_UPLOAD}/parts", Right.UPLOAD, body=PartsWanted, answer=Parts, errors=(*_PATH, 409, *_MESSAGE)
)
#: Framing: `infra.upload.packs`; 507 says that no room is left.
PACK: Final = Route(
    "POST", f"{_UPLOAD}/pack", Right.UPLOAD, body=Content.PACK, answer=PackTaken, errors=(*_PATH, 408, 507)
)
COMMIT: Final = Route(
    "POST", f"{_UPLOAD}/commit", Right.UPLOAD, body=Commit, answer=Committed, errors=(*_PATH, *_MESSAGE)
)
RENEW: Final = Route[None]("POST", f"{_UPLOAD}/renew", Right.UPLOAD, status=204, errors=_OPEN)
END: Final = Route[None]("DELETE", _UPLOAD, Right.UPLOAD, status=204, errors=_OPEN)
OFFSET: Final = Route("GET", f"{_UPLOAD}/nar/{{path}}", Right.UPLOAD, answer=SentOffset, errors=_PATH, head=False)
#: `?offset=…`: where the piece belongs; 409 says where it does, 507 that no room is left.
APPEND: Final = Route(
    "PUT", f"{_UPLOAD}/nar/{{path}}", Right.UPLOAD, body=Content.NAR, answer=SentOffset, errors=(*_PATH, 408, 409, 507)
)

CACHE_INFO: Final = Route[None]("GET", "{prefix}/nix-cache-info", Right.READ, answer=Content.CACHE_INFO)
#: `coordinator.http.binary_cache.fast_answers` answers it for public caches before the router sees it.
NARINFO: Final = Route[None](
    "GET", f"{{prefix}}/{_HASH_PART}.narinfo", Right.READ, answer=Content.NARINFO, errors=_NAMED
)
#: Whole files: ranges, resume, strong caching; 307 where the object store answers itself.
NAR: Final = Route[None]("GET", f"{{prefix}}/nar/{_FILE}", Right.READ, answer=Content.NAR, errors=(*_NAMED, 416))
LISTING: Final = Route[None]("GET", f"{{prefix}}/{_HASH_PART}.ls", Right.READ, answer=Content.LISTING, errors=_NAMED)
#: What the build printed.
BUILD_LOG: Final = Route[None]("GET", "{prefix}/log/{derivation}", Right.READ, answer=Content.LOG, errors=_NAMED)
#: As Nix up to 2.34 asks, and from 2.35 on.
REALISATION: Final = Route[None](
    "GET", "{prefix}/realisations/{key}.doi", Right.READ, answer=Content.REALISATION, errors=_NAMED
)
BUILD_TRACE: Final = Route[None](
    "GET", "{prefix}/build-trace-v2/{derivation}/{output}.doi", Right.READ, answer=Content.REALISATION, errors=_NAMED
)
#: One question about many paths and all that they reach; its body is `NarinfosQuestion`.
NARINFOS: Final = Route[None](
    "POST",
    "{prefix}/narinfos",
    Right.READ,
    body=NarinfosQuestion,
    answer=Content.NARINFOS,
    errors=_MESSAGE,
)
#: Where `stable` of a tracked environment is, for programs and for Nix. Only the default cache has any.
STABLE_JSON: Final = Route[None](
    "GET", f"{_ENVIRONMENT}/stable.json", Right.READ, answer=Content.POINTER, errors=_NAMED
)
STABLE_NIX: Final = Route[None]("GET", f"{_ENVIRONMENT}/stable.nix", Right.READ, answer=Content.NIX, errors=_NAMED)
#: A plain file by its hash, as Nix asks a mirror of `hashed-mirrors`; the fetchers of nixpkgs may write it as SRI.
MIRRORED: Final = Route[None](
    "GET", "{prefix}/mirror/{algorithm:[a-z0-9]*}/{hash:.+}", Right.READ, answer=Content.FILE, errors=_NAMED
)
NOTHING: Final = Route[None]("GET", "{prefix}/{anything:.*}", Right.READ, status=404)

PUT_CACHE_INFO: Final = Route[None](
    "PUT", "{prefix}/nix-cache-info", Right.WRITE, body=Content.CACHE_INFO, errors=(409, *_SENT)
)
PUT_NARINFO: Final = Route[None](
    "PUT", f"{{prefix}}/{_HASH_PART}.narinfo", Right.WRITE, body=Content.NARINFO, errors=_SIGNED
)
PUT_NAR: Final = Route[None]("PUT", "{prefix}/nar/{file}", Right.WRITE, body=Content.NAR, errors=_STORED)
PUT_LOG: Final = Route[None]("PUT", "{prefix}/log/{derivation}", Right.WRITE, body=Content.LOG, errors=_STORED)
PUT_LISTING: Final = Route[None]("PUT", f"{{prefix}}/{_HASH_PART}.ls", Right.WRITE, body=Content.DROPPED, errors=_SENT)
PUT_DEBUG_INFO: Final = Route[None](
    "PUT", "{prefix}/debuginfo/{build_id}", Right.WRITE, body=Content.DROPPED, errors=_SENT
)
PUT_REALISATION: Final = Route[None](
    "PUT", "{prefix}/realisations/{key}.doi", Right.WRITE, body=Content.REALISATION, errors=_SIGNED
)
PUT_BUILD_TRACE: Final = Route[None](
    "PUT",
    "{prefix}/build-trace-v2/{derivation}/{output}.doi",
    Right.WRITE,
    body=Content.REALISATION,
    errors=_SIGNED,
)

#: Every route below a cache's prefix.
CACHE_ROUTES: Final[tuple[Route[Any], ...]] = (
    BEGIN,
    URLS,
    PARTS,
    PACK,
    COMMIT,
    RENEW,
    END,
    OFFSET,
    APPEND,
    CACHE_INFO,
    NARINFO,
    NAR,
    LISTING,
    BUILD_LOG,
    REALISATION,
    BUILD_TRACE,
    NARINFOS,
    STABLE_JSON,
    STABLE_NIX,
    MIRRORED,
    NOTHING,
    PUT_CACHE_INFO,
    PUT_NARINFO,
    PUT_NAR,
    PUT_LOG,
    PUT_LISTING,
    PUT_DEBUG_INFO,
    PUT_REALISATION,
    PUT_BUILD_TRACE,
)
