"""NARs: downloaded once however many want one, verified, and kept on disk.

A NAR up to WHOLE_BYTES is served once it is verified; a larger one while it comes, but for its last HELD_BYTES, which
follow only if file size, file hash, NAR size and NAR hash are as the narinfo says. One that is not is cut there, never
kept, and its upstream is passed over for that path: Nix, which would refuse it too, asks its next cache or builds.

Small ones (SMALL_BYTES) never touch the disk before they are verified, and those that came last are served from memory.

A file of an earlier run is verified before its first use: a machine that lost its power may have lost a part of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Final

from coordinator.cache_proxy.disk import ProxyFiles
from coordinator.cache_proxy.lookups import NarinfoLookups
from coordinator.cache_proxy.model import KnownPath
from coordinator.cache_proxy.upstream import NarCutError, NarGoneError, ProxyUpstream
from infra.objects.errors import CorruptNarError, ObjectStoreError
from infra.objects.verification import verify_nar
from infra.retry import Backoff

#: NARs up to this size are served only when all of them was verified.
WHOLE_BYTES: Final = 8 * 1024 * 1024
#: Last bytes of a larger one, which wait for its verification.
HELD_BYTES: Final = 64 * 1024
CHUNK_BYTES: Final = 256 * 1024
#: NARs up to this size, packed and unpacked, are held in memory while they come and verified in the event loop, in
#: well under a millisecond; so many bytes of them stay there.
SMALL_BYTES: Final = 64 * 1024
REMEMBERED_BYTES: Final = 64 * 1024 * 1024
#: Downloads at one time, those ahead of Nix among them.
DOWNLOADS: Final = 56
#: Tries of one download without progress, and its seconds: a minute, and what a modem needs.
TRIES: Final = 3
LEAST_S: Final = 60.0
LEAST_BYTES_PER_S: Final = 4 * 1024
#: Share of the bound of the disk above which a NAR passes through without being kept.
KEPT_SHARE: Final = 0.5
#: How much longer than the NAR a compressed file may be whose size is not stated.
SLACK: Final = 1.02
SLACK_BYTES: Final = 64 * 1024

_log = logging.getLogger(__name__)


class NarDownload:
    """One NAR on its way. `done` is True once it is whole and verified, False where it never will be."""

    def __init__(self, known: KnownPath, partial: Path) -> None:
        self.known = known
        self.partial = partial
        self.received = 0
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._moved = asyncio.Event()

    @property
    def size(self) -> int:
        """Bytes of the file; 0 if the narinfo does not say."""
        return self.known.info.stored.file_size

    @property
    def is_small(self) -> bool:
        """True where it is held in memory while it comes."""
        return 0 < self.size <= SMALL_BYTES >= self.known.info.path.nar_size

    @property
    def at_most(self) -> int:
        """Most bytes that it may have."""
        return self.size or int(self.known.info.path.nar_size * SLACK) + SLACK_BYTES

    def move(self, received: int) -> None:
        """Note how much there is."""
        self.received = received
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def require_whole(self) -> None:
        """Raise `NarCutError` where less has come than the narinfo says."""
        if self.received < self.size:
            raise NarCutError(f"{self.known.upstream} ended the NAR of {self.known.info.store_path} early")

    def finish(self, *, good: bool) -> None:
        """Note the end."""
        if not self.done.done():
            self.done.set_result(good)
        self.move(self.received)

    async def beyond(self, offset: int) -> int:
        """Wait until more than `offset` bytes may be served; returns how many may. Equal: it has ended."""
        while True:
            ready = self.received if self.done.done() and self.done.result() else self.received - HELD_BYTES
            if ready > offset or self.done.done():
                return max(ready, offset)
            await self._moved.wait()


class ProxyNars:
    """The NARs."""

    def __init__(self, lookups: NarinfoLookups, files: ProxyFiles) -> None:
        self._lookups = lookups
        self._files = files
        #: Small ones, those used longest ago first.
        self._small: OrderedDict[str, bytes] = OrderedDict()
        self._small_bytes = 0
        self._downloads: dict[str, NarDownload] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(DOWNLOADS)
        self._is_closed = False

    async def close(self) -> None:
        """Stop all downloads; none begins from now on."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def is_here(self, known: KnownPath) -> bool:
        """Return whether a NAR is here or on its way."""
        name = known.nar_name
        return name in self._downloads or name in self._small or f"nar/{name}" in self._files

    def in_memory(self, known: KnownPath) -> bytes | None:
        """Return a small NAR that came lately, verified."""
        content = self._small.get(known.nar_name)
        if content is not None:
            self._small.move_to_end(known.nar_name)
        return content

    async def on_disk(self, known: KnownPath) -> Path | None:
        """Return where a verified NAR is, None where it is not."""
        name = f"nar/{known.nar_name}"
        path = self._files.use(name)
        if path is None or self._files.is_sound(name):
            return path
        if await _is_right(path, known):
            self._files.note_sound(name)
            return path
        _log.warning("the NAR of %s is damaged on disk and fetched again", known.info.store_path)
        self._files.drop(name)
        return None

    def download(self, known: KnownPath) -> NarDownload:
        """Return the download of a NAR, begun now unless it is under way."""
        running = self._downloads.get(known.nar_name)
        if running is None:
            running = NarDownload(known, self._files.partial())
            if self._is_closed:
                running.finish(good=False)
                return running
            self._downloads[known.nar_name] = running
            task = asyncio.create_task(self._run(running), name="download")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return running

    async def whole(self, known: KnownPath) -> Path | None:
        """Return where the verified NAR is, downloaded if need be; None where it cannot be had."""
        path = await self.on_disk(known)
        if path is None and await asyncio.shield(self.download(known).done):
            path = await self.on_disk(known)
        return path

    async def chunks(self, download: NarDownload) -> AsyncGenerator[bytes, None]:
        """Yield a large NAR while it comes.

        Raises:
            NarCutError: it is not what it should be.
            OSError: it has ended already.
        """
        sent = 0
        await download.beyond(0)
        # A file that was renamed, or is no longer wanted, stays readable to one who has it open.
        with download.partial.open("rb") as file:
            while (ready := await download.beyond(sent)) > sent:
                while sent < ready:
                    data = await asyncio.to_thread(file.read, min(CHUNK_BYTES, ready - sent))
                    if not data:
                        raise NarCutError(f"the NAR of {download.known.info.store_path} began anew")
                    sent += len(data)
                    yield data
        if not download.done.result():
            raise NarCutError(f"the NAR of {download.known.info.store_path} cannot be had whole")

    async def _run(self, download: NarDownload) -> None:
        known, good = download.known, False
        try:
            async with self._turns:
                # An upstream may state any size.
                self._files.require_room(download.at_most)
                upstream = self._lookups.upstreams[known.upstream]
                async with asyncio.timeout(LEAST_S + download.at_most / LEAST_BYTES_PER_S):
                    good = await (self._take_small if download.is_small else self._take_large)(upstream, download)
            if not good:
                _log.warning("%s has a NAR of %s that is not the one it signed", known.upstream, known.info.store_path)
                self._lookups.avoid(known)
        except (NarGoneError, NarCutError) as error:
            _log.warning("%s", error)
            self._lookups.avoid(known)
        except TimeoutError:
            _log.warning("%s sends the NAR of %s too slowly", known.upstream, known.info.store_path)
            self._lookups.avoid(known)
        except OSError as error:
            good = False
            _log.warning("the NAR of %s cannot be written: %s", known.info.store_path, error.strerror)
        finally:
            download.finish(good=good)
            self._downloads.pop(known.nar_name, None)
            if not download.is_small:
                with suppress(OSError):
                    download.partial.unlink(missing_ok=True)

    async def _take_small(self, upstream: ProxyUpstream, download: NarDownload) -> bool:
        content = BytesIO()
        await self._receive(upstream, download, content)
        known, data = download.known, content.getvalue()
        if not _holds(content, known):
            return False
        self._files.write(f"nar/{known.nar_name}", data)
        self._files.note_sound(f"nar/{known.nar_name}")
        self._small_bytes += len(data) - len(self._small.pop(known.nar_name, b""))
        self._small[known.nar_name] = data
        while self._small_bytes > REMEMBERED_BYTES:
            self._small_bytes -= len(self._small.popitem(last=False)[1])
        return True

    async def _take_large(self, upstream: ProxyUpstream, download: NarDownload) -> bool:
        known = download.known
        with download.partial.open("wb") as file:
            await self._receive(upstream, download, file)
        if not await _is_right(download.partial, known):
            return False
        if download.received <= self._files.max_bytes * KEPT_SHARE:
            self._files.adopt(f"nar/{known.nar_name}", download.partial, download.received)
            self._files.note_sound(f"nar/{known.nar_name}")
        return True

    async def _receive(self, upstream: ProxyUpstream, download: NarDownload, file: IO[bytes]) -> None:
        """Write the file, going on where it broke off. Raises `NarGoneError` or `NarCutError`."""
        backoff = Backoff()
        left = TRIES
        while True:
            before = download.received
            try:
                async with upstream.nar(download.known, download.received) as (content, offset):
                    if offset != download.received:
                        file.seek(0)
                        file.truncate()
                        download.move(0)
                    async for chunk in content.iter_any():
                        if download.received + len(chunk) > download.at_most:
                            raise NarGoneError(f"the NAR of {download.known.info.store_path} is longer than stated")
                        file.write(chunk)
                        file.flush()
                        download.move(download.received + len(chunk))
                download.require_whole()
            except NarCutError:
                left = TRIES if download.received > before else left - 1
                if not left or upstream.is_away:
                    raise
                await backoff.pause()
            else:
                return


async def _is_right(path: Path, known: KnownPath) -> bool:
    """Return whether a file is what its narinfo says."""

    def look() -> bool:
        try:
            return _holds(path.open("rb"), known)
        except OSError:
            return False

    small = (known.info.stored.file_size or SMALL_BYTES) <= SMALL_BYTES >= known.info.path.nar_size
    return look() if small else await asyncio.to_thread(look)


def _holds(file: IO[bytes], known: KnownPath) -> bool:
    """Return whether a file, which is closed then, holds the NAR that its narinfo promises."""
    file.seek(0)
    try:
        verify_nar(file, known.info)
    except (CorruptNarError, ObjectStoreError):
        return False
    return True
