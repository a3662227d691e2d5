"""Valid outputs become objects in the store: their NARs are read, hashed, compressed, and put or sent.

Where the worker sees the object store it puts them there; else it sends them over HTTP, all outputs of a build in one
upload, with the token that names exactly them.

References are those that Nix found when it registered the output. The NAR is never in memory or on disk as a whole.

The agent offers them again for a while to a store that does not take them: the outputs are valid here, and built anew
elsewhere only if it stays so.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from infra.daemon import DaemonGone
from infra.nix.narinfo import NarInfo
from infra.nix.path_info import PathInfo
from infra.objects.compression import Compression
from infra.objects.errors import CacheError
from infra.objects.nar_encoder import CompressedNar
from infra.objects.store import ObjectStore
from infra.retry import Outage, retrying
from infra.upload.client import UploadClient
from infra.upload.errors import SenderRefusedError
from infra.upload.packs import SourceChangedError
from infra.upload.protocol import PathClaim, SendStatus
from workers.agent.attempt_record import Moving
from workers.agent.farm_sources import FarmSources
from workers.agent.output_reader import READERS, FilesUnreadableError, OutputError, OutputReader
from workers.wire.messages import Output

#: Seconds for which outputs are offered again to a store that does not take them; beyond it another machine may do
#: better.
UPLOAD_WITHIN_S = 300.0

_log = logging.getLogger(__name__)


class NotTakenError(OutputError):
    """The store, or the coordinator before it, does not take an output at the moment."""


async def deliver(
    reader: OutputReader,
    sources: Callable[[], FarmSources],
    wanted: Mapping[str, PathInfo],
    token: str,
    *,
    within_s: float,
    waits: Callable[[str], None],
    packed: Callable[[float], None] = lambda _: None,
    moving: Moving | None = None,
) -> tuple[Output, ...]:
    """Upload the outputs (name -> record) of a finished build to where `sources` leads; `token` is for HTTP.

    While they are not taken they are offered again, for `within_s` seconds; `waits` receives the reason. A reader whose
    daemon is gone is replaced once, and files that cannot be read are asked of the daemon. `packed` gets the seconds
    that packing each NAR took, `moving` the bytes that were read of them.

    Raises `OutputError`, `infra.daemon.DaemonError` or `DaemonUnreachableError`.
    """
    delivery = _Delivery(reader, sources, wanted, token, packed, moving or Moving())
    outage = Outage(_log, "it is offered again", over="a build's outputs were taken")

    def trouble_of(error: Exception) -> str:
        if not isinstance(error, NotTakenError):
            return ""
        if str(error) != outage.trouble:
            waits(str(error))
        return str(error)

    return await retrying(delivery.offer, within_s, outage, trouble_of)


@dataclass(slots=True)
class _Delivery:
    """The outputs of one build on their way; fields as the arguments of `deliver`."""

    reader: OutputReader
    sources: Callable[[], FarmSources]
    wanted: Mapping[str, PathInfo]
    token: str
    packed: Callable[[float], None]
    moving: Moving
    #: Files are read, as long as they can be.
    files: bool = True
    done: dict[str, Output] = field(default_factory=dict)

    async def offer(self) -> tuple[Output, ...]:
        """Offer what is not taken yet, once more where a daemon is gone or files cannot be read."""
        try:
            return await self._offer()
        except DaemonGone:
            return await self._offer()
        except FilesUnreadableError as error:
            _log.warning("%s; the daemon is asked for the outputs", error)
            self.files = False
            return await self._offer()

    async def _offer(self) -> tuple[Output, ...]:
        farm = self.sources()
        self.moving.source = farm.kind
        self.moving.size_bytes = self.moving.done_bytes
        if farm.store is None:
            return await self._send(farm.uploads(self.token))
        for name, info in self.wanted.items():
            if name not in self.done:
                self.done[name] = await self._put(name, info, farm.store, farm.farm.compression)
        return tuple(self.done.values())

    async def _put(self, name: str, info: PathInfo, store: ObjectStore, compression: Compression) -> Output:
        self.moving.size_bytes += info.nar_size
        try:
            made = await self.reader.stored(info, store, compression, self.moving, files=self.files)
        except CacheError as error:
            raise NotTakenError(f"{info.store_path}: {error}") from error
        self.packed(made.packing_s)
        return Output.of(name, NarInfo(info, made.stored))

    async def _send(self, client: UploadClient) -> tuple[Output, ...]:
        infos = {info.base_name: info for info in self.wanted.values()}
        self.moving.done_bytes, self.moving.size_bytes = 0, sum(info.nar_size for info in infos.values())

        @asynccontextmanager
        async def open_nar(claim: PathClaim, compression: Compression) -> AsyncIterator[CompressedNar]:
            async with self.reader.packed(infos[claim.path], compression, self.moving, files=self.files) as nar:
                yield nar
                self.packed(nar.pieces.waited_s)

        claims = [PathClaim.of(info) for info in infos.values()]
        try:
            result = await client.upload_all(claims, open_nar, parallel=READERS)
        except SourceChangedError as error:
            raise (FilesUnreadableError if self.files else OutputError)(str(error)) from error
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
            Output.of(name, NarInfo(info, sent[info.base_name].stored(urls[info.base_name], result.compression)))
            for name, info in self.wanted.items()
        )
