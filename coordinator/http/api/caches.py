"""The API behind `drover cache …`: what a cache holds and keeps, collecting, checking, signing anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import routes
from coordinator.api.cache_models import (
    CacheRootView,
    CacheView,
    CollectView,
    FaultView,
    KeeperView,
    ResignView,
    VerifyView,
    WhyView,
)
from coordinator.api.requests import CollectRequest, PinRequest, VerifyRequest
from coordinator.api.route import Route
from coordinator.caches.housekeeping import Housekeeper
from coordinator.caches.names import checked_path, checked_pin
from coordinator.errors import NotFoundError
from coordinator.http.answers import answer
from coordinator.http.api.pages import answer_page, cut, limit_of, position_of
from coordinator.http.bodies import BodyBounds, read_model
from infra.cache.cache import Cache
from infra.cache.retention.roots import RootRow
from infra.nix.store_path import hash_part_of

#: 10,000 paths of the longest name.
PIN_BOUNDS: Final = BodyBounds(size_bytes=4 * 1024 * 1024, items=10_064, containers=16)


class CachingApi:
    """The handlers, over the housekeepers of all caches by name."""

    def __init__(self, housekeepers: Mapping[str, Housekeeper]) -> None:
        self._housekeepers = housekeepers

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            routes.CACHE: self.info,
            routes.CACHE_ROOTS: self.roots,
            routes.CACHE_WHY: self.why,
            routes.PIN: self.pin,
            routes.UNPIN: self.unpin,
            routes.COLLECT: self.collect,
            routes.VERIFY: self.verify,
            routes.RESIGN: self.resign,
        }

    async def info(self, request: web.Request) -> web.Response:
        """Show what is stored."""
        name, cache = self._cache(request)
        info = await cache.info()
        return answer(
            CacheView(
                name=name,
                paths=info.paths,
                tombstoned=info.tombstoned,
                nar_bytes=info.nar_bytes,
                file_bytes=info.file_bytes,
                saved_bytes=info.saved_bytes,
                realisations=info.realisations,
                conflicts=info.conflicts,
                leases=info.leases,
                roots=dict(info.roots),
                public_keys=tuple(str(key) for key in cache.public_keys),
            )
        )

    async def roots(self, request: web.Request) -> web.Response:
        """List roots, all or those of one kind, the last used first."""
        _, cache = self._cache(request)
        kind = request.query.get("kind", "")
        roots = [root for root in await cache.roots() if not kind or root.kind == kind]
        page = cut(roots, position_of(request), limit_of(request))
        return await answer_page(request, page, _root_view)

    async def why(self, request: web.Request) -> web.Response:
        """Show what keeps a path."""
        _, cache = self._cache(request)
        path = checked_path(cache, request.query.get("path", ""))
        published = await cache.narinfo(hash_part_of(path)) is not None
        keepers = tuple(
            KeeperView(kind=keeper.kind, name=keeper.name, expires_at=keeper.expires_at or 0.0, chain=keeper.chain)
            for keeper in await cache.why(path)
        )
        return answer(WhyView(path=path, published=published, keepers=keepers))

    async def pin(self, request: web.Request) -> web.Response:
        """Keep paths under a name."""
        _, cache = self._cache(request)
        wish = await read_model(request, PinRequest, PIN_BOUNDS)
        paths = [checked_path(cache, path) for path in wish.paths]
        await cache.pin(checked_pin(request.match_info["pin"]), paths, wish.expires_at or None)
        return web.Response(status=204)

    async def unpin(self, request: web.Request) -> web.Response:
        """Forget a pin."""
        name, cache = self._cache(request)
        pin = checked_pin(request.match_info["pin"])
        if not await cache.unpin(pin):
            raise NotFoundError(f"nothing is pinned as {pin} in the cache {name}; `drover cache roots` lists the pins.")
        return web.Response(status=204)

    async def collect(self, request: web.Request) -> web.Response:
        """Collect garbage."""
        wish = await read_model(request, CollectRequest)
        report = await self._housekeeper(request).collect(dry_run=wish.dry_run)
        return answer(
            CollectView(
                dry_run=wish.dry_run,
                reachable=report.reachable,
                tombstoned=report.tombstoned,
                deleted_paths=report.deleted_paths,
                deleted_objects=report.deleted_objects,
                deleted_bytes=report.deleted_bytes,
                orphans=report.orphans,
                expired_roots=report.expired_roots,
                phase_seconds=dict(report.phase_seconds),
            )
        )

    async def verify(self, request: web.Request) -> web.Response:
        """Check every path, and repair what can be."""
        wish = await read_model(request, VerifyRequest)
        report = await self._housekeeper(request).verify(full=wish.full, repair=wish.repair)
        faults = tuple(FaultView(path=each.path, fault=each.fault, outcome=each.outcome) for each in report.faults)
        return answer(
            VerifyView(
                checked=report.checked,
                broken=report.broken,
                repaired=report.repaired,
                hidden=report.hidden,
                faults=faults,
                seconds=report.seconds,
            )
        )

    async def resign(self, request: web.Request) -> web.Response:
        """Sign everything with the present keys."""
        _, cache = self._cache(request)
        report = await self._housekeeper(request).resign()
        return answer(
            ResignView(
                narinfos=report.narinfos,
                realisations=report.realisations,
                public_keys=tuple(str(key) for key in cache.public_keys),
            )
        )

    def _cache(self, request: web.Request) -> tuple[str, Cache]:
        return request.match_info["cache"], self._housekeeper(request).cache

    def _housekeeper(self, request: web.Request) -> Housekeeper:
        name = request.match_info["cache"]
        found = self._housekeepers.get(name)
        if found is None:
            raise NotFoundError(f"there is no cache {name[:80]!r}; there are {', '.join(self._housekeepers)}.")
        return found


def _root_view(root: RootRow) -> CacheRootView:
    return CacheRootView(
        kind=root.kind,
        name=root.name,
        paths=root.paths,
        created_at=root.created_at,
        expires_at=root.expires_at or 0.0,
        used_at=root.used_at or 0.0,
    )
