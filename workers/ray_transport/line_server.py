"""The agent's end of lines (`workers.ray_transport.line`): it listens, asks each peer for its proof, answers calls."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec

from workers.ray_transport.line import (
    CALLS_SENT,
    LINE_CALLS,
    MOST_FRAME_BYTES,
    NUMBER_BYTES,
    PROOF_S,
    TOO_LARGE,
    Frames,
    LineOffer,
    proof,
)
from workers.wire.messages import MAX_SENTENCE, CallName

_log = logging.getLogger(__name__)

#: Lines at one time, those of strangers that have proven nothing yet among them: coordinators in turn, and tries.
MOST_LINES: Final = 16
#: Calls that one line has answered at a time; a coordinator has a poll and few others.
MOST_CALLS: Final = 64

#: Gives an agent's answer; takes the call and its arguments, the coordinator's epoch first.
Answer = Callable[[CallName, Sequence[Any]], Awaitable[Any]]


class LineServer:
    """Lines to one agent, whose calls are answered in the loop that made this."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.secret = secrets.token_bytes(NUMBER_BYTES)
        self.lines: set[_Served] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> LineOffer:
        """Listen on one address; return what a greeting says of it. Raises `OSError`."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Served(self), host, 0)
        return LineOffer(host=host, port=self._server.sockets[0].getsockname()[1], secret=self.secret)

    async def close(self) -> None:
        """End all lines and listen no more."""
        if self._server is not None:
            self._server.close()
        for line in list(self.lines):
            line.hang_up()


class _Served(Frames):
    """One line."""

    def __init__(self, server: LineServer) -> None:
        super().__init__()
        self._server = server
        self._answered = secrets.token_bytes(NUMBER_BYTES)
        self._asked = b""
        self._proven = False
        self._calls: set[asyncio.Task[None]] = set()
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, where there is room for one more."""
        super().connection_made(transport)
        if len(self._server.lines) >= MOST_LINES:
            self.hang_up()
            return
        self._server.lines.add(self)
        self._patience = asyncio.get_running_loop().call_later(PROOF_S, self.hang_up)

    def receive(self, frame: bytes) -> None:
        """Take the peer's number, its proof, then calls."""
        if self._proven:
            self._take(frame)
        elif not self._asked:
            if len(frame) != NUMBER_BYTES:
                self.hang_up()
                return
            self._asked = frame
            self.send(self._answered + proof(self._server.secret, "agent", self._asked, self._answered))
        elif hmac.compare_digest(frame, proof(self._server.secret, "coordinator", self._asked, self._answered)):
            self._proven = True
            self.most_bytes = MOST_FRAME_BYTES
            if self._patience is not None:
                self._patience.cancel()
        else:
            self.hang_up()

    def lost(self, why: str) -> None:
        """Stop answering: the peer repeats its calls through Ray."""
        _log.debug("a line has ended: %s", why)
        self._server.lines.discard(self)
        if self._patience is not None:
            self._patience.cancel()
        for call in self._calls:
            call.cancel()

    def _take(self, frame: bytes) -> None:
        try:
            number, name, arguments = CALLS_SENT.decode(frame)
        except msgspec.DecodeError:
            self.hang_up()
            return
        if name not in LINE_CALLS or len(self._calls) >= MOST_CALLS:
            self.hang_up()
            return
        task = asyncio.get_running_loop().create_task(self._answer(number, name, arguments))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(self, number: int, name: CallName, arguments: Sequence[Any]) -> None:
        try:
            frame = msgspec.msgpack.encode((number, await self._server.answer(name, arguments), None))
        except Exception as error:  # noqa: BLE001 - told to the caller, as Ray does
            failure = f"{type(error).__name__}: {error}"[:MAX_SENTENCE]
            frame = msgspec.msgpack.encode((number, None, failure))
        if len(frame) > MOST_FRAME_BYTES:
            frame = msgspec.msgpack.encode((number, None, TOO_LARGE))
        self.send(frame)
