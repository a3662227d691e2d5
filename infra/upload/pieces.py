"""Bytes of one object on their way, in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

_Piece = TypeVar("_Piece")


async def gathered(pieces: AsyncIterator[bytes], size: int) -> AsyncGenerator[bytes, None]:
    """Join pieces to such of exactly `size` bytes, but for the last; those that have it are passed on as they are."""
    parts: list[bytes | memoryview] = []
    room = size
    async for piece in pieces:
        if not parts and len(piece) == size:
            yield piece
            continue
        rest = memoryview(piece)
        while len(rest) >= room:
            yield b"".join([*parts, rest[:room]])
            parts, rest, room = [], rest[room:], size
        if rest:
            parts.append(rest)
            room -= len(rest)
    if parts:
        yield b"".join(parts)


async def one_ahead(pieces: AsyncIterator[_Piece]) -> AsyncGenerator[_Piece, None]:
    """Yield pieces, the next being gathered while one is used: two are in memory."""
    work = asyncio.ensure_future(_next(pieces))
    try:
        while (piece := await work) is not None:
            work = asyncio.ensure_future(_next(pieces))
            yield piece
    finally:
        work.cancel()
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()


async def _next(pieces: AsyncIterator[_Piece]) -> _Piece | None:
    return await anext(pieces, None)
