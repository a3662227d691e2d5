"""Input sources from a client: nothing is believed, the content must give the path.

A source's NAR streams through a reader, which checks its format, into the object store, which hashes it; afterwards
the hashes show by which method the content gives the store path. What no method explains is refused: it may be true in
the client's store, but the farm cannot know. An object whose source is refused stays unnamed in the object store until
the cache is swept.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import replace
from typing import ClassVar

from coordinator.api.streams import Source
from coordinator.errors import IntakeError, UnavailableError
from infra.cache.cache import Cache
from infra.cache.publishing.claims import Rejected, RejectReason
from infra.nix.ca import SourceReader, verify_source
from infra.nix.errors import FormatError, SourcePathError
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import StoreDir, base_name_of, parse_base_name
from infra.objects.nar_writer import upload_nar
from infra.objects.store import ObjectStore

#: Sources published in one transaction.
PUBLISH_AT_ONCE = 64


class SourceRefusedError(IntakeError):
    """A source is not what its path says, or something that it refers to is not here."""

    code: ClassVar[str] = "bad_source"


class SourceIntake:
    """Takes sources one after the other and publishes them in batches, references first."""

    def __init__(self, cache: Cache, objects: ObjectStore, store_dir: StoreDir) -> None:
        self._cache = cache
        self._objects = objects
        self._store_dir = store_dir

    async def add(self, sources: AsyncIterable[Source]) -> int:
        """Verify, upload and publish; returns how many there were.

        Raises:
            IntakeError: A source is refused, and the sentence names it; those before it have been published.
        """
        count = 0
        batch: list[NarInfo] = []
        try:
            async for source in sources:
                batch.append(await self._take(source))
                count += 1
                if len(batch) >= PUBLISH_AT_ONCE:
                    await self._publish(batch)
                    batch = []
        except IntakeError:
            await self._publish(batch)
            raise
        await self._publish(batch)
        return count

    async def _take(self, source: Source) -> NarInfo:
        header = source.header
        info = header.info(self._store_dir)
        reader = SourceReader()

        async def checked() -> AsyncIterator[bytes]:
            async for chunk in source.chunks():
                reader.feed(chunk)
                yield chunk

        try:
            parse_base_name(header.path)
            for reference in header.references:
                parse_base_name(reference)
            uploaded = await upload_nar(self._objects, checked(), self._cache.compression)
            hashes = reader.finish(uploaded.nar_hash)
            ca = verify_source(self._store_dir, info.store_path, hashes, info.reference_paths)
        except FormatError as error:
            raise SourceRefusedError(f"the source {header.path[:300]!r} cannot be read: {error}") from None
        except SourcePathError:
            raise SourceRefusedError(
                f"the source {header.path} is not addressed by its content, so the farm cannot tell whether it is "
                f"true; put it into the farm's cache with `drover cache push {info.store_path}`, or let the farm "
                "build it"
            ) from None
        return uploaded.narinfo(replace(info, ca=ca))

    async def _publish(self, batch: list[NarInfo]) -> None:
        for outcome in await self._cache.publish(batch):
            if not isinstance(outcome, Rejected):
                # A conflict too is an answer: something true by its content is there already.
                continue
            name = base_name_of(outcome.store_path)
            if outcome.reason is RejectReason.STORE_FAILED:
                raise UnavailableError(f"the source {name} could not be published: {outcome.message}; try again later")
            raise SourceRefusedError(f"the source {name} was refused: {outcome.message}")
