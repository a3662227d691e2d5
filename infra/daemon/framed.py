"""Uploads: NARs cut into frames (length, bytes, no padding; a frame of length 0 ends the stream).

Small pieces are put together, so that a thousand small paths are a few frames and a few system calls. A frame is only
ever written whole, so the stream can be ended properly at any moment: that is what keeps a connection usable when the
caller's source fails half-way, or when the daemon refuses the upload while it still arrives.
"""

import struct
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Final

from infra.daemon.errors import DaemonGone, DaemonSourceError
from infra.daemon.values import encode_path_info
from infra.daemon.wire import Encoder
from infra.nix.path_info import PathInfo
from infra.records import record

#: Largest frame that is written.
FRAME_BYTES: Final = 256 * 1024
_LENGTH = struct.Struct("<Q")


@record(frozen=True, slots=True)
class Upload:
    """A path to be added: its metadata and its NAR, which must be `info.nar_size` bytes long."""

    info: PathInfo
    nar: AsyncIterable[bytes]


async def checked_nar(upload: Upload) -> AsyncIterator[bytes]:
    """Yield the NAR of an upload.

    Raises:
        DaemonSourceError: It is longer or shorter than declared; never more bytes than declared are yielded.
    """
    left = upload.info.nar_size
    async for chunk in upload.nar:
        left -= len(chunk)
        if left < 0:
            raise DaemonSourceError(f"{upload.info.store_path}: the NAR has more than {upload.info.nar_size} bytes")
        yield chunk
    if left:
        raise DaemonSourceError(f"{upload.info.store_path}: the NAR ends {left} bytes early")


async def many_paths(uploads: Iterable[Upload]) -> AsyncIterator[bytes]:
    """Yield the contents of an AddMultipleToStore stream: count, then metadata and raw NAR of each path."""
    items = tuple(uploads)
    yield Encoder().integer(len(items)).getvalue()
    for item in items:
        head = Encoder()
        encode_path_info(item.info, head)
        yield head.getvalue()
        async for chunk in checked_nar(item):
            yield chunk


async def send_framed(
    chunks: AsyncIterable[bytes], send: Callable[[bytes], Awaitable[None]], is_refused: Callable[[], bool]
) -> None:
    """Write chunks as frames until they end or `is_refused` returns true; always end the stream.

    Raises:
        Exception: Whatever the chunks raise, after the stream was ended properly.
    """
    pending = bytearray()
    try:
        async for chunk in chunks:
            pending += chunk
            while len(pending) >= FRAME_BYTES:
                await send(_LENGTH.pack(FRAME_BYTES) + pending[:FRAME_BYTES])
                del pending[:FRAME_BYTES]
            if is_refused():
                pending.clear()
                break
        if pending:
            await send(_LENGTH.pack(len(pending)) + pending)
    except DaemonGone:
        raise
    except Exception:
        await send(_LENGTH.pack(0))
        raise
    await send(_LENGTH.pack(0))
