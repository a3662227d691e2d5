"""Lines of a child that may be longer than what asyncio's own reader of lines takes."""

from __future__ import annotations

import asyncio
from typing import Final

READ_BYTES: Final = 64 * 1024


class LongLines:
    """Reader of lines of at most `most` bytes; of a longer one the rest is dropped as it arrives."""

    def __init__(self, stream: asyncio.StreamReader, most: int) -> None:
        self._stream = stream
        self._most = most
        self._buffer = bytearray()

    async def next(self) -> bytes | None:
        """Return the next line without its end; None at the end of the stream, and for a last line without end."""
        searched = 0
        while (at := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            data = await self._stream.read(READ_BYTES)
            if not data:
                return None
            if searched < self._most:
                self._buffer += data
            elif b"\n" in data:
                self._buffer += data[data.index(b"\n") :]
        line = bytes(self._buffer[:at])
        del self._buffer[: at + 1]
        return line
