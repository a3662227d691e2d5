"""Objects by key, on a local directory or any store that obstore speaks to.

Keys are relative (`nar/<hash>.nar.zst`), made of plain segments, and checked on every call: a key can never leave the
store. An object appears whole or not at all. What is being written lies below `incoming/` until it is complete, so all
that a crash leaves is below `incoming/` (and, on stores with multipart uploads, unfinished parts, which the bucket's
life-cycle rule removes).

A local directory answers the small operations itself: obstore hands each of them to a thread, which costs several times
the system call (measured: 100 us for a `stat` of 2 us). Objects are not fsynced: losing power can lose them, which
shows as a missing object or a wrong size, both of which the cache answers with 404; a killed process loses nothing.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store, from_url

from infra.objects.errors import (
    CacheError,
    ObjectKeyError,
    ObjectMissingError,
    ObjectStoreError,
    StoreFullError,
    StoreUnreachableError,
)
from infra.objects.object_files import INLINE_BYTES, create, put_file, rename, write_all

if TYPE_CHECKING:
    from obstore import BytesStream
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as Backend

#: Objects that are being written, and what crashes leave.
INCOMING = "incoming"
#: Written by the coordinator, looked for by workers: proof that both see one store.
MARKER_KEY = "drover-store"
MAX_KEY_LENGTH = 512
#: Bytes of one part of a multipart upload, and how many parts are under way at once; together they bound its memory.
PART_BYTES = 8 * 1024 * 1024
PARTS_IN_FLIGHT = 2
#: Bytes that a stream yields at once, about.
READ_BYTES = 1024 * 1024

#: Seconds for a remote store to be connected to, to send its next bytes (a part is on its way meanwhile), and to send
#: a whole object. A silent store is an error within minutes, never a hang.
CONNECT_S = 5
SILENCE_S = 60
WHOLE_S = 24 * 3600
#: A request that fails in a way that may pass (503, a broken connection) is made again so often, within these seconds.
RETRIES = 4
RETRY_WITHIN_S = 60

#: The message where no room is left.
FULL = "no room is left; make some (`drover cache gc` collects what nothing keeps), and it goes on"
_FULL = (errno.ENOSPC, errno.EDQUOT)

CLIENT_OPTIONS: ClientConfig = {
    # An endpoint with http:// in the configuration is meant so.
    "allow_http": True,
    "connect_timeout": timedelta(seconds=CONNECT_S),
    "read_timeout": timedelta(seconds=SILENCE_S),
    "timeout": timedelta(seconds=WHOLE_S),
}
RETRY_CONFIG: RetryConfig = {
    "max_retries": RETRIES,
    "retry_timeout": timedelta(seconds=RETRY_WITHIN_S),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*(?:/[A-Za-z0-9_][A-Za-z0-9._+=-]*)*")
_SCHEMES = frozenset({"file", "s3", "s3a", "gs", "az", "azure", "abfs", "abfss"})


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One entry of a listing; `modified_at` is Unix seconds."""

    key: str
    size_bytes: int
    modified_at: float


class BlockingSource(Protocol):
    """An object's bytes for a thread that may block; `read` returns b"" at the end and may return fewer."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most `size`."""

    def close(self) -> None:
        """Let go of the object."""


def check_key(key: str) -> str:
    """Return `key`.

    Raises:
        ObjectKeyError: it is empty, longer than MAX_KEY_LENGTH, or has a segment that starts with a dot or holds
            anything but letters, digits and `._+=-`.
    """
    if len(key) > MAX_KEY_LENGTH or not _KEY.fullmatch(key):
        raise ObjectKeyError(f"{key[:80]!r} is not an object key")
    return key


def incoming_key() -> str:
    """Return a fresh key for an object that is not complete yet."""
    return f"{INCOMING}/{secrets.token_hex(16)}"


