"""Things to upload, and a coordinator that takes them, in a directory or an S3 store."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import aiohttp
import pytest

from coordinator.config import CacheSettings, NamedCacheSettings, Settings, UploadRoute
from coordinator.main import Coordinator, open_coordinator
from infra.exchange import Connections
from infra.nix import narinfo
from infra.nix.hashing import sha256_text
from infra.objects.nar_encoder import compress_now, compressing
from infra.objects.nar_reader import fetch_nar
from infra.upload.client import OpenNar, UploadClient, upload_connections
from infra.upload.packs import MakeObject, make_pack
from infra.upload.protocol import (
    Begin,
    KeepRequest,
    PathClaim,
    SendStatus,
)
from tests.coordinator.conftest import nix_workers
from tests.support.cache import STORE_DIR, base_name, chunked, store_path
from tests.support.servers import S3Place

#: Compressed, this is several parts or pieces.
LARGE = random.Random(3).randbytes(30 * 1024 * 1024)


@dataclass(frozen=True)
class Thing:
    """A path with its bytes."""

    claim: PathClaim
    nar: bytes


def thing(name: str, nar: bytes = b"", references: Sequence[Thing] = ()) -> Thing:
    nar = nar or name.encode() * 100
    return Thing(
        PathClaim(
            path=base_name(store_path(name)),
            nar_hash=sha256_text(sha256(nar).digest()),
            nar_size=len(nar),
            references=tuple(sorted(each.claim.path for each in references)),
        ),
        nar,
    )


def opener(*things: Thing) -> OpenNar:
    nars = {each.claim.path: each.nar for each in things}
    return lambda claim, compression: compressing(chunked(nars[claim.path], 300_000), compression)


def maker(*things: Thing, is_hashed: bool = True) -> MakeObject:
    nars = {each.claim.path: each.nar for each in things}
    return lambda claim, compression: compress_now(iter([nars[claim.path]]), compression, is_hashed=is_hashed)


def pack_of(*things: Thing) -> bytes:
    """Return a pack of things as they are, whatever they claim."""
    honest = [replace(each, claim=thing(each.claim.path[33:], each.nar).claim) for each in things]
    pack = make_pack([each.claim for each in honest], "zstd", maker(*honest))
    assert len(pack.sent) == len(things)
    return pack.body


def begin_of(*claims: PathClaim) -> bytes:
    return Begin(paths=claims).json()


@dataclass
class Site:
    """A running coordinator and a way to make clients of it."""

    coordinator: Coordinator
    session: aiohttp.ClientSession
    connections: Connections
    token: str

    def client(self, token: str = "", cache: str = "") -> UploadClient:
        return UploadClient(self.connections, self.coordinator.ready.cache_url + cache, token or self.token)

    async def push(self, *things: Thing, keep: KeepRequest | None = None) -> dict[str, SendStatus]:
        result = await self.client().upload_all([each.claim for each in things], opener(*things), parallel=4, keep=keep)
        return {verdict.path: verdict.status for verdict in result.verdicts}

    async def nar(self, path: str) -> bytes | None:
        """Return the NAR that the cache serves of a path, verified."""
        cache = self.coordinator.cache
        text = await cache.narinfo(path[:32])
        if text is None:
            return None
        info = narinfo.parse(text, STORE_DIR)
        return b"".join([data async for data in fetch_nar(cache.objects, info)])


def settings_of(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Return the settings of a farm whose objects lie where the parameter says."""
    settings = Settings(
        state_dir=tmp_path / "farm",
        port=0,
        cache=CacheSettings(uploads=UploadRoute.RELAY if "relay" in request.param else UploadRoute.AUTO),
        caches=(NamedCacheSettings(name="other"),),
    )
    if request.param != "directory":
        s3: S3Place = request.getfixturevalue("s3")
        settings = settings.model_copy(update={"object_store_url": s3.url})
    return settings


async def opened(stack: AsyncExitStack, settings: Settings) -> Site:
    coordinator = await stack.enter_async_context(
        open_coordinator(settings, nix_workers(settings.state_dir / "workers", ()))
    )
    session = await stack.enter_async_context(aiohttp.ClientSession())
    connections = await stack.enter_async_context(upload_connections())
    return Site(coordinator, session, connections, coordinator.ready.token_file.read_text().strip())
