"""A mirror of sources by their content, in the layout of Nix' `hashed-mirrors`: `URL/ALGORITHM/HASH in base 16`.

A mirror is not trusted: what it sends is hashed while it comes, and counts for nothing where the hash is another one.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Final

import aiohttp

from infra.nix.content import FixedContent
from infra.nix.nar import NarData, NarEvent, NarFile, write_events

#: Seconds until a connection, and between two pieces of an answer.
CONNECT_S: Final = 5.0
SILENCE_S: Final = 30.0
MAX_REDIRECTS: Final = 5
#: Bytes that are hashed and written at a time, in a thread.
BLOCK_BYTES: Final = 1024 * 1024
#: Seconds for which a mirror that failed is left alone.
REST_S: Final = 30.0
#: Answers that mean "not here".
_ABSENT: Final = frozenset({401, 403, 404, 410})


class MirrorOutcome(StrEnum):
    """Outcomes of one question to a mirror."""

    FOUND = "found"
    #: It does not have the content, and says so.
    ABSENT = "absent"
    #: It did not answer, or broke off: later it may.
    AWAY = "away"
    #: It sent something else.
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class MirrorAnswer:
    """Answer of a mirror, in one sentence too; `size` of what was found."""

    outcome: MirrorOutcome
    sentence: str = ""
    size: int = 0


class _UnfitError(Exception):
    """A content is larger than is taken."""


class Mirror:
    """One mirror. `session` is somebody else's, `now` gives seconds."""

    def __init__(self, url: str, session: aiohttp.ClientSession, max_bytes: int, now: Callable[[], float]) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._max_bytes = max_bytes
        self._now = now
        self._rests_until = float("-inf")
        #: Its last trouble, which is the answer as long as it rests.
        self._trouble = ""

    async def fetch(self, content: FixedContent, into: IO[bytes]) -> MirrorAnswer:
        """Write a plain file with this content into `into`; only an answer FOUND says that it is there and right."""
        if self._now() < self._rests_until:
            return MirrorAnswer(MirrorOutcome.AWAY, self._trouble)
        try:
            return await self._fetch(content, into)
        # Of a redirection to what is no name of a host `ValueError` comes.
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            reason = str(error).split("\n", 1)[0] or type(error).__name__
            return self._away(f"{self.url} does not answer: {reason}"[:300])
        except _UnfitError:
            return MirrorAnswer(
                MirrorOutcome.WRONG, f"{self.url} sent more than {self._max_bytes} bytes (`sources.max_mib`)"
            )

    async def _fetch(self, content: FixedContent, into: IO[bytes]) -> MirrorAnswer:
        address = f"{self.url}/{content.algo}/{content.digest.hex()}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        # As the file is: what is hashed are its bytes, not those of an encoding.
        headers = {"Accept-Encoding": "identity"}
        async with self._session.get(
            address, timeout=timeout, headers=headers, max_redirects=MAX_REDIRECTS
        ) as response:
            if response.status in _ABSENT:
                return MirrorAnswer(MirrorOutcome.ABSENT, f"{self.url} does not have it")
            if response.status != 200:
                return self._away(f"{self.url} answered {response.status}")
            digest, size = hashlib.new(content.algo, usedforsecurity=False), 0

            def take(block: bytes) -> None:
                digest.update(block)
                into.write(block)

            async for block in response.content.iter_chunked(BLOCK_BYTES):
                size += len(block)
                if size > self._max_bytes:
                    raise _UnfitError
                await asyncio.to_thread(take, block)
        if digest.digest() != content.digest:
            sentence = f"{self.url} sent {content.algo} {digest.hexdigest()} for {content.digest.hex()}"
            return MirrorAnswer(MirrorOutcome.WRONG, sentence)
        return MirrorAnswer(MirrorOutcome.FOUND, size=size)

    def _away(self, trouble: str) -> MirrorAnswer:
        self._rests_until, self._trouble = self._now() + REST_S, trouble
        return MirrorAnswer(MirrorOutcome.AWAY, trouble)


async def plain_file_nar(file: IO[bytes], size: int) -> AsyncIterator[bytes]:
    """Yield the archive of a plain file with these bytes; the file is read in threads."""

    def events() -> Iterator[NarEvent]:
        yield NarFile(b"", executable=False, size=size)
        while block := file.read(BLOCK_BYTES):
            yield NarData(block)

    pieces = write_events(events())
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield piece