def says_full(error: Exception) -> bool:
    """Return whether an error of the system, or of obstore, means that no room is left."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    # obstore passes on the system's number as text, in an OSError too.
    return any(f"(os error {number})" in str(error) for number in _FULL)


class ObjectStore:
    """A store behind obstore. `url` names it in messages, without user, password or query."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        self._full_url = url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def below(self, prefix: str) -> ObjectStore:
        """Return the part of this store whose keys begin with the segments `prefix`; does no I/O.

        Raises:
            ObjectKeyError: `prefix` is not made of plain segments.
        """
        parts = urlsplit(self._full_url)
        path = f"{parts.path.rstrip('/')}/{check_key(prefix)}"
        return ObjectStore(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")))

    @cached_property
    def _backend(self) -> Backend:
        with self._errors("open", ""):
            if urlsplit(self._full_url).scheme == "memory":
                return from_url(self._full_url)
            return from_url(self._full_url, client_options=CLIENT_OPTIONS, retry_config=RETRY_CONFIG)

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{self.url} has no object {key}") from error
        except (BaseError, OSError, ValueError) as error:
            if says_full(error):
                raise StoreFullError(f"cannot {verb} {key} in {self.url}: {FULL}") from error
            reason = str(error).strip().split("\n", 1)[0]
            raise ObjectStoreError(f"cannot {verb} {key or 'the store'} in {self.url}: {reason}") from error

    async def put_bytes(self, key: str, data: bytes) -> None:
        """Write a small object (held in memory), replacing what was there."""
        with self._errors("write", check_key(key)):
            await obstore.put_async(self._backend, key, data, use_multipart=False)

    async def put_stream(self, key: str, chunks: AsyncIterable[bytes]) -> int:
        """Write an object of any size; returns its size. Nothing appears if `chunks` raises or this is cancelled."""
        with self._errors("write", check_key(key)):
            writer = obstore.open_writer_async(
                self._backend, key, buffer_size=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT
            )
        size = 0
        try:
            async for chunk in chunks:
                with self._errors("write", key):
                    await writer.write(chunk)
                size += len(chunk)
            with self._errors("write", key):
                await writer.close()
        finally:
            # Dropping an unfinished upload aborts it; a traceback must not keep it alive.
            del writer
        return size

    async def rename(self, source: str, target: str) -> None:
        """Move an object, replacing what was at `target`."""
        with self._errors("rename", check_key(source)):
            await obstore.rename_async(self._backend, source, check_key(target))

    async def head(self, key: str) -> int | None:
        """Return an object's size, None if there is none."""
        try:
            with self._errors("look at", check_key(key)):
                return (await obstore.head_async(self._backend, key))["size"]
        except ObjectMissingError:
            return None

    async def get_bytes(self, key: str) -> bytes:
        """Return a small object.

        Raises:
            ObjectMissingError: there is none.
        """
        with self._errors("read", check_key(key)):
            result = await obstore.get_async(self._backend, key)
            return bytes(await result.bytes_async())

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` up to, not including, `end` (None: to the end), READ_BYTES at a time.

        Raises:
            ObjectMissingError: there is none; before anything is yielded.
        """
        with self._errors("read", check_key(key)):
            if end is not None:
                result = await obstore.get_async(self._backend, key, options={"range": (start, end)})
            elif start:
                result = await obstore.get_async(self._backend, key, options={"range": {"offset": start}})
            else:
                result = await obstore.get_async(self._backend, key)
            chunks = result.stream(min_chunk_size=READ_BYTES).__aiter__()
        while True:
            with self._errors("read", key):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield bytes(chunk)

    async def presigned_get(self, key: str, ttl_s: float) -> str:
        """Return an address from which a client can GET the object for `ttl_s` seconds, "" if the store has none such.

        Says nothing about whether the object is there.
        """
        check_key(key)
        if not isinstance(self._backend, (S3Store, GCSStore, AzureStore)):
            return ""
        with self._errors("sign an address for", key):
            return await obstore.sign_async(self._backend, "GET", key, timedelta(seconds=ttl_s))

    def open_blocking(self, key: str) -> BlockingSource:
        """Open an object for a thread that may block.

        Raises:
            ObjectMissingError: there is none.
        """
        with self._errors("read", check_key(key)):
            return _RemoteSource(obstore.get(self._backend, key).stream(min_chunk_size=READ_BYTES))

    async def delete(self, key: str) -> None:
        """Remove an object; there being none is no error."""
        with suppress(ObjectMissingError), self._errors("delete", check_key(key)):
            await obstore.delete_async(self._backend, key)

    async def list(self, prefix: str) -> AsyncGenerator[ObjectInfo, None]:
        """Yield the objects whose key starts with the segments `prefix`."""
        with self._errors("list", check_key(prefix)):
            async for batch in obstore.list(self._backend, prefix):
                for meta in batch:
                    yield ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def local_path(self, key: str) -> Path | None:
        """Return where the object lies as a file of this machine, None for a store that is no directory."""
        check_key(key)
        return None

    async def write_marker(self) -> str:
        """Mark this store as the farm's, once; returns the mark. The coordinator calls it when it starts.

        Raises:
            ObjectStoreError: the store cannot be written.
        """
        with suppress(ObjectMissingError):
            return (await self.get_bytes(MARKER_KEY)).decode("ascii", "replace").strip()
        mark = secrets.token_hex(16)
        await self.put_bytes(MARKER_KEY, f"{mark}\n".encode())
        return mark

    async def check_marker(self) -> str:
        """Return the mark of the farm's store. A worker calls it before it takes work.

        Raises:
            StoreUnreachableError: this machine sees no such store, for example because a `file://` store lies on the
                coordinator's disk.
        """
        try:
            return (await self.get_bytes(MARKER_KEY)).decode("ascii", "replace").strip()
        except ObjectStoreError as error:
            raise StoreUnreachableError(
                f"this machine cannot see the farm's object store {self.url} ({error}); "
                "use a store that every worker reaches (s3://…, gs://…, az://…) or mount the same directory here"
            ) from error


class LocalObjectStore(ObjectStore):
    """A directory. Small operations are plain system calls; it is made when first written to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root.as_uri())
        self._root = root

    def below(self, prefix: str) -> ObjectStore:
        """Return the directory's part whose keys begin with the segments `prefix`."""
        return LocalObjectStore(self._root / check_key(prefix))

    @cached_property
    def _backend(self) -> Backend:
        with self._errors("open", ""):
            return LocalStore(prefix=self._root, mkdir=True)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def local_path(self, key: str) -> Path | None:
        """Return where the object lies, or would lie."""
        return self._path(key)

    async def put_bytes(self, key: str, data: bytes) -> None:
        """Write a small object, replacing what was there."""
        if len(data) <= INLINE_BYTES:
            self.put_now(key, data)
        else:
            await asyncio.to_thread(self.put_now, key, data)

    def put_now(self, key: str, data: bytes) -> None:
        """Do the work of `put_bytes`, for loops over many keys in a thread."""
        with self._errors("write", key):
            put_file(f"{self._root}/{incoming_key()}", f"{self._root}/{check_key(key)}", data)

    def put_pieces_now(self, pieces: Iterable[bytes], key: Callable[[], str]) -> None:
        """Write an object of any size in a thread; `key` names it at its end. Where either raises, nothing is left."""
        staged = f"{self._root}/{incoming_key()}"
        try:
            with self._errors("write", "an object"):
                descriptor = create(staged)
            try:
                for piece in pieces:
                    with self._errors("write", "an object"):
                        write_all(descriptor, piece)
            finally:
                os.close(descriptor)
            final = f"{self._root}/{check_key(key())}"
            with self._errors("rename", "an object"):
                rename(staged, final)
        except BaseException:
            with suppress(OSError):
                os.unlink(staged)  # noqa: PTH108 - no path object, as in `put_file`
            raise

    async def rename(self, source: str, target: str) -> None:
        """Move an object, replacing what was at `target`."""
        with self._errors("rename", check_key(source)):
            rename(self._path(source), self._path(target))

    async def head(self, key: str) -> int | None:
        """Return an object's size, None if there is none."""
        return self.head_now(key)

    def head_now(self, key: str) -> int | None:
        """Do the work of `head`, for loops over many keys in a thread."""
        try:
            return os.stat(f"{self._root}/{check_key(key)}").st_size  # noqa: PTH116 - called for every narinfo
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ObjectStoreError(f"cannot look at {key} in {self.url}: {error.strerror}") from error

    async def get_bytes(self, key: str) -> bytes:
        """Return a small object."""
        with self._errors("read", key):
            return self._path(key).read_bytes()

    def read_now(self, key: str) -> bytes | None:
        """Return a small object, None if there is none; for callers that cannot wait and have its size."""
        try:
            with open(f"{self._root}/{check_key(key)}", "rb", buffering=0) as file:  # noqa: PTH123 - as in `head_now`
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ObjectStoreError(f"cannot read {key} in {self.url}: {error.strerror}") from error

    def open_blocking(self, key: str) -> BlockingSource:
        """Open an object for a thread that may block."""
        with self._errors("read", key):
            return self._path(key).open("rb", buffering=0)


