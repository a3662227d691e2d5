"""A daemon's front: what a client asks goes on to a real daemon, and builds wait until something else has made them.

It speaks with both sides in the older of their versions, 1.37 at most, and knows where each request ends. Answers are
passed on unread: a client sends its next request only when it has the whole answer to the last. A request that it does
not know, and one that would build without being asked for a path, is refused.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from typing import Final

from infra.daemon.channel import Channel
from infra.daemon.errors import DaemonGone, DaemonProtocolError
from infra.daemon.wire import CLIENT_MAGIC, SERVER_MAGIC, TAG_ERROR, Encoder, Inbox

#: Newest version that it speaks: 1.38 brings features, which change requests.
NEWEST_MINOR: Final = 37
OLDEST_MINOR: Final = 32
_MAJOR: Final = 1
#: Most words of a build request, and of one option.
MAX_WORDS: Final = 100_000


class _Part(Enum):
    """Kinds of parts of a request."""

    INTEGER = auto()
    STRING = auto()
    STRINGS = auto()
    #: A count, and as many pairs of strings.
    PAIRS = auto()
    #: Frames (length, bytes), the last of which is empty.
    FRAMED = auto()


_I, _S, _L, _P, _F = _Part.INTEGER, _Part.STRING, _Part.STRINGS, _Part.PAIRS, _Part.FRAMED
BUILD_PATHS: Final = 9
BUILD_PATHS_WITH_RESULTS: Final = 46
#: Request -> its parts, from 1.32 to 1.37.
_REQUESTS: Final[dict[int, tuple[_Part, ...]]] = {
    1: (_S,),  # IsValidPath
    3: (_S,),  # HasSubstitutes
    5: (_S,),  # QueryReferences
    6: (_S,),  # QueryReferrers
    7: (_S, _S, _L, _I, _F),  # AddToStore
    8: (_S, _S, _L),  # AddTextToStore
    BUILD_PATHS: (_L, _I),
    10: (_S,),  # EnsurePath
    11: (_S,),  # AddTempRoot
    12: (_S,),  # AddIndirectRoot
    14: (),  # FindRoots
    19: (*[_I] * 12, _P),  # SetOptions
    20: (_I, _L, _I, _I, _I, _I, _I),  # CollectGarbage
    21: (_S,),  # QuerySubstitutablePathInfo
    22: (_S,),  # QueryDerivationOutputs
    23: (),  # QueryAllValidPaths
    26: (_S,),  # QueryPathInfo
    28: (_S,),  # QueryDerivationOutputNames
    29: (_S,),  # QueryPathFromHashPart
    30: (_P,),  # QuerySubstitutablePathInfos
    31: (_L, _I),  # QueryValidPaths
    32: (_L,),  # QuerySubstitutablePaths
    33: (_S,),  # QueryValidDerivers
    37: (_S, _L),  # AddSignatures
    38: (_S,),  # NarFromPath
    39: (_S, _S, _S, _L, _I, _I, _I, _L, _S, _I, _I, _F),  # AddToStoreNar
    40: (_L,),  # QueryMissing
    41: (_S,),  # QueryDerivationOutputMap
    42: (_S,),  # RegisterDrvOutput
    43: (_S,),  # QueryRealisation
    44: (_I, _I, _F),  # AddMultipleToStore
    45: (_S, _F),  # AddBuildLog
    BUILD_PATHS_WITH_RESULTS: (_L, _I),
    47: (_S, _S),  # AddPermRoot
}

#: Is given the paths of a build (`PATH.drv!out`), and returns when the daemon has nothing left to build of them; a
#: text is the error that the client gets in place of the build.
BeforeBuild = Callable[[Sequence[str]], Awaitable[str | None]]


async def serve_client(client: Channel, upstream: Channel, before_build: BeforeBuild) -> None:
    """Serve one connection of a client until it ends; both channels are the caller's to close.

    Raises:
        DaemonError: A side says what it should not.
    """
    await _shake_hands(client, upstream)
    answers = asyncio.create_task(_pass_on_all(upstream, client), name="answers of a nix daemon")
    requests = asyncio.create_task(_pass_on_requests(client, upstream, before_build), name="requests of a nix client")
    try:
        done, _ = await asyncio.wait((answers, requests), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            with suppress(DaemonGone):
                task.result()
    finally:
        answers.cancel()
        requests.cancel()
        await asyncio.gather(answers, requests, return_exceptions=True)


async def _shake_hands(client: Channel, upstream: Channel) -> None:
    if await client.decode(Inbox.read_int) != CLIENT_MAGIC:
        raise DaemonProtocolError("the peer is not a Nix client")
    await upstream.send(Encoder().integer(CLIENT_MAGIC).getvalue())
    if await upstream.decode(Inbox.read_int) != SERVER_MAGIC:
        raise DaemonProtocolError("the peer is not a Nix daemon")
    offered = _older(await upstream.decode(Inbox.read_int))
    await client.send(Encoder().integer(SERVER_MAGIC).integer(offered).getvalue())
    version = min(offered, _older(await client.decode(Inbox.read_int)))
    await upstream.send(Encoder().integer(version).getvalue())
    copy = _Copy(client, upstream)
    # An affinity, which no daemon has looked at since 1.32, and the wish for reserved space.
    if await copy.integer():
        await copy.integer()
    await copy.integer()
    await copy.flush()


def _older(version: int) -> int:
    minor = min(version & 0xFF, NEWEST_MINOR)
    if version >> 8 != _MAJOR or minor < OLDEST_MINOR:
        raise DaemonProtocolError(f"protocol {version >> 8}.{version & 0xFF} is too old; Nix 2.4 or later is needed")
    return _MAJOR << 8 | minor


async def _pass_on_all(source: Channel, target: Channel) -> None:
    while True:
        if not len(source.inbox):
            await source.fill(1)
        await target.send(source.inbox.read_raw(len(source.inbox)))


async def _pass_on_requests(client: Channel, upstream: Channel, before_build: BeforeBuild) -> None:
    copy = _Copy(client, upstream)
    while True:
        operation = await copy.integer()
        parts = _REQUESTS.get(operation)
        if parts is None:
            await client.send(_refusal(f"drover's evaluation takes no request of kind {operation}"))
            return
        if operation in {BUILD_PATHS, BUILD_PATHS_WITH_RESULTS}:
            paths = await client.words("paths to build", MAX_WORDS)
            mode = await client.decode(Inbox.read_int)
            error = await before_build(paths)
            if error is not None:
                copy.forget()
                await client.send(_refusal(error))
                continue
            copy.add(Encoder().strings(paths).integer(mode).getvalue())
        else:
            for part in parts:
                await copy.part(part)
        await copy.flush()


def _refusal(text: str) -> bytes:
    error = Encoder().integer(TAG_ERROR).string("Error").integer(0).string("Error")
    return error.string(text).integer(0).integer(0).getvalue()


class _Copy:
    """Parts of requests on their way, of which none is held whole that may be long."""

    def __init__(self, source: Channel, target: Channel) -> None:
        self._source = source
        self._target = target
        self._pending = bytearray()

    def add(self, data: bytes) -> None:
        """Append bytes to what is sent."""
        self._pending += data

    def forget(self) -> None:
        """Drop what was read and not sent."""
        self._pending.clear()

    async def flush(self) -> None:
        """Send what was read."""
        data = bytes(self._pending)
        self._pending.clear()
        if data:
            await self._target.send(data)

    async def integer(self) -> int:
        """Copy an integer and return it."""
        value = await self._source.decode(Inbox.read_int)
        self._pending += Encoder().integer(value).getvalue()
        return value

    async def part(self, part: _Part) -> None:
        """Copy one part."""
        match part:
            case _Part.INTEGER:
                await self.integer()
            case _Part.STRING:
                await self._string()
            case _Part.STRINGS:
                for _ in range(await self.integer()):
                    await self._string()
            case _Part.PAIRS:
                for _ in range(2 * await self.integer()):
                    await self._string()
            case _Part.FRAMED:
                while length := await self.integer():
                    await self._bytes(length)

    async def _string(self) -> None:
        length = await self.integer()
        await self._bytes(length + -length % 8)

    async def _bytes(self, left: int) -> None:
        inbox = self._source.inbox
        while left:
            if not len(inbox):
                await self.flush()
                await self._source.fill(1)
            data = inbox.read_raw(left)
            left -= len(data)
            self._pending += data
