"""Bytes of one object on their way, in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator


async def gathered(pieces: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """Join pieces to such of exactly `size` bytes, but for the last."""
    buffer = bytearray()
    async for piece in pieces:
        buffer += piece
        while len(buffer) >= size:
            full = bytes(memoryview(buffer)[:size])
            del buffer[:size]
            yield full
    if buffer:
        yield bytes(buffer)


async def one_ahead(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield pieces, the next being gathered while one is sent: two are in memory."""
    work = asyncio.ensure_future(_next(pieces))
    try:
        while piece := await work:
            work = asyncio.ensure_future(_next(pieces))
            yield piece
    finally:
        work.cancel()
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()


async def _next(pieces: AsyncIterator[bytes]) -> bytes:
    return await anext(pieces, b"")
