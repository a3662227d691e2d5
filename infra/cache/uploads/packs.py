"""Small objects that come many in one request: verified in memory, written once under their final names.

    1. a record must name a path that the upload claimed; one that does not ends the pack
    2. its bytes are unpacked and held against the claim in a thread, before anything of them is written
    3. the object is written under its final key; that it arrived is remembered by its slot, so that neither the commit
       nor an upload that begins anew needs its bytes again

What is not as claimed is named in the answer and costs no other. What came whole before a pack was cut stays. Memory:
one block of the body, and one NAR of at most PACK_NAR_BYTES, at a time.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from typing import Final

from infra.cache.cache import Cache
from infra.cache.uploads.errors import BadUploadError
from infra.cache.uploads.relay import blocks
from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo
from infra.objects.compression import nar_key
from infra.objects.errors import CorruptNarError
from infra.objects.store import LocalObjectStore
from infra.objects.verification import SmallNars, verify_nar
from infra.upload.packs import PackFormatError, PackReader
from infra.upload.protocol import PACK_NAR_BYTES, PackTaken, PathClaim, SentPath

#: Objects that arrived and are remembered, those of longest ago go first.
MAX_ARRIVED: Final = 100_000
#: Objects written at one time to a store that is no directory.
WRITING: Final = 8


@dataclass(frozen=True, slots=True)
class ArrivedObject:
    """An object that came in a pack: where it is remembered, and what it is."""

    slot: str
    sent: SentPath


class PackIntake:
    """The packs of one cache's uploads; belongs to one event loop."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        #: Slot -> what lies in the store for it and the NAR size that it was held against, oldest first.
        self._arrived: OrderedDict[str, tuple[SentPath, int]] = OrderedDict()

    def arrived(
        self, claims: Iterable[PathClaim], sent: Iterable[SentPath], slot_of: Callable[[PathClaim], str]
    ) -> dict[str, ArrivedObject]:
        """Return, by path, what came in packs as it is sent now, held against just these claims.

        Where the sender names no hash, the object is whatever was found to be the claimed NAR.
        """
        found: dict[str, ArrivedObject] = {}
        for claim, each in zip(claims, sent, strict=True) if self._arrived else ():
            slot = slot_of(claim)
            here, nar_size = self._arrived.get(slot, (None, 0))
            if here is None or nar_size != claim.nar_size or here.file_size != each.file_size:
                continue
            if each.file_hash in {"", here.file_hash} and not each.etags:
                found[claim.path] = ArrivedObject(slot, here)
        return found

    async def find(self, claims: Iterable[PathClaim], slot_of: Callable[[PathClaim], str]) -> list[SentPath]:
        """Return those that came before, and whose objects are still in the store. Raises `ObjectStoreError`."""
        found: list[SentPath] = []
        for claim in claims if self._arrived else ():
            slot = slot_of(claim)
            sent, nar_size = self._arrived.get(slot, (None, 0))
            if sent is None or nar_size != claim.nar_size:
                continue
            if await self._cache.objects.head(self._key(sent)) == sent.file_size:
                found.append(sent)
            else:
                self.forget([slot])
        return found

    def forget(self, slots: Iterable[str]) -> None:
        """Have objects sent again if they are wanted again."""
        for slot in slots:
            self._arrived.pop(slot, None)

    async def take(
        self, data: AsyncIterable[bytes], claim_of: Callable[[str], PathClaim], slot_of: Callable[[PathClaim], str]
    ) -> PackTaken:
        """Take one pack.

        Raises:
            UploadError: it is none, or has a path that was not claimed (`claim_of`); what came before stays.
            StoreFullError: no room is left.
            ObjectStoreError: the store failed.
        """
        reader = PackReader()
        refused: dict[str, str] = {}
        try:
            async for block in blocks(data):
                records = [(claim_of(name), content) for name, content in reader.feed(block)]
                for claim, sent, reason in await self._examine_all(records):
                    if sent is None:
                        refused[claim.path] = reason
                    else:
                        self._remember(slot_of(claim), sent, claim.nar_size)
            reader.close()
        except PackFormatError as error:
            raise BadUploadError(str(error)) from None
        return PackTaken(refused=refused)

    async def _examine_all(
        self, records: Sequence[tuple[PathClaim, bytes]]
    ) -> Sequence[tuple[PathClaim, SentPath | None, str]]:
        if not records:
            return ()
        objects = self._cache.objects
        if isinstance(objects, LocalObjectStore):
            return await asyncio.to_thread(self._examine, records, objects)
        examined = await asyncio.to_thread(self._examine, records, None)
        room = asyncio.Semaphore(WRITING)

        async def write(sent: SentPath, content: bytes) -> None:
            async with room:
                await objects.put_bytes(self._key(sent), content)

        await asyncio.gather(
            *(
                write(sent, content)
                for (_, content), (_, sent, _) in zip(records, examined, strict=True)
                if sent is not None
            )
        )
        return examined

    def _examine(
        self, records: Sequence[tuple[PathClaim, bytes]], objects: LocalObjectStore | None
    ) -> list[tuple[PathClaim, SentPath | None, str]]:
        """Verify objects and write those that hold where `objects` can be written to from a thread."""
        examined: list[tuple[PathClaim, SentPath | None, str]] = []
        nars = SmallNars(self._cache.compression)
        for claim, content in records:
            sent = SentPath(
                path=claim.path, file_hash=sha256_text(sha256(content).digest()), file_size=max(1, len(content))
            )
            reason = self._fault(nars, claim, sent, content)
            if objects is not None and not reason:
                objects.put_now(self._key(sent), content)
            examined.append((claim, None if reason else sent, reason))
        return examined

    def _fault(self, nars: SmallNars, claim: PathClaim, sent: SentPath, content: bytes) -> str:
        """Return why an object is not what was claimed, "" where it is."""
        if claim.nar_size > PACK_NAR_BYTES:
            return f"its NAR has more than {PACK_NAR_BYTES} bytes, so it comes in pieces and not in a pack"
        if nars.proves(content, claim.nar_hash, claim.nar_size):
            return ""
        stored = sent.stored(self._key(sent), self._cache.compression)
        try:
            verify_nar(BytesIO(content), NarInfo(claim.info(self._cache.store_dir), stored))
        except CorruptNarError as error:
            return str(error)
        return ""

    def _key(self, sent: SentPath) -> str:
        return nar_key(sent.file_hash, self._cache.compression)

    def _remember(self, slot: str, sent: SentPath, nar_size: int) -> None:
        self._arrived[slot] = (sent, nar_size)
        self._arrived.move_to_end(slot)
        while len(self._arrived) > MAX_ARRIVED:
            self._arrived.popitem(last=False)
