"""The caches of a coordinator: the one at `/cache`, and named ones at `/cache/NAME`.

Each is a `Cache` of its own with its own metadata, objects, keys, readers and writers. They share a process and a
bucket (below `caches/NAME/`), nothing else: no query can forget which cache it is for, a collection of one cannot touch
another, and none shows what another has.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from coordinator.config import DEFAULT_CACHE, CacheSettings, Settings
from coordinator.security.farm_secrets import Secrets
from coordinator.security.tokens import CacheAccess, TokenSet, load_tokens
from infra.cache.cache import Cache
from infra.cache.catalog.database import FencingToken
from infra.cache.publishing.keys import forget_keys
from infra.clock import Clock
from infra.nix.signing import SecretKey
from infra.nix.store_path import StoreDir
from infra.objects.store import ObjectStore, open_object_store


@dataclass(frozen=True, slots=True)
class OpenCache:
    """A cache that is open: what it is called, where it is served (`prefix`), who may use it."""

    name: str
    prefix: str
    settings: CacheSettings
    cache: Cache
    access: CacheAccess


async def open_caches(
    stack: AsyncExitStack, settings: Settings, clock: Clock, fence: FencingToken, *, secrets: Secrets, farm_token: str
) -> list[OpenCache]:
    """Open, or make, every configured cache, the default one first; `stack` closes them.

    They are written under `fence` alone. The holder of the API token may write to the default cache; the farm's own
    workers, who are given `farm_token`, may read it.

    Raises:
        TokenError: the readers or writers of a cache cannot be read.
        CacheError: objects or metadata of a cache cannot be used.
    """
    objects = open_object_store(settings.objects_url)
    store_dir = StoreDir(settings.store_dir)

    async def made(database: str, part: ObjectStore, keys: Sequence[SecretKey], its: CacheSettings) -> Cache:
        cache = await Cache.open(
            database,
            part,
            store_dir=store_dir,
            keys=keys,
            now=clock.now,
            fence=fence,
            compression=its.compression,
        )
        stack.push_async_callback(cache.close)
        return cache

    default = settings.cache
    readers = load_tokens(default.readers)
    if readers:
        readers |= TokenSet([farm_token])
    access = CacheAccess(readers, load_tokens(default.writers) | TokenSet([secrets.api_token]))
    cache = await made(settings.database_url("cache"), objects, secrets.keys[DEFAULT_CACHE], default)
    opened = [OpenCache(DEFAULT_CACHE, "/cache", default, cache, access)]
    for named in settings.caches:
        name = named.name
        access = CacheAccess(load_tokens(named.readers), load_tokens(named.writers))
        part = objects.below(f"caches/{name}")
        cache = await made(settings.named_cache_database_url(name), part, secrets.keys[name], named)
        opened.append(OpenCache(name, f"/cache/{name}", named, cache, access))
    # Nothing that is started later, such as workers, inherits a key.
    for open_cache in opened:
        forget_keys(open_cache.settings.signing_keys)
    return opened
