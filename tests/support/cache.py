"""A real cache in a directory, and paths to put into it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra.cache.cache import Cache
from infra.cache.publishing.claims import PublishOutcome
from infra.nix import base32
from infra.nix.narinfo import NarInfo
from infra.nix.path_info import PathInfo
from infra.nix.signing import SecretKey, generate
from infra.nix.store_path import StoreDir
from infra.objects.nar_encoder import UploadedNar
from infra.objects.nar_writer import upload_nar
from infra.objects.store import ObjectStore, open_object_store

STORE_DIR = StoreDir("/nix/store")


def secret_key(name: str = "drover-test-1", seed: int = 1) -> SecretKey:
    return generate(name, bytes([seed]) * 32)


def store_path(name: str) -> str:
    """Return a path that no two names share."""
    return f"/nix/store/{base32.encode(hashlib.sha1(name.encode(), usedforsecurity=False).digest())}-{name}"


def base_name(path: str) -> str:
    return path.rpartition("/")[2]


async def chunked(data: bytes, size: int = 50_000) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@asynccontextmanager
async def open_cache(
    directory: Path,
    keys: Sequence[SecretKey] = (),
    store_dir: StoreDir = STORE_DIR,
    *,
    database_url: str = "",
    objects: ObjectStore | None = None,
    now: Callable[[], float] = time.time,
) -> AsyncIterator[Cache]:
    """Open the cache in a directory; its metadata is in an SQLite file there, unless `database_url` says otherwise."""
    cache = await Cache.open(
        database_url or f"sqlite+aiosqlite:///{directory}/cache.sqlite",
        objects or open_object_store((directory / "objects").as_uri()),
        store_dir=store_dir,
        keys=keys or [secret_key()],
        now=now,
    )
    try:
        yield cache
    finally:
        await cache.close()


def narinfo_of(path: str, uploaded: UploadedNar, references: Sequence[str] = ()) -> NarInfo:
    """Return the claim that what was uploaded is the NAR of a path; `references` are base names."""
    return uploaded.narinfo(PathInfo(path, "", 0, tuple(references)))


def lying(claim: NarInfo, lie: dict[str, Any]) -> NarInfo:
    """Return the claim with other values in fields of its path or of its object."""
    of_object = {field: value for field, value in lie.items() if hasattr(claim.stored, field)}
    of_path = {field: value for field, value in lie.items() if field not in of_object}
    return NarInfo(replace(claim.path, **of_path), replace(claim.stored, **of_object))


async def uploaded_claim(cache: Cache, path: str, nar: bytes | None = None, references: Sequence[str] = ()) -> NarInfo:
    """Upload a NAR (by default its bytes are the path's text) and return the claim for it; `references` are paths."""
    uploaded = await upload_nar(cache.objects, chunked(nar or path.encode()))
    return narinfo_of(path, uploaded, [base_name(reference) for reference in references])


async def publish(cache: Cache, path: str, nar: bytes | None = None, references: Sequence[str] = ()) -> PublishOutcome:
    (outcome,) = await cache.publish([await uploaded_claim(cache, path, nar, references)])
    return outcome


def object_file(cache: Cache, claim: NarInfo) -> Path:
    path = cache.objects.local_path(claim.stored.url)
    assert path is not None
    return path
