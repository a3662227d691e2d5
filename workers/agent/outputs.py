"""Valid outputs become objects in the store: path info from Nix, NAR streamed, hashed, compressed, put or sent.

Where the worker sees the object store it puts them there; else it sends them over HTTP, all outputs of a build in one
upload, with the token that names exactly them.

References are those that Nix found when it registered the output. The NAR is never in memory or on disk as a whole.

The agent offers them again for a while to a store that does not take them: the outputs are valid here, and built anew
elsewhere only if it stays so.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager

from infra.daemon import DaemonConnection, DaemonGone
from infra.nix.narinfo import NarInfo
from infra.nix.path_info import PathInfo
from infra.nix.store_path import base_name_of
from infra.objects.compression import Compression
from infra.objects.errors import CacheError
from infra.objects.nar_writer import CompressedNar, compressing, upload_nar
from infra.objects.store import ObjectStore
from infra.retry import Outage, retrying
from infra.upload.client import UploadClient
from infra.upload.errors import SenderRefusedError
from infra.upload.protocol import PathClaim, SendStatus
from workers.agent.attempt_record import Moving
from workers.agent.daemon_pool import SessionPool
from workers.agent.inputs import FarmSources
from workers.errors import WorkerError
from workers.wire.messages import Output

#: Connections that outputs are read through, so that slots are free for the next build.
READERS = 2
#: Seconds for which outputs are offered again to a store that does not take them; beyond it another machine may do
#: better.
UPLOAD_WITHIN_S = 300.0

_log = logging.getLogger(__name__)


class OutputError(WorkerError):
    """An output is not where the daemon reported it, or could not be put into the object store."""


class NotTakenError(OutputError):
    """The store, or the coordinator before it, does not take an output at the moment."""


async def nar_size(readers: SessionPool, paths: Sequence[str]) -> int:
    """Return the NAR bytes of full paths together, those that are not valid left out. Raises `DaemonError`."""
    async with readers.use() as connection:
        infos = [await connection.query_path_info(path) for path in paths]
    return sum(info.nar_size for info in infos if info is not None)


async def deliver(
    readers: SessionPool,
    sources: Callable[[], FarmSources],
    wanted: Mapping[str, str],
    token: str,
    *,
    within_s: float,
    waits: Callable[[str], None],
    packed: Callable[[float], None] = lambda _: None,
    moving: Moving | None = None,
) -> tuple[Output, ...]:
    """Upload the outputs (name -> full path) of a finished build to where `sources` leads; `token` is for HTTP.

    While they are not taken they are offered again, for `within_s` seconds; `waits` receives the reason. A reader whose
    daemon is gone is replaced once. `packed` gets the seconds that packing each NAR took, `moving` the bytes that were
    read of them.

    Raises `OutputError`, `infra.daemon.DaemonError` or `DaemonUnreachableError`.
    """
    done: dict[str, Output] = {}
    counts = moving or Moving()

    async def offer() -> tuple[Output, ...]:
        farm = sources()
        counts.source = farm.kind
        counts.size_bytes = counts.done_bytes
        if farm.store is None:
            return await _send(readers, farm.uploads(token), wanted, packed, counts)
        for name, path in wanted.items():
            if name not in done:
                done[name], packing_s = await _upload(readers, farm.store, name, path, farm.farm.compression, counts)
                packed(packing_s)
        return tuple(done.values())

    async def offer_twice() -> tuple[Output, ...]:
        try:
            return await offer()
        except DaemonGone:
            return await offer()

    outage = Outage(_log, "it is offered again", over="a build's outputs were taken")

    def trouble_of(error: Exception) -> str:
        if not isinstance(error, NotTakenError):
            return ""
        if str(error) != outage.trouble:
            waits(str(error))
        return str(error)

    return await retrying(offer_twice, within_s, outage, trouble_of)


async def _send(
    readers: SessionPool,
    client: UploadClient,
    wanted: Mapping[str, str],
    packed: Callable[[float], None],
    moving: Moving,
) -> tuple[Output, ...]:
    infos: dict[str, PathInfo] = {}
    async with readers.use() as connection:
        for path in wanted.values():
            infos[base_name_of(path)] = await _path_info(connection, path)
    moving.done_bytes, moving.size_bytes = 0, sum(info.nar_size for info in infos.values())

    @asynccontextmanager
    async def open_nar(claim: PathClaim, compression: Compression) -> AsyncIterator[CompressedNar]:
        info = infos[claim.path]
        async with (
            readers.use() as reader,
            aclosing(reader.nar_from_path(info.store_path, info.nar_size)) as nar_bytes,
            aclosing(moving.counted(nar_bytes, info.store_path)) as chunks,
            compressing(chunks, compression) as nar,
        ):
            yield nar
            packed(nar.pieces.waited_s)

    claims = [PathClaim.of(info) for info in infos.values()]
    try:
        result = await client.upload_all(claims, open_nar, parallel=READERS)
    except SenderRefusedError as error:
        raise (NotTakenError if error.status >= 500 else OutputError)(str(error)) from error
    except CacheError as error:
        raise NotTakenError(str(error)) from error
    for verdict in result.verdicts:
        if verdict.status is not SendStatus.STORED:
            kind = NotTakenError if verdict.status is SendStatus.FAILED else OutputError
            raise kind(f"{verdict.path} was not taken: {verdict.message or verdict.status}")
    urls = {verdict.path: verdict.url for verdict in result.verdicts}
    sent = {each.path: each for each in result.sent}
    return tuple(
        Output.of(name, NarInfo(infos[base], sent[base].stored(urls[base], result.compression)))
        for name, base in ((name, base_name_of(path)) for name, path in wanted.items())
    )


async def _path_info(connection: DaemonConnection, path: str) -> PathInfo:
    info = await connection.query_path_info(path)
    if info is None:
        raise OutputError(f"{path} is not in the store although its build succeeded")
    return info


async def _upload(  # noqa: PLR0917 - the fields of what it sends
    readers: SessionPool, store: ObjectStore, name: str, path: str, compression: Compression, moving: Moving
) -> tuple[Output, float]:
    """Return the output and the seconds of packing."""
    async with readers.use() as connection:
        info = await _path_info(connection, path)
        moving.size_bytes += info.nar_size
        try:
            async with (
                aclosing(connection.nar_from_path(path, info.nar_size)) as nar,
                aclosing(moving.counted(nar, path)) as chunks,
            ):
                uploaded = await upload_nar(store, chunks, compression)
        except CacheError as error:
            raise NotTakenError(f"{path}: {error}") from error
    if (uploaded.nar_hash, uploaded.nar_size) != (info.nar_hash, info.nar_size):
        raise OutputError(f"{path} changed since it was built: its NAR has another hash than the store recorded")
    return Output.of(name, NarInfo(info, uploaded.stored)), uploaded.packing_s
