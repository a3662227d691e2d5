"""One byte stream to a daemon: the inbox of the codec, filled from asyncio, and the end of the stream.

Bytes are read in large pieces and parsed from memory, so a busy log costs one await per piece and not one per line.
Nothing reads ahead of the parser: what is not yet parsed is bounded by one piece plus the item being assembled, and a
slow consumer stops the pipe, then the daemon, then the builder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar, cast

from infra.daemon.errors import DaemonGone, DaemonProtocolError
from infra.daemon.wire import Inbox, IncompleteError
from infra.process import PIPE_BUFFER_BYTES

if TYPE_CHECKING:
    from infra.daemon.bare_child import BareChild

#: Most bytes taken from the stream at once.
READ_BYTES: Final = 1024 * 1024
#: Log lines in one piece of the stream from which on the builder counts as busy, and seconds for which more lines
#: then gather in the pipe. A reader that is woken by each line would slow down the daemon that writes them.
BUSY_LINES: Final = 16
REST_S: Final = 0.005
#: How long closing a socket may take.
CLOSE_S: Final = 5.0

_T = TypeVar("_T")


class Channel:
    """A connected stream. Everything it raises is DaemonGone (the stream ended) or DaemonProtocolError."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, child: BareChild | None = None
    ) -> None:
        self.inbox = Inbox()
        self.child = child
        #: Bytes that came so far.
        self.received = 0
        self._reader = reader
        self._writer = writer
        #: What bytes come from; over a socket the transport of both directions.
        self._incoming = cast("asyncio.ReadTransport", writer.transport) if child is None else child.incoming

    @classmethod
    async def to_socket(cls, path: str) -> Channel:
        """Connect to the Unix socket of a daemon.

        Raises:
            DaemonGone: No daemon listens there.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=PIPE_BUFFER_BYTES)
        except OSError as error:
            raise DaemonGone(f"no Nix daemon at {path}: {error}") from error
        return cls(reader, writer)

    async def fill(self, missing: int) -> None:
        """Wait until at least so many more bytes are in the inbox."""
        if self.inbox.lines >= BUSY_LINES:
            await self._rest()
        enough = len(self.inbox) + missing
        while len(self.inbox) < enough:
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError as error:
                raise DaemonGone(await self._ending(f"reading failed ({error})")) from error
            if not data:
                raise DaemonGone(await self._ending("the daemon ended the connection"))
            self.received += len(data)
            self.inbox.feed(data)

    async def _rest(self) -> None:
        """Read nothing for a moment, so that what comes meanwhile is read in one piece."""
        self._incoming.pause_reading()
        try:
            await asyncio.sleep(REST_S)
        finally:
            if not self._incoming.is_closing():
                self._incoming.resume_reading()

    async def decode(self, parse: Callable[[Inbox], _T]) -> _T:
        """Run a parser until it has all its bytes."""
        while True:
            try:
                return self.inbox.attempt(parse)
            except IncompleteError as error:
                missing = error.missing
            await self.fill(missing)

    async def words(self, subject: str, limit: int) -> list[str]:
        """Read a list of at most `limit` short texts, without starting over when it comes in many pieces."""
        count = await self.decode(lambda inbox: inbox.read_count(limit, subject))
        words: list[str] = []
        while True:
            try:
                while len(words) < count:
                    words.append(self.inbox.read_word(subject))
            except IncompleteError as error:
                missing = error.missing
            else:
                return words
            await self.fill(missing)

    @property
    def at_end(self) -> bool:
        """True if the peer has hung up and all that it sent was read."""
        return self._reader.at_eof() and not len(self.inbox)

    def expect_silence(self) -> None:
        """Check that no unrequested bytes arrived; the next reply would be misread."""
        if len(self.inbox):
            raise DaemonProtocolError(f"{len(self.inbox)} bytes arrived that belong to no request")

    async def send(self, data: bytes) -> None:
        """Write, waiting while the peer does not take its bytes."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise DaemonGone(await self._ending(f"writing failed ({error})")) from error

    def hang_up(self) -> None:
        """End the stream at once, in both directions, without waiting for anything."""
        if self.child is None:
            self._writer.transport.abort()
        else:
            self.child.hang_up()

    async def close(self) -> None:
        """End the stream and wait for what belongs to it; a child is ended by force if it must be."""
        self.hang_up()
        if self.child is not None:
            await self.child.close()
            return
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._writer.wait_closed()
        except OSError:  # includes TimeoutError; how a connection that is given up ends is of no interest
            return

    async def _ending(self, reason: str) -> str:
        return reason if self.child is None else f"{reason} ({await self.child.last_words()})"
