"""Gate of the HTTP connections: how many there are, from whom, and how long one may send nothing.

Rules:
    1. There are at most `ConnectionBounds.total` connections, and `per_address` from one address that is not loopback
       (a proxy before us, the farm's own workers). Both lie below the limit of file descriptors, of which databases,
       Ray, logs and objects keep their reserve.
    2. Beyond a bound, the idle connection without an authenticated request that has been idle longest is closed for the
       new one; where there is none, an idle authenticated one if the total is reached, else the new one is closed.
    3. The head of a request comes within HEAD_S of the connection, or of its first byte on a connection that is kept.
    4. Strangers' downloads take at most STRANGERS_SHARE of the connections; more are 503, which Nix tries again.
    5. A client that takes too little of its answer for UNREAD_S loses the connection: 48 KiB of what waits for it, and
       more where files go past the loop (`coordinator.http.binary_cache.nars`).
    6. `accept` that fails (no descriptor is free) is tried again; it never ends the loop or the listening socket.
    7. Clients that leave in the middle of a request are counted. Neither they nor bytes that are no request cost a line
       in the log: a stranger could fill it for nothing.

A connection is *known* once a request on it had a valid token (`mark_known`).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware
from aiohttp.web_protocol import RequestHandler

from infra.retry import Outage

#: Connections at one time unless configured otherwise, some 30 KB each, and from one address.
MAX_CONNECTIONS: Final = 4096
MAX_PER_ADDRESS: Final = 256
#: Descriptors that the process asks for at start, where the hard limit allows so many.
WANTED_DESCRIPTORS: Final = 65_536
#: Descriptors that stay free of connections, at most half of all.
RESERVED_DESCRIPTORS: Final = 512
#: A connection that is served a NAR has its file open too.
DESCRIPTORS_PER_CONNECTION: Final = 2
#: Share of all connections on which requests without a token may be under way.
STRANGERS_SHARE: Final = 0.75
#: `Retry-After` of a crowded coordinator, in seconds.
RETRY_AFTER_S: Final = 5
#: Seconds for a request's head.
HEAD_S: Final = 10.0
#: Seconds within which a client makes room for more of its answer (Nix itself gives up after as long).
UNREAD_S: Final = 300.0
#: Seconds between two tries to accept while that fails.
ACCEPT_PAUSE_S: Final = 0.1
#: Errors that aiohttp would log with their traceback, although a client made them: it left, or sent no HTTP.
_CLIENTS_DOING: Final = (ConnectionError, HttpProcessingError, web.RequestPayloadError)
#: Errors of `accept` that are the connection's own, gone before it was accepted.
_GONE: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionBounds:
    """Connections at one time, in all and from one address that is not loopback."""

    total: int
    per_address: int

    @classmethod
    def within(cls, descriptors: int, total: int, per_address: int) -> ConnectionBounds:
        """Return `total` and `per_address`, lowered to what `descriptors` allow."""
        free = descriptors - min(RESERVED_DESCRIPTORS, descriptors // 2)
        allowed = max(1, min(total, free // DESCRIPTORS_PER_CONNECTION))
        return cls(allowed, min(per_address, allowed))


def raise_descriptor_limit() -> int:
    """Raise this process' limit of descriptors to what it may have, at most WANTED_DESCRIPTORS; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(WANTED_DESCRIPTORS, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return WANTED_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class ConnectionGate:
    """Knows all open connections."""

    def __init__(self, bounds: ConnectionBounds) -> None:
        self.bounds = bounds
        #: Oldest first, by when they were opened or last became idle.
        self._open: dict[GuardedConnection, None] = {}
        self._by_address: Counter[str] = Counter()
        #: Connections closed for others, refused, and given up for want of a head or of a reader.
        self.evicted = self.refused = self.silent = 0
        #: Requests whose client left before it had the answer, as far as anything noticed.
        self.abandoned = 0

    def __len__(self) -> int:
        return len(self._open)

    def admits(self, address: str) -> bool:
        """Make room for a connection from `address`; False where there is none."""
        if self._by_address[address] >= self.bounds.per_address and not _is_loopback(address):
            room = self._evict(lambda each: each.address == address and not each.known)
        elif len(self._open) >= self.bounds.total:
            room = self._evict(lambda each: not each.known) or self._evict(lambda _: True)
        else:
            return True
        self.refused += not room
        return room

    def enter(self, connection: GuardedConnection) -> None:
        """Count a connection in."""
        self._open[connection] = None
        self._by_address[connection.address] += 1

    def leave(self, connection: GuardedConnection) -> None:
        """Count a connection out; may be called again."""
        if connection in self._open:
            del self._open[connection]
            self._by_address[connection.address] -= 1
            if not self._by_address[connection.address]:
                del self._by_address[connection.address]

    def touch(self, connection: GuardedConnection) -> None:
        """Note that a connection has been used: it is the last to be closed for another."""
        if connection in self._open:
            self._open[connection] = self._open.pop(connection)

    @property
    def crowded(self) -> bool:
        """True if requests without a token hold so many connections that those with one might soon find none."""
        bound = self.bounds.total * STRANGERS_SHARE
        return len(self._open) > bound and sum(not each.idle and not each.known for each in self._open) > bound

    def _evict(self, may_go: Callable[[GuardedConnection], bool]) -> bool:
        for each in self._open:
            if each.idle and may_go(each):
                self.leave(each)
                each.drop()
                self.evicted += 1
                return True
        return False


