"""One connection to a daemon below its requests: handshake, one conversation at a time, messages before a reply, end.

A request that ends in `DaemonOperationError` leaves the connection usable. Anything else that interrupts one leaves the
stream at an unknown place, so it is hung up at once (see `infra.daemon.connection`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from infra.daemon.channel import Channel
from infra.daemon.errors import DaemonError, DaemonGone, DaemonOperationError, DaemonProtocolError
from infra.daemon.framed import send_framed
from infra.daemon.values import plain_text
from infra.daemon.wire import (
    CLIENT_MAGIC,
    CLIENT_VERSION,
    SERVER_MAGIC,
    Encoder,
    Inbox,
    IncompleteError,
    Last,
    Message,
    Refusal,
    agreed_version,
)

if TYPE_CHECKING:
    from infra.daemon.usage import BuildersUse

#: How long a daemon may take to answer the handshake; a new `nix-daemon --stdio` opens its store first.
HANDSHAKE_S: Final = 30.0
#: Most features that a server may announce.
MAX_FEATURES: Final = 1_000


class Conversation:
    """A channel to a daemon after its handshake; `DaemonConnection` adds the requests."""

    def __init__(self, channel: Channel) -> None:
        self.version = (0, 0)
        self.nix_version = ""
        self._trust = 0
        self._channel = channel
        self._turn = asyncio.Lock()
        #: Why no further request is possible; None while the stream stands between two messages.
        self._unusable: str | None = None

    @classmethod
    async def over(cls, channel: Channel) -> Self:
        """Shake hands over a channel, which from then on belongs to the connection, whatever happens."""
        connection = cls(channel)
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await connection._shake_hands()
            if channel.child is not None:
                channel.child.keep_children()
        except TimeoutError as error:
            await connection.close()
            raise DaemonGone(f"the daemon did not answer the handshake within {HANDSHAKE_S:g} s") from error
        except BaseException:
            await connection.close()
            raise
        return connection

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def unusable_reason(self) -> str | None:
        """Reason that every further request would raise DaemonGone, or None while the connection is usable."""
        if self._unusable is None and self._channel.at_end:
            return "the daemon ended the connection"
        return self._unusable

    @property
    def pid(self) -> int | None:
        """Process id of our own daemon, which leads its process group; None over a socket."""
        return None if self._channel.child is None else self._channel.child.pid

    async def end_orphans(self) -> None:
        """Have what an ended build left behind killed, and wait for it; only while no build runs on the connection."""
        if self._channel.child is not None:
            await self._channel.child.end_orphans()

    def memory_of_building(self) -> int:
        """Resident bytes of our own daemon while a builder of it runs; 0 where that cannot be seen."""
        return 0 if self._channel.child is None else self._channel.child.memory_of_building()

    def memory_of_builders(self) -> int | None:
        """Bytes that the builders of our own daemon have for themselves now; None where that cannot be seen."""
        return None if self._channel.child is None else self._channel.child.memory_of_builders()

    def builders_use(self) -> BuildersUse | None:
        """Return what builders of our own daemon used since the last call; None where that cannot be seen."""
        return None if self._channel.child is None else self._channel.child.builders_use()

    def abort(self, reason: str = "aborted") -> None:
        """Hang up now, from any task of the same loop: a running build is killed, its caller gets DaemonGone.

        Does not wait; `close` does, and must still be called.
        """
        if self._unusable is None:
            self._unusable = reason
        self._channel.hang_up()

    async def close(self) -> None:
        """Hang up and wait for the end of our own daemon, by force after a while. Idempotent."""
        self.abort("closed")
        await self._channel.close()

    async def _shake_hands(self) -> None:
        channel = self._channel
        async with self._guarded():
            await channel.send(Encoder().integer(CLIENT_MAGIC).integer(CLIENT_VERSION).getvalue())
            if await channel.decode(Inbox.read_int) != SERVER_MAGIC:
                raise DaemonProtocolError("the peer is not a Nix daemon")
            server = await channel.decode(Inbox.read_int)
            self.version = _, minor = agreed_version(server)
            if minor >= 38:
                await channel.send(Encoder().strings(()).getvalue())
                await channel.words("features", MAX_FEATURES)
            await channel.send(Encoder().integer(0).integer(0).getvalue())
            if minor >= 33:
                self.nix_version = await channel.decode(lambda inbox: inbox.read_word("Nix version"))
            if minor >= 35:
                self._trust = await channel.decode(Inbox.read_int)
            await self._until_last(ignore)

    @asynccontextmanager
    async def _guarded(self) -> AsyncIterator[None]:
        """Hold the connection; whatever ends the block other than the daemon's refusal makes it unusable."""
        async with self._turn:
            if self._unusable is not None:
                raise DaemonGone(f"the connection is unusable: {self._unusable}")
            try:
                self._channel.expect_silence()
                yield
            except DaemonOperationError:
                raise
            except DaemonError as error:
                if self._unusable is not None:  # the stream ended because abort() ended it: say that
                    raise DaemonGone(f"the connection is unusable: {self._unusable}") from error
                self.abort(str(error))
                raise
            except BaseException as error:
                self.abort(f"a request was interrupted by {type(error).__name__}")
                raise

    @asynccontextmanager
    async def _request(
        self, request: Encoder, on_message: Callable[[Message], Awaitable[object] | None] | None = None
    ) -> AsyncIterator[None]:
        """Send a request and wait for its success; the block reads the reply."""
        async with self._guarded():
            async with self._noticing_silence():
                await self._channel.send(request.getvalue())
                await self._until_last(on_message or ignore)
            yield

    @asynccontextmanager
    async def _noticing_silence(self) -> AsyncIterator[None]:
        """Mark a `DaemonGone` as unanswered if nothing came that belongs to the block."""
        # Answers to what was requested together come together.
        before = self._channel.received - len(self._channel.inbox)
        try:
            yield
        except DaemonGone as error:
            error.unanswered = self._channel.received == before
            raise

    async def _until_last(self, on_message: Callable[[Message], Awaitable[object] | None]) -> None:
        """Pass messages on until the daemon reports that the request succeeded."""
        inbox = self._channel.inbox
        while True:
            missing = 0
            try:
                while True:  # all that is here, without an await per message
                    message = inbox.read_lines() or inbox.read_message()
                    if isinstance(message, Last):
                        return
                    if isinstance(message, Refusal):
                        raise DaemonOperationError(message.level, plain_text(message.message))
                    pause = on_message(message)
                    if pause is not None:
                        await pause
            except IncompleteError as error:
                missing = error.missing
            await self._channel.fill(missing)

    async def _upload(self, request: Encoder, chunks: AsyncIterator[bytes]) -> None:
        """Send a request whose last argument is a framed stream, while its messages are read."""
        refused = False
        source_error: Exception | None = None
        async with self._guarded():
            await self._channel.send(request.getvalue())
            sender = asyncio.create_task(send_framed(chunks, self._channel.send, lambda: refused), name="nix upload")
            try:
                try:
                    await self._until_last(ignore)
                except DaemonOperationError as error:
                    refused = True
                    source_error = error
                try:
                    await sender
                except DaemonGone:
                    if not refused:
                        raise
                    self.abort("the daemon refused an upload and hung up")
                except Exception as error:  # noqa: BLE001 - the caller's own error, raised below unchanged
                    source_error = error
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
        if source_error is not None:
            raise source_error


def ignore(_: Message) -> None:
    """Take no notice of a message."""