class _RemoteSource:
    """`read` over the chunks that a remote store yields."""

    def __init__(self, chunks: BytesStream) -> None:
        self._chunks: BytesStream | None = chunks
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        if not self._rest and self._chunks is not None:
            try:
                self._rest = memoryview(next(self._chunks, b""))
            except (BaseError, OSError) as error:
                raise ObjectStoreError(f"the object store broke off: {str(error).split(chr(10), 1)[0]}") from error
        data = bytes(self._rest[:size])
        self._rest = self._rest[size:]
        return data

    def close(self) -> None:
        self._rest = memoryview(b"")
        self._chunks = None


def open_object_store(url: str) -> ObjectStore:
    """Return the store that `url` names: `file:///directory`, `s3://bucket/prefix`, `gs://…` or `az://…`.

    Does no I/O. Credentials and endpoints of remote stores come from the environment, as obstore documents.

    Raises:
        CacheError: the scheme is unknown, or a `file` URL does not name an absolute path of this machine.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise CacheError(
            f"{parts.scheme or url[:20]!r} is not an object store; use file:///directory, s3://, gs:// or az://"
        )
    if parts.scheme != "file":
        return ObjectStore(url)
    path = Path(unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_absolute():
        raise CacheError("a file object store is written file:///directory, with three slashes")
    return LocalObjectStore(path)


async def sweep_incoming(store: ObjectStore, *, before: float, dry_run: bool = False) -> int:
    """Delete what crashes left below `incoming/`, older than `before` (Unix seconds); returns how many objects.

    With `dry_run` they are only counted.
    """
    # A local multipart upload is staged as `<key>#<n>`, which obstore's listing hides.
    local = store.local_path(INCOMING)
    if local is not None:
        stale_files = await asyncio.to_thread(_stale_files, local, before)
        if not dry_run:
            await asyncio.to_thread(_unlink_all, stale_files)
        return len(stale_files)
    stale = [entry.key async for entry in store.list(INCOMING) if entry.modified_at < before]
    if not dry_run:
        for key in stale:
            await store.delete(key)
    return len(stale)


def _stale_files(directory: Path, before: float) -> list[Path]:
    stale = []
    with suppress(FileNotFoundError):
        for entry in list(os.scandir(directory)):
            # It may be finished, and renamed, meanwhile.
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < before:
                    stale.append(Path(entry.path))
    return stale


def _unlink_all(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
