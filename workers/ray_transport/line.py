"""A line: one connection from coordinator to agent beside Ray, for the calls that each step makes.

An empty call through Ray costs 1.6 ms of processor and passes eight threads; over a line it is two turns of event
loops. Ray still finds the agent, greets it, and tells its death: an agent's greeting says where it listens, and
whatever does not get through a line goes through Ray instead. Rules:

1. A line carries `LINE_CALLS` alone, which may all be repeated; what is lost with it is sent again through Ray.
2. Each side proves that it knows the secret of the greeting before anything else is read or told, with numbers that are
   new for each connection: a listener that took the port of an agent that died is no agent.
3. Frames are bounded, tiny before the proof. Nothing of a stranger is decoded, and it is heard for `PROOF_S` only.
4. It is no more secret than Ray without TLS; where Ray is told to use TLS there is no line.

A frame is its length (4 bytes) and its bytes: numbers and proofs first, then messagepack: `[number, call, arguments]`,
and `[number, answer, failure]` in any order.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from workers.errors import WorkerError
from workers.wire.messages import MAX_NAME, CallName

#: Calls that go over a line. Others are rare, or too large for it.
LINE_CALLS: Final = frozenset[CallName]({"start_many", "events", "cancel"})
#: Field of a greeting that carries an offer.
LINE_FIELD: Final = "line"
#: Largest frame; an answer has at most 8 MiB and what its outputs add. What is larger goes through Ray.
MOST_FRAME_BYTES: Final = 16 * 1024 * 1024
#: Bytes of each side's number, of a secret, and of a proof.
NUMBER_BYTES: Final = 32
#: Largest frame before the proof, seconds until it must be there, and seconds for connecting.
PROOF_FRAME_BYTES: Final = 2 * NUMBER_BYTES
PROOF_S: Final = 5.0
CONNECT_S: Final = 5.0
#: Why a peer that breaks the rules is hung up on.
NOT_A_PEER: Final = "the peer does not know the line's secret"

_LENGTH_BYTES: Final = 4
#: What an agent that cannot send an answer over a line says of it.
TOO_LARGE: Final = ""
#: Number, call and arguments; number, answer, and why there is none.
CALLS_SENT: Final = msgspec.msgpack.Decoder(tuple[int, str, list[Any]])
ANSWERS: Final = msgspec.msgpack.Decoder(tuple[int, Any, str | None])


class LineLostError(WorkerError):
    """The line has ended, or there is none; whether the call took effect is unknown."""


class LineTooSmallError(WorkerError):
    """The call, or its answer, is larger than a line carries."""


class CallFailedError(WorkerError):
    """The agent answered that it cannot do what the call asks for."""


class LineOffer(msgspec.Struct, frozen=True, kw_only=True):
    """Address of an agent that listens, as its greeting says it; `secret` is one."""

    host: str
    port: int
    secret: bytes

    def __repr__(self) -> str:
        return f"LineOffer({self.host!r}, {self.port})"


def read_offer(found: Any) -> LineOffer | None:
    """Return the offer in a greeting; None where there is none that can be used."""
    try:
        offer = msgspec.convert(found, LineOffer)
    except msgspec.ValidationError:
        return None
    usable = len(offer.secret) == NUMBER_BYTES and 0 < offer.port < 1 << 16 and 0 < len(offer.host) <= MAX_NAME
    return offer if usable else None


def proof(secret: bytes, side: str, asked: bytes, answered: bytes) -> bytes:
    """Return what shows that a side ("agent" or "coordinator") knows the secret; both numbers are in it."""
    return hmac.digest(secret, side.encode() + asked + answered, "sha256")


class Frames(asyncio.Protocol, ABC):
    """One end of a line: whole frames in and out. Subclasses take them by `receive`, and the end by `lost`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.most_bytes = PROOF_FRAME_BYTES
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End, by either side or by the network."""
        self.transport = None
        self.lost(str(exc) if exc else "the other side ended it")

    def data_received(self, data: bytes) -> None:
        """Take bytes, and hand on each frame that is whole."""
        buffer = self._buffer
        buffer += data
        at = 0
        while self.transport is not None and len(buffer) - at >= _LENGTH_BYTES:
            size = int.from_bytes(buffer[at : at + _LENGTH_BYTES], "big")
            if size > self.most_bytes:
                self.hang_up()
                return
            end = at + _LENGTH_BYTES + size
            if len(buffer) < end:
                break
            frame = bytes(buffer[at + _LENGTH_BYTES : end])
            at = end
            self.receive(frame)
        del buffer[:at]

    def send(self, frame: bytes) -> None:
        """Send one frame; it is dropped where the line has ended."""
        if self.transport is not None:
            self.transport.write(len(frame).to_bytes(_LENGTH_BYTES, "big") + frame)

    def hang_up(self) -> None:
        """End the line now."""
        if self.transport is not None:
            self.transport.abort()

    @abstractmethod
    def receive(self, frame: bytes) -> None:
        """Take one frame."""

    @abstractmethod
    def lost(self, why: str) -> None:
        """Take notice of the end."""


class Line(Frames):
    """The coordinator's end. Make it with `Line.connect`; it must be hung up."""

    def __init__(self, offer: LineOffer) -> None:
        super().__init__()
        self._secret = offer.secret
        self._asked = secrets.token_bytes(NUMBER_BYTES)
        self._proven = False
        self._last = 0
        #: Done with the reason once the line has ended, and once the agent has proven that it is one.
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Calls on their way.
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    @classmethod
    async def connect(cls, offer: LineOffer) -> Line:
        """Return a line to the agent that made the offer. Raises `LineLostError`."""
        line = cls(offer)
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().create_connection(lambda: line, offer.host, offer.port)
                await line._begun
        except (OSError, TimeoutError) as error:
            line.hang_up()
            raise LineLostError(f"{offer.host}:{offer.port} is not reached: {str(error) or 'no answer'}") from None
        except BaseException:
            line.hang_up()
            raise
        return line

    async def call(self, name: CallName, arguments: Sequence[Any]) -> Any:
        """Send one call and return its answer. Cancelling ends the line.

        Raises `LineLostError`, `LineTooSmallError` or `CallFailedError`.
        """
        if self.ended.done():
            raise LineLostError(self.ended.result())
        self._last = number = self._last + 1
        frame = msgspec.msgpack.encode((number, name, arguments))
        if len(frame) > MOST_FRAME_BYTES:
            raise LineTooSmallError(f"`{name}` has {len(frame)} bytes")
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.send(frame)
        try:
            return await answer
        except asyncio.CancelledError:
            # The caller's patience is over: who knows what is left of it.
            self.hang_up()
            raise
        finally:
            self._waiting.pop(number, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with a new number."""
        super().connection_made(transport)
        self.send(self._asked)

    def receive(self, frame: bytes) -> None:
        """Check the agent's proof, then take answers."""
        if not self._proven:
            self._prove(frame)
            return
        try:
            number, answer, failure = ANSWERS.decode(frame)
        except msgspec.DecodeError:
            self.hang_up()
            return
        waiting = self._waiting.get(number)
        if waiting is None or waiting.done():
            return
        if failure is None:
            waiting.set_result(answer)
        else:
            waiting.set_exception(
                LineTooSmallError("its answer is larger") if failure == TOO_LARGE else CallFailedError(failure)
            )

    def lost(self, why: str) -> None:
        """Fail what waits."""
        if not self.ended.done():
            self.ended.set_result(why)
        why = self.ended.result()
        for waiting in (self._begun, *self._waiting.values()):
            if not waiting.done():
                waiting.set_exception(LineLostError(f"the line has ended: {why}"))
        # Its waiter may have left by now.
        if not self._begun.cancelled():
            self._begun.exception()

    def _prove(self, frame: bytes) -> None:
        answered, shown = frame[:NUMBER_BYTES], frame[NUMBER_BYTES:]
        if not hmac.compare_digest(shown, proof(self._secret, "agent", self._asked, answered)):
            self.ended.set_result(NOT_A_PEER)
            self.hang_up()
            return
        self._proven = True
        self.most_bytes = MOST_FRAME_BYTES
        self.send(proof(self._secret, "coordinator", self._asked, answered))
        if not self._begun.done():
            self._begun.set_result(None)
