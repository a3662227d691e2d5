"""Narinfos and small NARs without the web framework: the requests that Nix clients send by the thousand.

aiohttp spends some 150 us on a request before a handler sees it. `FastConnection` is aiohttp's connection with a glance
at what arrives: if the connection is idle and the bytes are exactly one plain request

    GET|HEAD PREFIX/<hash>.narinfo HTTP/1.1, or GET PREFIX/nar/<file>, and only Host, User-Agent, Accept and
    Accept-Encoding

for a public cache, and the cache can answer from memory, or from a file of at most SMALL_FILE_BYTES whose path is in
memory, the answer is written at once. All else - another address or header, a private cache, a narinfo that must be
looked up, a large NAR, half a request, two at once, an answer still under way - is passed on untouched, and aiohttp
answers as if this module were not there. Both say the same, byte for byte but for the date (tests compare them).

When is a connection idle? When aiohttp waits for a request and nothing of one is in its parser. The second is known
only while everything it was given were whole requests without a body; after anything else the connection is left to
aiohttp for good.

How fresh is the answer? As fresh as the slow one: `Cache.narinfo_in_memory` looks at the file of the object for each
request, and the cache drops a path from memory before it withdraws it.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

from coordinator.caches.opening import OpenCache
from coordinator.http.binary_cache.nars import NAR_HEADERS, SMALL_FILE_BYTES
from coordinator.http.binary_cache.routes import narinfo_headers
from coordinator.http.connections import (
    MAX_CONNECTIONS,
    MAX_PER_ADDRESS,
    ConnectionBounds,
    ConnectionGate,
    GuardedConnection,
    accept,
    raise_descriptor_limit,
)
from infra.cache.cache import Cache
from infra.nix.store_path import HASH_PART_PATTERN
from infra.objects.errors import CacheError

#: Header blocks that were found plain (or not) and are remembered; a client sends the same one each time.
REMEMBERED_HEADERS: Final = 256
#: Heads of answers that are remembered, some 200 bytes each.
REMEMBERED_HEADS: Final = 8192
MAX_HEADER_BYTES: Final = 1024
#: Seconds that a connection may be idle: longer than any client (Nix 2.35: 90) keeps one.
KEEP_ALIVE_S: Final = 120.0

_HEADER = re.compile(rb"(?i)(?:(host)|user-agent|accept|accept-encoding): ([!-~](?:[ -~]*[!-~])?)")
_HASH: Final = f"({HASH_PART_PATTERN})".encode("ascii")
#: The key of an object, as narinfos name it.
_NAR: Final = rb"(nar/[0-9a-z]{1,64}\.nar(?:\.[0-9a-z]{1,8})?)"
#: The head of a NAR's answer up to its entity tag.
_NAR_HEAD: Final = "".join(f"{name}: {value}\r\n" for name, value in NAR_HEADERS.items())
_END: Final = b"\r\n\r\n"
#: Words of requests that have a body, or turn the connection into something else.
_BODY_WORDS: Final = (b"content-length", b"transfer-encoding", b"upgrade")


class FastAnswers:
    """Knows the answers. `own_host` returns whether a request under that `Host` is ours to answer."""

    def __init__(self, caches: Iterable[OpenCache], own_host: Callable[[str], bool]) -> None:
        public = {each.prefix.encode(): each.cache for each in caches if each.access.public}
        self._caches: dict[bytes, Cache] = public
        prefixes = b"|".join(re.escape(prefix) for prefix in public) or b"(?!)"
        self._line = re.compile(
            rb"(GET|HEAD) (" + prefixes + rb")/(?:" + _HASH + rb"\.narinfo|" + _NAR + rb") HTTP/1\.1\r\n"
        )
        self._own_host = own_host
        self._plain: dict[bytes, bool] = {}
        #: Text of a narinfo -> the head of its answer up to the date.
        self._heads: dict[bytes, bytes] = {}

    def answer(self, data: bytes, *, with_nars: bool = True) -> bytes | None:
        """Return the answer to the request that `data` is, None if it is for aiohttp."""
        line = self._line.match(data)
        if line is None or not self._is_plain(data[line.end() :]):
            return None
        cache = self._caches[line[2]]
        try:
            if line[4] is not None:
                return _nar(cache, line[4].decode("ascii")) if with_nars and line[1] == b"GET" else None
            text = cache.narinfo_in_memory(line[3].decode("ascii"))
        except CacheError:
            return None
        if text is None:
            return None
        cache.counters.narinfo_hits += 1
        head = self._head(text)
        return head + text if line[1] == b"GET" else head

    def _head(self, text: bytes) -> bytes:
        """Return the head of the answer as aiohttp would write it."""
        head = self._heads.get(text)
        if head is None:
            headers = "".join(f"{name}: {value}\r\n" for name, value in narinfo_headers(text).items())
            head = f"HTTP/1.1 200 OK\r\n{headers}Content-Length: {len(text)}\r\nDate: ".encode("ascii")
            if len(self._heads) >= REMEMBERED_HEADS:
                self._heads.clear()
            self._heads[text] = head
        return head + _head_end()

    def _is_plain(self, block: bytes) -> bool:
        known = self._plain.get(block)
        if known is None:
            if len(block) > MAX_HEADER_BYTES:
                return False
            known = self._look_at(block)
            if len(self._plain) >= REMEMBERED_HEADERS:
                self._plain.clear()
            self._plain[block] = known
        return known

    def _look_at(self, block: bytes) -> bool:
        if not block.endswith(_END):
            return False
        hosts = []
        for line in block[: -len(_END)].split(b"\r\n"):
            header = _HEADER.fullmatch(line)
            if header is None:
                return False
            if header[1]:
                hosts.append(header[2].decode("ascii"))
        return len(hosts) == 1 and self._own_host(hosts[0])


def _nar(cache: Cache, key: str) -> bytes | None:
    """Return the answer to a request for a small object, None for any other. Raises `ObjectStoreError`."""
    content = cache.small_object(key, SMALL_FILE_BYTES)
    if content is None:
        return None
    cache.counters.nar_requests += 1
    cache.counters.nar_bytes += len(content)
    tag = key.rpartition("/")[2]
    head = f'HTTP/1.1 200 OK\r\n{_NAR_HEAD}Etag: "{tag}"\r\nContent-Length: {len(content)}\r\nDate: '
    return head.encode("ascii") + _head_end() + content


def _head_end() -> bytes:
    return f"{rfc822_formatted_time()}\r\nServer: {SERVER_SOFTWARE}\r\n\r\n".encode("ascii")


class FastConnection(GuardedConnection):
    """One client's connection."""

    __slots__ = ("_fast", "_whole")

    def __init__(
        self, fast: FastAnswers, gate: ConnectionGate, address: str, manager: web.Server, **options: Any
    ) -> None:
        super().__init__(gate, address, manager, **options)
        self._fast = fast
        #: Whether nothing of a request can be in the parser.
        self._whole = True

    def data_received(self, data: bytes) -> None:
        """Answer, or pass on."""
        if self._whole and data:
            if self._waiter is not None and not self._waiter.done() and not self._paused and self.transport is not None:
                # A crowd's downloads are refused by aiohttp's middleware (`require_room`).
                answer = self._fast.answer(data, with_nars=self.known or not self.gate.crowded)
                if answer is not None:
                    self.transport.write(answer)
                    self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
                    self.answered()
                    return
            self._whole = _is_whole(data)
        super().data_received(data)


