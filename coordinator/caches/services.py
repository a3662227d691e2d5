"""Services around each open cache: upstreams, uploads into it, and its housekeeper."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from coordinator.caches.housekeeping import CacheGauges, Housekeeper, SubmissionNeeds
from coordinator.caches.opening import OpenCache
from coordinator.config import DEFAULT_CACHE, ConfigError, Populating, UploadRoute
from infra.cache.pulls.upstream import Upstream
from infra.cache.repair.fsck import RepairSource
from infra.cache.uploads.s3_direct import direct_uploads
from infra.cache.uploads.uploads import Uploads
from infra.clock import Clock
from infra.nix.errors import FormatError
from infra.nix.signing import PublicKey


@dataclass(frozen=True, slots=True)
class CacheService:
    """An open cache, what takes uploads into it, and the upstreams that have more paths."""

    served: OpenCache
    uploads: Uploads
    upstreams: Sequence[Upstream]


async def open_services(
    stack: AsyncExitStack, caches: Sequence[OpenCache], state_dir: Path, clock: Clock
) -> list[CacheService]:
    """Open the services of all caches, in the same order; `stack` closes them. Raises `ConfigError`."""
    services = []
    for served in caches:
        upstreams = await _open_upstreams(stack, served, clock)
        services.append(CacheService(served, _uploads(served, state_dir, clock, upstreams), upstreams))
    return services


def keep_house(
    services: Sequence[CacheService], clock: Clock, *, submissions: SubmissionNeeds, workers: RepairSource
) -> tuple[dict[str, Housekeeper], dict[str, CacheGauges]]:
    """Return the housekeeper of each cache and the numbers that it refreshes, by the cache's name.

    What the farm builds lives in the default cache: submissions keep its paths, and workers may repair it.
    """
    gauges = {each.served.name: CacheGauges() for each in services}
    keepers = {
        each.served.name: Housekeeper(
            each.served.cache,
            each.served.settings,
            gauges[each.served.name],
            clock,
            submissions=submissions if each.served.name == DEFAULT_CACHE else None,
            sources=(workers, *each.upstreams) if each.served.name == DEFAULT_CACHE else each.upstreams,
        )
        for each in services
    }
    return keepers, gauges


def _uploads(served: OpenCache, state_dir: Path, clock: Clock, upstreams: Sequence[Upstream]) -> Uploads:
    direct = None if served.settings.uploads is UploadRoute.RELAY else direct_uploads(served.cache.objects)
    staging = state_dir / "uploads" / served.name
    return Uploads(served.cache, staging, clock.now, direct=direct, expiry=served.settings.expiry, upstreams=upstreams)


async def _open_upstreams(stack: AsyncExitStack, served: OpenCache, clock: Clock) -> list[Upstream]:
    opened = []
    for configured in served.settings.upstreams:
        try:
            keys = [PublicKey.parse(text) for text in configured.public_keys]
        except FormatError as error:
            raise ConfigError(f"a public key of the upstream {configured.url} is not one: {error.message}.") from None
        mirrored = configured.populate is Populating.MIRROR
        upstream = Upstream(configured.url, keys, served.cache.store_dir, clock.now, mirrored=mirrored)
        opened.append(await stack.enter_async_context(upstream))
    return opened
