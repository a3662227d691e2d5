"""One question for a closure: the narinfos of many paths and of all that they reach, as a stream of bounded pages.

    POST PREFIX/narinfos  {"paths": [base name or hash part], "closure": true, "after": ""}
    200                   {"narinfos":[
                          "StorePath: …",
                          "StorePath: …"
                          ],"missing":[base name],"next":"…"}

The answer is one JSON object, written so that a reader may take each narinfo as its line comes. It holds the paths of
the question, then what they reach, NARINFOS_AT_ONCE paths and PAGE_BYTES at most, references first. Where `next` is not
empty, the same question with it as `after` gives the next page. `missing` are paths of the question that are not
published, and lost members of the closure.

A stranger may ask where the cache is public, so the cost is bounded: MAX_QUESTION paths of a question, MAX_CLOSURE of a
closure, WALKS_AT_ONCE questions that use the database, ANSWERS_PER_ADDRESS answers under way for one address that is
not this machine's. More wait for their turn, TURN_S at most, and are 503 then. Paths of the question that are not
published count as missed (`coordinator.demand`), once for all its pages.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

import orjson
from aiohttp import web

from coordinator.api.cache_routes import MAX_QUESTION, NarinfosQuestion
from coordinator.errors import CoordinatorError, UnavailableError
from coordinator.http.answers import error_answer
from coordinator.http.binary_cache.nars import cut
from coordinator.http.bodies import BodyBounds, read_model
from infra.cache.cache import Cache
from infra.cache.catalog.closures import TEXTS_AT_ONCE, ClosurePage, PageBounds
from infra.cache.errors import ClosureTooLargeError
from infra.nix.store_path import HASH_PART_LENGTH, HASH_PART_PATTERN
from infra.objects.errors import CacheError

#: Narinfos of one page, some 1 KiB each, and their bytes.
NARINFOS_AT_ONCE: Final = 4_000
PAGE_BYTES: Final = 16 * 1024 * 1024
QUESTION_BOUNDS: Final = BodyBounds(size_bytes=160 * 1024, items=MAX_QUESTION + 8, containers=4)
#: Questions that walk or read the database at one time; readers have four connections to it.
WALKS_AT_ONCE: Final = 2
ANSWERS_PER_ADDRESS: Final = 8
#: Seconds that a question waits for its turn, and `Retry-After` of one whose turn did not come.
TURN_S: Final = 10.0
RETRY_AFTER_S: Final = 5
#: Answers with so many narinfos are compressed for those who take gzip: to a third, or less.
COMPRESSED_FROM: Final = 64
_BEGINNING: Final = b'{"narinfos":[\n'
_HASH_PART: Final = re.compile(HASH_PART_PATTERN)


@dataclass(slots=True)
class _AddressTurns:
    """Turns of one address, and how many wait for one or have one."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(ANSWERS_PER_ADDRESS))
    users: int = 0


class MissMeter(Protocol):
    """Port of what counts the narinfos that readers miss."""

    def missed(self, hash_part: str, address: str) -> None:
        """A reader at this address asked for a path that is not there."""

    def found(self, hash_part: str) -> None:
        """A path was asked for that is there."""


class ClosureAnswers:
    """Answers the question of one cache."""

    def __init__(self, cache: Cache, misses: MissMeter | None = None) -> None:
        self._cache = cache
        self._misses = misses
        self._walks = asyncio.Semaphore(WALKS_AT_ONCE)
        self._addresses: dict[str, _AddressTurns] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer with a page of narinfos."""
        try:
            question = await read_model(request, NarinfosQuestion, QUESTION_BOUNDS)
            async with self._turn(request.remote or ""):
                return await self._page(request, question)
        except ClosureTooLargeError as error:
            return error_answer(413, "too_large", f"{error}.")
        except UnavailableError as error:
            return error_answer(error.status, error.code, str(error), {"Retry-After": str(RETRY_AFTER_S)})
        except CoordinatorError as error:
            return error_answer(error.status, error.code, str(error))
        except CacheError as error:
            return error_answer(503, "unavailable", f"{error}; try again.")

    async def _page(self, request: web.Request, question: NarinfosQuestion) -> web.StreamResponse:
        bounds = PageBounds(NARINFOS_AT_ONCE, PAGE_BYTES)
        known = None
        if not question.after:
            known = self._cache.closure_in_memory(question.paths, bounds, recursive=question.closure)
        if known is not None:
            # As nearly every question of a worker is: for what was published a moment ago.
            body = b"".join((_BEGINNING, _lines(known), _ending(())))
            return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})
        async with self._walk():
            page = await self._cache.closure_page(
                question.paths, bounds, recursive=question.closure, after=int(question.after or 0)
            )
            # A failure is still a status of its own until the first bytes have left.
            texts, lost = await self._cache.read_page(page.serials[:TEXTS_AT_ONCE])
        self._count(page, request.remote or "")
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Cache-Control": "no-store"})
        if len(page.serials) >= COMPRESSED_FROM:
            response.enable_compression()
        await response.prepare(request)
        try:
            await self._write(response, page, texts, lost)
        except (CacheError, UnavailableError) as error:
            cut(request, error)
            return response
        await response.write_eof()
        return response

    def _count(self, page: ClosurePage, address: str) -> None:
        parts = {name[:HASH_PART_LENGTH] for name in page.unknown}
        if self._misses is not None:
            for part in filter(_HASH_PART.fullmatch, parts):
                self._misses.missed(part, address)

    async def _write(
        self, response: web.StreamResponse, page: ClosurePage, texts: list[bytes], lost: list[str]
    ) -> None:
        missing = [*page.unknown, *lost]
        written = _BEGINNING
        rest = page.serials[TEXTS_AT_ONCE:]
        begun = False
        while True:
            lines = _lines(texts)
            await response.write(written + (b",\n" if begun and lines else b"") + lines)
            begun, written = begun or bool(lines), b""
            if not rest:
                break
            async with self._walk():
                texts, lost = await self._cache.read_page(rest[:TEXTS_AT_ONCE])
            missing += lost
            rest = rest[TEXTS_AT_ONCE:]
        await response.write(_ending(missing, page.after))

    @asynccontextmanager
    async def _turn(self, address: str) -> AsyncIterator[None]:
        """Give a turn of an address. Raises `UnavailableError`."""
        if _is_this_machine(address):
            yield
            return
        mine = self._addresses.setdefault(address, _AddressTurns())
        mine.users += 1
        try:
            async with _within_turn_s(mine.turns):
                yield
        finally:
            mine.users -= 1
            if not mine.users:
                self._addresses.pop(address, None)

    @asynccontextmanager
    async def _walk(self) -> AsyncIterator[None]:
        """Give a turn with the database. Raises `UnavailableError`."""
        async with _within_turn_s(self._walks):
            yield


def _lines(texts: Iterable[bytes]) -> bytes:
    return b",\n".join(orjson.dumps(text.decode()) for text in texts)


def _ending(missing: Iterable[str], after: int = 0) -> bytes:
    return b"\n]," + orjson.dumps({"missing": sorted(missing), "next": str(after or "")})[1:]


@asynccontextmanager
async def _within_turn_s(turns: asyncio.Semaphore) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(TURN_S):
            await turns.acquire()
    except TimeoutError:
        raise UnavailableError("too many questions about closures at one time; try again.") from None
    try:
        yield
    finally:
        turns.release()


def _is_this_machine(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return True
