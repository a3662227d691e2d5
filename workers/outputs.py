"""Valid outputs become objects in the store: path info from Nix, NAR streamed, hashed, compressed, put.

References are those that Nix found when it registered the output. The NAR is never in memory or on disk as a whole.
"""

from __future__ import annotations

from contextlib import aclosing

from infra.cache.errors import CacheError
from infra.cache.objects import ObjectStore
from infra.cache.upload import upload_nar
from infra.daemon import DaemonGone
from workers.daemons import Pool
from workers.errors import WorkerError
from workers.protocol import Output

#: Connections that outputs are read through, so that slots are free for the next build.
READERS = 2


class OutputError(WorkerError):
    """An output is not where the daemon said, or could not be put into the object store."""


async def upload_output(readers: Pool, store: ObjectStore, name: str, path: str) -> Output:
    """Upload one output of a finished build; a reader whose daemon is gone is replaced once.

    Raises `OutputError`, `infra.daemon.DaemonError` or `DaemonUnreachableError`.
    """
    try:
        return await _upload(readers, store, name, path)
    except DaemonGone:
        return await _upload(readers, store, name, path)


async def _upload(readers: Pool, store: ObjectStore, name: str, path: str) -> Output:
    async with readers.use() as connection:
        info = await connection.query_path_info(path)
        if info is None:
            raise OutputError(f"{path} is not in the store although its build succeeded")
        try:
            async with aclosing(connection.nar_from_path(path, info.nar_size)) as chunks:
                uploaded = await upload_nar(store, chunks)
        except CacheError as error:
            raise OutputError(f"{path}: {error}") from error
    if (uploaded.nar_hash, uploaded.nar_size) != (info.nar_hash, info.nar_size):
        raise OutputError(f"{path} changed since it was built: its NAR has another hash than the store recorded")
    return Output(
        name=name,
        path=path,
        nar_hash=info.nar_hash,
        nar_size=info.nar_size,
        references=tuple(sorted(reference.rpartition("/")[2] for reference in info.references)),
        ca=info.ca,
        url=uploaded.url,
        compression=uploaded.compression,
        file_hash=uploaded.file_hash,
        file_size=uploaded.file_size,
    )