def _is_whole(data: bytes) -> bool:
    """Return whether `data`, at the beginning of a request, ends with the end of one that has no body."""
    if not data.startswith((b"GET ", b"HEAD ")) or data.find(_END) != len(data) - len(_END):
        return False
    lowered = data.lower()
    return not any(word in lowered for word in _BODY_WORDS)


class FastSite(web.BaseSite):
    """Serves a runner's application on a socket that listens already, through `FastConnection`s behind a gate."""

    __slots__ = ("_accepting", "_fast", "_gate", "_socket")

    def __init__(
        self, runner: web.BaseRunner, listener: socket.socket, fast: FastAnswers, gate: ConnectionGate | None = None
    ) -> None:
        """The socket is closed with the site."""
        super().__init__(runner)
        self._socket = listener
        self._fast = fast
        self._gate = open_gate() if gate is None else gate
        self._accepting: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Address, for messages."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{host}:{port}"

    async def start(self) -> None:
        """Accept connections."""
        await super().start()
        loop = asyncio.get_running_loop()
        manager = self._runner.server
        if manager is None:
            raise RuntimeError("the runner is not set up")
        self._socket.setblocking(False)

        def connected(address: str) -> FastConnection:
            return FastConnection(
                self._fast, self._gate, address, manager, loop=loop, access_log=None, keepalive_timeout=KEEP_ALIVE_S
            )

        self._accepting = loop.create_task(accept(self._socket, self._gate, connected), name="accept")

    async def stop(self) -> None:
        """Accept no more; connections that are open are the runner's to close."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        self._socket.close()
        await super().stop()


def open_gate(total: int = MAX_CONNECTIONS, per_address: int = MAX_PER_ADDRESS) -> ConnectionGate:
    """Return a gate within the limit of descriptors, which is raised to what this process may have."""
    return ConnectionGate(ConnectionBounds.within(raise_descriptor_limit(), total, per_address))
