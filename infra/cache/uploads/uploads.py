"""Uploads into a cache, from `begin` to `commit`.

An upload names all of its paths at once. What is missing is sent, directly to the object store with presigned
addresses or through here into a staging area (`relay`); `commit` puts it in its place and hands it to `Cache.publish`,
which trusts nothing. What is published with other bits is sent too, unless the very same bits have lost before: they
are kept beside the first so that a person can compare.

Everything that must outlive this process lies in files and in the object store and is found again by a name that
follows from sender, path and NAR hash (the *slot*): an upload that begins anew continues. (Small objects come in packs;
that one arrived is remembered by its slot in memory, so after a restart they are sent again.) Two senders with the same
rights fill one slot together, since what they compress is the same; if it is not, the hashes differ, and `commit`
empties the slot and has the sender begin again. Bounds: uploads at one time, the paths that they name together, the
size of each object (by its NAR's), blocks in memory. What is abandoned is swept.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Final

from infra.cache.cache import Cache
from infra.cache.catalog.catalog import apart
from infra.cache.publishing.claims import (
    ProvenObject,
)
from infra.cache.pulls.upstream import Upstream
from infra.cache.pulls.upstream_pulls import Pulls
from infra.cache.uploads.errors import (
    BadUploadError,
    ForbiddenPathError,
    TooManyUploadsError,
    UnknownUploadError,
    WrongOffsetError,
)
from infra.cache.uploads.packs import PackIntake
from infra.cache.uploads.relay import RelayStaging
from infra.cache.uploads.s3_direct import DirectUploads, staged_key
from infra.cache.uploads.turns import Turns
from infra.cache.uploads.verdicts import refused, stored, verdict_of
from infra.nix.errors import FormatError
from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo
from infra.objects.compression import SUFFIXES, nar_key
from infra.objects.errors import CacheError, ObjectMissingError, ObjectStoreError
from infra.objects.verification import ArrivingNar
from infra.retry import Outage
from infra.upload.protocol import (
    SINGLE_BYTES,
    UPLOAD_TTL_S,
    Begin,
    Begun,
    Commit,
    Committed,
    KeepRequest,
    PackTaken,
    Parts,
    PathClaim,
    SendRoute,
    SendStatus,
    SendVerdict,
    SentPath,
    UrlsWanted,
    most_bytes,
    part_bytes,
)

#: Uploads under way, and the paths that they name together.
MAX_UPLOADS: Final = 1024
MAX_CLAIMS: Final = 200_000
#: Objects placed at one time.
PLACING: Final = 8
#: Seconds after which what was abandoned is swept, and between two sweeps.
ABANDONED_S: Final = 24 * 3600.0
SWEEP_EVERY_S: Final = 600.0

_ANOTHER_NAR = "what arrived is not the NAR that was claimed; it was thrown away"
_DAMAGED = "what arrived has another hash or size; it was thrown away"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sender:
    """Sender of uploads. `paths` are base names that it may upload, None for any; `publishes` is false for workers."""

    name: str
    paths: frozenset[str] | None = None
    publishes: bool = True


@dataclass(slots=True)
class _Upload:
    sender: Sender
    claims: dict[str, PathClaim]
    expires_at: float
    #: Paths that need not be sent because an upstream has them.
    elsewhere: Mapping[str, Upstream]
    #: Path -> its object, which its sender did not hash, as it arrived; for a commit that is repeated.
    hashed: dict[str, SentPath] = field(default_factory=dict)
    #: Path -> key and id of its multipart upload.
    multiparts: dict[str, tuple[str, str]] = field(default_factory=dict)


DAY_S: Final = 86_400.0
#: The kind of the roots that pushes are.
PUSH: Final = "push"


class Uploads:
    """The uploads into one cache; belongs to one event loop. `run` must run beside it."""

    def __init__(
        self,
        cache: Cache,
        staging: Path,
        now: Callable[[], float],
        *,
        direct: DirectUploads | None = None,
        expiry: Callable[[float], float | None] = lambda _now: None,
        upstreams: Sequence[Upstream] = (),
    ) -> None:
        """Take uploads into `cache`.

        `staging` is used where the cache's store is no directory; `direct` makes senders go to the store itself. What a
        sender publishes is a root until `expiry(now)`, None for ever. What an upstream has need not be sent.
        """
        self._cache = cache
        self._full = cache.store_dir.full
        self._staging = RelayStaging(cache.objects, staging)
        self._packs = PackIntake(cache)
        self._now = now
        self._direct = direct
        self._expiry = expiry
        self._pulls = Pulls(cache, upstreams)
        self._open: dict[str, _Upload] = {}
        #: One writer of a slot at a time.
        self._turns = Turns()
        self._placing = asyncio.Semaphore(PLACING)

    async def run(self) -> None:
        """Sweep what was abandoned, until cancelled."""
        outage = Outage(_log, "it is tried again", over="abandoned uploads are swept again")
        while True:
            try:
                await self.sweep(self._now() - ABANDONED_S)
            except CacheError as error:
                outage.begin(f"abandoned uploads were not swept: {error}")
            else:
                outage.end()
            await asyncio.sleep(SWEEP_EVERY_S)

    async def sweep(self, before: float) -> None:
        """Forget uploads that expired, and delete what has not been written to since `before` (Unix seconds)."""
        now = self._now()
        for name in [name for name, upload in self._open.items() if upload.expires_at < now]:
            del self._open[name]
        await self._staging.sweep(before)
        if self._direct is not None:
            await self._direct.sweep(before)

    def makes_hashes(self, sender: Sender) -> bool:
        """Return whether this sender's relayed objects may come without hashes; a worker's report must have them."""
        return sender.publishes and self._direct is None

    # Beginning and ending.

    async def begin(self, sender: Sender, request: Begin) -> Begun:
        """Protect every named path from collection, and say what must be sent, and how.

        Raises:
            UploadError: the sender may not, a name is no path of the store, or too much is under way.
            MetadataError: the database failed.
        """
        claims = {claim.path: claim for claim in request.paths}
        for name in claims:
            self._check_name(sender, name)
        self._expire()
        if len(self._open) >= MAX_UPLOADS or len(claims) + sum(len(u.claims) for u in self._open.values()) > MAX_CLAIMS:
            raise TooManyUploadsError("as many uploads are under way as this coordinator takes; try again later")
        name = secrets.token_hex(16)
        full = {self._full(path): path for path in claims}
        missing = {full[path] for path in await self._cache.lease(_lease(name), full, UPLOAD_TTL_S)}
        differing: Mapping[str, bool] = {}
        if sender.publishes:
            differing = await self._cache.differing(
                {self._full(path): claim.nar_hash for path, claim in claims.items()}
            )
        lost = {full[path] for path, known in differing.items() if known}
        to_send = missing | {full[path] for path in differing} - lost
        elsewhere: Mapping[str, Upstream] = {}
        if sender.publishes:
            elsewhere = await self._pulls.found({path: claims[path] for path in missing})
        # What a worker built is compared with what was published before, so that is always sent.
        send = (
            claims.keys()
            if not sender.publishes
            else [path for path in claims if path in to_send and path not in elsewhere]
        )
        arrived = await self._packs.find([claims[path] for path in send], lambda claim: self._slot(sender, claim))
        here = {sent.path for sent in arrived}
        self._open[name] = _Upload(sender, claims, self._now() + UPLOAD_TTL_S, elsewhere)
        return Begun(
            id=name,
            how=SendRoute.RELAY if self._direct is None else SendRoute.DIRECT,
            send=tuple(path for path in send if path not in here),
            arrived=tuple(arrived),
            packs=self._direct is None,
            present=tuple(path for path in claims if path not in to_send and path not in lost),
            conflicts=tuple(path for path in claims if path in lost),
            upstream=tuple(elsewhere),
            compression=self._cache.compression,
        )

    def _check_name(self, sender: Sender, name: str) -> None:
        if sender.paths is not None and name not in sender.paths:
            raise ForbiddenPathError(f"this token does not allow to upload {name}")
        try:
            self._cache.store_dir.parse(self._full(name))
        except FormatError as error:
            raise BadUploadError(f"{name[:80]!r} is not a store path: {error.message}") from None

    async def renew(self, sender: Sender, name: str) -> None:
        """Keep the upload for another while. Raises `UnknownUploadError`."""
        upload = self._find(sender, name)
        if not await self._cache.renew(_lease(name), UPLOAD_TTL_S):
            await self._cache.lease(_lease(name), map(self._full, upload.claims), UPLOAD_TTL_S)

    async def end(self, sender: Sender, name: str) -> None:
        """Give the upload up, with what it began in the store. Raises `UnknownUploadError`, `ObjectStoreError`."""
        upload = self._find(sender, name)
        del self._open[name]
        await self._cache.release(_lease(name))
        if self._direct is not None:
            for key, multipart in upload.multiparts.values():
                await self._direct.abort(key, multipart)

    def _find(self, sender: Sender, name: str) -> _Upload:
        self._expire()
        upload = self._open.get(name)
        if upload is None or upload.sender != sender:
            raise UnknownUploadError("there is no such upload here, or no longer: begin it again")
        upload.expires_at = self._now() + UPLOAD_TTL_S
        return upload

    def _expire(self) -> None:
        now = self._now()
        for name in [name for name, upload in self._open.items() if upload.expires_at < now]:
            del self._open[name]

    def _claim(self, upload: _Upload, path: str) -> PathClaim:
        claim = upload.claims.get(path)
        if claim is None:
            raise ForbiddenPathError(f"{path[:80]} was not named when the upload began")
        return claim

    # Straight to the store.

    async def urls(self, sender: Sender, name: str, request: UrlsWanted) -> dict[str, str]:
        """Return path -> address for a small object. Raises `UploadError`, `ObjectStoreError`."""
        upload = self._find(sender, name)
        direct = self._needs_direct()
        keys = [staged_key(self._slot(sender, self._claim(upload, path))) for path in request.paths]
        return dict(zip(request.paths, await direct.put_urls(keys), strict=True))

    async def parts(self, sender: Sender, name: str, path: str, numbers: range) -> Parts:
        """Return addresses of parts of an object, and which are there. Raises `UploadError`, `ObjectStoreError`."""
        upload = self._find(sender, name)
        direct = self._needs_direct()
        claim = self._claim(upload, path)
        most = -(-most_bytes(claim.nar_size) // part_bytes(claim.nar_size))
        numbers = range(numbers.start, min(numbers.stop, most + 1))
        async with self._turns.of(self._slot(sender, claim)):
            if path not in upload.multiparts:
                start = f"nar/{claim.nar_hash.removeprefix('sha256:')}-{self._slot(sender, claim)[:12]}"
                upload.multiparts[path] = await direct.open_multipart(start, f".nar{SUFFIXES[self._cache.compression]}")
        key, multipart = upload.multiparts[path]
        try:
            have = await direct.parts(key, multipart, numbers) if numbers else []
        except ObjectMissingError:
            # Somebody else completed it, or it was aborted: the sender begins the object again.
            upload.multiparts.pop(path, None)
            raise WrongOffsetError(0) from None
        urls = await direct.part_urls(key, multipart, numbers)
        return Parts(urls={str(number): url for number, url in urls.items()}, have=tuple(have))

    def _needs_direct(self) -> DirectUploads:
        if self._direct is None:
            raise BadUploadError("this cache takes objects by relay")
        return self._direct

    # Through here.

    async def offset(self, sender: Sender, name: str, path: str) -> int:
        """Return how many bytes of an object have arrived. Raises `UploadError`."""
        claim = self._claim(self._find(sender, name), path)
        return self._staging.size(self._slot(sender, claim))

    async def append(self, sender: Sender, name: str, path: str, offset: int, data: AsyncIterable[bytes]) -> int:
        """Add a piece to an object; returns how many bytes it has then. What came before an error stays.

        Raises:
            WrongOffsetError: it does not begin where the object ends.
            StoreFullError: no room is left.
            UploadError: the object would be larger than its NAR can become.
            ObjectStoreError: the staging area failed.
        """
        claim = self._claim(self._find(sender, name), path)
        slot = self._slot(sender, claim)
        async with self._turns.of(slot):
            # What a worker sends is verified when its build is reported.
            unpacked = partial(self._unpacked, claim) if sender.publishes else _nothing
            return await self._staging.append(slot, offset, data, most_bytes(claim.nar_size), unpacked)

    def _unpacked(self, claim: PathClaim) -> ArrivingNar | None:
        try:
            return ArrivingNar(self._cache.compression, claim.nar_size)
        except ValueError:
            return None

    async def pack(self, sender: Sender, name: str, data: AsyncIterable[bytes]) -> PackTaken:
        """Take a pack of small objects; what came whole before an error stays.

        Raises:
            UploadError: it is no pack, or has a path that was not named when the upload began.
            StoreFullError: no room is left.
            ObjectStoreError: the store failed.
        """
        upload = self._find(sender, name)
        if self._direct is not None:
            raise BadUploadError("this cache takes objects at presigned addresses")
        return await self._packs.take(
            data, lambda path: self._claim(upload, path), lambda claim: self._slot(sender, claim)
        )

    # Committing.

    async def commit(self, sender: Sender, name: str, request: Commit) -> Committed:
        """Put what was sent in its place and publish it together; one verdict for each path.

        May be repeated: what is in its place already is not requested again.

        Raises:
            UploadError: the upload is not known, or a path was not named when it began.
            CacheError: the database failed; nothing of it is visible.
        """
        upload = self._find(sender, name)
        claims = [self._claim(upload, sent.path) for sent in request.sent]
        if not self.makes_hashes(sender) and not all(sent.file_hash for sent in request.sent):
            raise BadUploadError("an object of this upload comes with its hash")
        placed: dict[str, SendVerdict] = {}
        proofs: set[ProvenObject] = set()

        in_packs = await apart(
            len(claims), lambda: self._packs.arrived(claims, request.sent, lambda claim: self._slot(sender, claim))
        )
        placed.update((path, stored(path, self._key(here.sent))) for path, here in in_packs.items())
        # For a commit that is repeated.
        upload.hashed.update((path, here.sent) for path, here in in_packs.items())

        async def place(claim: PathClaim, sent: SentPath) -> None:
            async with self._placing, self._turns.of(self._slot(sender, claim)):
                placed[claim.path] = await self._place(sender, upload, claim, sent, proofs)

        async with asyncio.TaskGroup() as tasks:
            for claim, sent in zip(claims, request.sent, strict=True):
                if sent.path not in in_packs:
                    tasks.create_task(place(claim, sent))
        if sender.publishes:
            arrived = [
                (claim, sent if sent.file_hash else upload.hashed[claim.path])
                for claim, sent in zip(claims, request.sent, strict=True)
                if placed[claim.path].status is SendStatus.STORED
            ]
            narinfos = await apart(
                len(arrived), lambda: [self._narinfo(claim, sent, placed[claim.path].url) for claim, sent in arrived]
            )
            await self._keep(name, upload, request.keep)
            pulled = await self._pulls.pull({upload.claims[path]: up for path, up in upload.elsewhere.items()})
            proofs.update(
                ProvenObject(placed[path].url, upload.claims[path].nar_hash, upload.claims[path].nar_size)
                for path in in_packs
            )
            outcomes = (await self._cache.publish([*pulled, *narinfos], proofs=proofs))[len(pulled) :]
            self._packs.forget(here.slot for here in in_packs.values())
            for (claim, _), outcome in zip(arrived, outcomes, strict=True):
                placed[claim.path] = verdict_of(claim.path, outcome, placed[claim.path].url)
        return Committed(verdicts=tuple(placed[claim.path] for claim in claims))

    def _narinfo(self, claim: PathClaim, sent: SentPath, url: str) -> NarInfo:
        return NarInfo(claim.info(self._cache.store_dir), sent.stored(url, self._cache.compression))

    async def _keep(self, name: str, upload: _Upload, request: KeepRequest | None) -> None:
        """Make what is published a root, before it is: as the sender wishes, or all of it for the retention."""
        if request is None:
            named = [self._full(path) for path in upload.claims]
            await self._cache.keep(PUSH, name, named, self._expiry(self._now()))
            return
        for path in request.paths:
            self._claim(upload, path)
        expires_at = self._now() + request.days * DAY_S if request.days else None
        await self._cache.keep(PUSH, request.name, [self._full(path) for path in request.paths], expires_at)

    async def _place(
        self, sender: Sender, upload: _Upload, claim: PathClaim, sent: SentPath, proofs: set[ProvenObject]
    ) -> SendVerdict:
        """Move an object to where it is published from; the caller holds its slot. `proofs` gets what is proven."""
        slot = self._slot(sender, claim)
        try:
            if self._direct is None:
                return await self._place_relayed(upload, slot, claim, sent, proofs)
            if sent.etags:
                return await self._place_parts(self._direct, upload, claim, sent)
            return await self._place_small(slot, claim, sent)
        except ObjectMissingError as error:
            return SendVerdict(path=claim.path, status=SendStatus.REFUSED, message=str(error))
        except ObjectStoreError as error:
            return SendVerdict(path=claim.path, status=SendStatus.FAILED, message=str(error))

    async def _place_relayed(
        self, upload: _Upload, slot: str, claim: PathClaim, sent: SentPath, proofs: set[ProvenObject]
    ) -> SendVerdict:
        is_proven = self._staging.proves(slot, claim.nar_hash, claim.nar_size)
        if not sent.file_hash:
            found = await self._staging.hashed(slot, claim.path) or upload.hashed.get(claim.path)
            if found is None:
                return refused(claim.path, "its object was not sent")
            if is_proven is False or found.file_size != sent.file_size:
                self._staging.drop(slot)
                return refused(claim.path, _ANOTHER_NAR)
            sent = upload.hashed[claim.path] = found
        key = self._key(sent)
        whole = await self._staging.place(slot, key, sent.file_hash, sent.file_size)
        if whole and is_proven:
            proofs.add(ProvenObject(key, claim.nar_hash, claim.nar_size))
        return stored(claim.path, key) if whole else refused(claim.path, _DAMAGED)

    async def _place_small(self, slot: str, claim: PathClaim, sent: SentPath) -> SendVerdict:
        objects, key, staged = self._cache.objects, self._key(sent), staged_key(slot)
        size = await objects.head(staged)
        if size is None:
            there = await objects.head(key) == sent.file_size
            return stored(claim.path, key) if there else refused(claim.path, "its object was not sent")
        data = await objects.get_bytes(staged) if size == sent.file_size <= SINGLE_BYTES else b""
        if sha256_text(sha256(data).digest()) != sent.file_hash:
            await objects.delete(staged)
            return refused(claim.path, _DAMAGED)
        # Written from memory: the address of the staged object is still good.
        await objects.put_bytes(key, data)
        await objects.delete(staged)
        return stored(claim.path, key)

    async def _place_parts(
        self, direct: DirectUploads, upload: _Upload, claim: PathClaim, sent: SentPath
    ) -> SendVerdict:
        if claim.path not in upload.multiparts:
            return refused(claim.path, "its parts were not sent in this upload")
        key, multipart = upload.multiparts[claim.path]
        try:
            await direct.complete(key, multipart, sent.etags)
        except ObjectMissingError:
            # A commit that is repeated finds the upload completed.
            if await self._cache.objects.head(key) != sent.file_size:
                del upload.multiparts[claim.path]
                raise
        return stored(claim.path, key)

    # Names.

    def _key(self, sent: SentPath) -> str:
        return nar_key(sent.file_hash, self._cache.compression)

    def _slot(self, sender: Sender, claim: PathClaim) -> str:
        """Name what one kind of sender uploads for one path: the same for all tries of it, another for every other."""
        words = (sender.name, claim.path, claim.nar_hash, self._cache.compression)
        return sha256("\n".join(words).encode()).hexdigest()[:32]


def _nothing() -> None:
    return None


def _lease(name: str) -> str:
    return f"upload-{name}"
