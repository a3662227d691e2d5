"""Frames between the coordinator and a program in a sandbox, over the program's standard streams.

A frame is a kind (one byte), a length (four bytes) and that many bytes. What comes out of a sandbox is a stranger's:
every length is bounded before it is read.
"""

from __future__ import annotations

import asyncio
from enum import IntEnum
from typing import ClassVar, Final

from coordinator.errors import CoordinatorError

#: Longest frame: names of 10,000 store paths, or a piece of a stream.
MAX_FRAME_BYTES: Final = 2 * 1024 * 1024
_HEAD: Final = 5


class FrameKind(IntEnum):
    """Kinds of frames."""

    #: To the program: what it is to do, its tree in pieces, the end of that, the answer to a query.
    JOB = 1
    TREE = 2
    TREE_END = 3
    MISSING = 4
    #: From the program: text for people, attributes that failed, a sentence on those left out.
    MESSAGES = 10
    FAILED = 11
    LEFT_OUT = 12
    #: An intake query, streams in pieces and their ends, roots to submit.
    QUERY = 13
    DERIVATIONS = 14
    DERIVATIONS_END = 15
    SOURCES = 16
    SOURCES_END = 17
    ROOTS = 18
    #: All is sent; or the sentence that says why not.
    DONE = 19
    ERROR = 20


class BadFrameError(CoordinatorError):
    """Bytes out of a sandbox are no frame, or not the one that is due."""

    code: ClassVar[str] = "evaluation"


def frame(kind: FrameKind, data: bytes = b"") -> bytes:
    """Return a frame."""
    return bytes([kind]) + len(data).to_bytes(4, "little") + data


async def read_frame(reader: asyncio.StreamReader) -> tuple[FrameKind, bytes] | None:
    """Return the next frame; None at the end. Raises `BadFrameError`."""
    try:
        head = await reader.readexactly(_HEAD)
        size = int.from_bytes(head[1:], "little")
        if size > MAX_FRAME_BYTES:
            raise BadFrameError(f"the evaluator sent a frame of {size} bytes, which is none of its own")
        return FrameKind(head[0]), await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise BadFrameError("the evaluator ended in the middle of what it said") from None
        return None
    except ValueError:
        raise BadFrameError("the evaluator sent what is no frame of its own") from None