class GuardedConnection(RequestHandler):
    """aiohttp's connection, counted by a gate and bounded in the time for a head."""

    __slots__ = ("_head_timer", "_heads", "_unread_timer", "address", "gate", "known")

    def __init__(self, gate: ConnectionGate, address: str, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, auto_decompress=False, **options)
        self.gate = gate
        self.address = address
        #: Whether a request on it had a valid token.
        self.known = False
        self._heads = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """True if no request is under way; half a head is none."""
        waiter = self._waiter
        return self._request_count == 0 or (waiter is not None and not waiter.done() and not self._messages)

    def drop(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Enter the gate; the first head is awaited from here on."""
        self.gate.enter(self)
        self._expect_head()
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Leave the gate."""
        self.gate.leave(self)
        self._forget_timer()
        self._forget_unread()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for the client to take what is sent."""
        super().pause_writing()
        self._unread_timer = self._loop.call_later(UNREAD_S, self._give_up)

    def resume_writing(self) -> None:
        """Note that the client took it."""
        self._forget_unread()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Pass on, and look whether a head is whole."""
        super().data_received(data)
        if self._request_count > self._heads:
            self._heads = self._request_count
            self._forget_timer()
            self.gate.touch(self)
        elif self._head_timer is None and self.idle:
            self._expect_head()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log an error of ours; what a client sent or left undone is none."""
        clients = isinstance(kw.get("exc_info"), _CLIENTS_DOING)
        (self.logger.debug if clients else self.logger.exception)(*args, **kw)

    def answered(self) -> None:
        """Note a request that was answered without aiohttp."""
        self._forget_timer()
        self.gate.touch(self)

    def _expect_head(self) -> None:
        self._head_timer = self._loop.call_later(HEAD_S, self._give_up)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _forget_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _give_up(self) -> None:
        self._head_timer = self._unread_timer = None
        self.gate.silent += 1
        self.drop()


def is_abandoned(request: web.BaseRequest, error: Exception) -> bool:
    """Return whether a request failed because its client left, and count it.

    A broken connection to something else (a database, an object store) is an error while the client is still there.
    """
    transport = request.transport
    if not isinstance(error, ConnectionError) or (transport is not None and not transport.is_closing()):
        return False
    if isinstance(request.protocol, GuardedConnection):
        request.protocol.gate.abandoned += 1
    return True


def mark_known(request: web.BaseRequest) -> None:
    """Note that the request had a valid token: its connection is among the last to be closed for another."""
    if isinstance(request.protocol, GuardedConnection):
        request.protocol.known = True


def require_room(gate: ConnectionGate) -> Middleware:
    """Return a middleware that keeps strangers' downloads from taking all connections: they last, unlike all else."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if "/nar/" in request.path and gate.crowded and not getattr(request.protocol, "known", False):
            headers = {"Retry-After": str(RETRY_AFTER_S), "Cache-Control": "no-store"}
            answer = web.Response(status=503, text="too many downloads; try again\n", headers=headers)
            answer.force_close()
            return answer
        return await handler(request)

    return check


async def accept(listener: socket.socket, gate: ConnectionGate, connected: Callable[[str], GuardedConnection]) -> None:
    """Accept connections for ever, those that the gate admits."""
    loop = asyncio.get_running_loop()
    outage = Outage(_log, "trying again", over="connections can be accepted again")
    while True:
        try:
            client, peer = await loop.sock_accept(listener)
        except OSError as error:
            if error.errno in _GONE:
                continue
            outage.begin(f"no connection can be accepted at the moment ({error.strerror})")
            await asyncio.sleep(ACCEPT_PAUSE_S)
            continue
        outage.end()
        address = str(peer[0])
        if not gate.admits(address):
            client.close()
            continue
        try:
            await loop.connect_accepted_socket(partial(connected, address), client)
        except OSError:
            client.close()


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
