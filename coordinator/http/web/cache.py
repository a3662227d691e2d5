"""View of a cache's page: what is stored, the roots that keep it, and why a path is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from aiohttp import web

from coordinator.api.demand_routes import DemandView
from coordinator.caches.housekeeping import Housekeeper
from coordinator.caches.names import checked_path, checked_pin
from coordinator.config import DEFAULT_CACHE
from coordinator.demand.demand import Demand
from coordinator.errors import BadRequestError, NotFoundError
from coordinator.http.web.guards import FORM, VISITOR, html, seen_elsewhere
from coordinator.http.web.rendering import PageRenderer
from infra.cache.cache import Cache
from infra.cache.retention.roots import PIN, Keeper, RootRow
from infra.cache.statistics import CacheInfo
from infra.nix.store_path import hash_part_of

#: Roots of one page, keepers of a path, and paths of a chain, which is shown by its ends.
ROOTS_SHOWN: Final = 100
KEEPERS_SHOWN: Final = 20
CHAIN_SHOWN: Final = 12
#: Paths that people wait for.
DEMAND_SHOWN: Final = 20
_DIGITS: Final = 9


@dataclass(frozen=True, slots=True)
class WhyData:
    """A path, and the roots that keep it."""

    path: str
    published: bool
    keepers: tuple[Keeper, ...]
    total: int


@dataclass(frozen=True, slots=True)
class CacheData:
    """The whole page."""

    name: str
    caches: tuple[str, ...]
    info: CacheInfo
    public_keys: tuple[str, ...]
    roots: tuple[RootRow, ...]
    root_total: int
    after: int
    following: int
    asked: str
    why: WhyData | None
    #: What people wait for, the most wanted first; of the default cache.
    demand: tuple[DemandView, ...]


class CachePage:
    """The page at `/caches/NAME`."""

    def __init__(self, housekeepers: Mapping[str, Housekeeper], demand: Demand, renderer: PageRenderer) -> None:
        self._demand = demand
        self._housekeepers = housekeepers
        self._renderer = renderer

    async def show(self, request: web.Request) -> web.Response:
        """Show a cache, and why a path is kept where that is asked."""
        name, cache = self._cache(request)
        asked = request.query.get("path", "").strip()
        after = _position_of(request)
        roots = await cache.roots()
        data = CacheData(
            name=name,
            caches=tuple(self._housekeepers),
            info=await cache.info(),
            public_keys=tuple(str(key) for key in cache.public_keys),
            roots=tuple(roots[after : after + ROOTS_SHOWN]),
            root_total=len(roots),
            after=after,
            following=after + ROOTS_SHOWN if len(roots) > after + ROOTS_SHOWN else 0,
            asked=asked,
            why=await _why(cache, asked) if asked else None,
            demand=await self._wanted(name),
        )
        return html(await self._renderer.page("cache.html", visitor=request[VISITOR], page=data, pin_kind=PIN))

    async def _wanted(self, name: str) -> tuple[DemandView, ...]:
        if name != DEFAULT_CACHE:
            return ()
        wanted = await self._demand.wanted()
        return tuple(self._demand.view(miss) for miss in wanted[:DEMAND_SHOWN])

    async def pin(self, request: web.Request) -> web.StreamResponse:
        """Keep a path under a name."""
        name, cache = self._cache(request)
        form = request[FORM]
        path = checked_path(cache, form.get("path", "").strip())
        await cache.pin(checked_pin(form.get("name", "").strip()), [path])
        return seen_elsewhere(f"/caches/{quote(name)}?path={quote(path, safe='')}")

    async def unpin(self, request: web.Request) -> web.StreamResponse:
        """Forget a pin."""
        name, cache = self._cache(request)
        pin = checked_pin(request[FORM].get("name", ""))
        if not await cache.unpin(pin):
            raise NotFoundError(f"nothing is pinned as {pin} in the cache {name}.")
        return seen_elsewhere(f"/caches/{quote(name)}")

    def _cache(self, request: web.Request) -> tuple[str, Cache]:
        name = request.match_info["cache"]
        found = self._housekeepers.get(name)
        if found is None:
            raise NotFoundError(f"there is no cache {name[:80]!r}; there are {', '.join(self._housekeepers)}.")
        return name, found.cache


async def _why(cache: Cache, asked: str) -> WhyData:
    path = checked_path(cache, asked)
    published = await cache.narinfo(hash_part_of(path)) is not None
    keepers = await cache.why(path)
    shown = [Keeper(each.kind, each.name, each.expires_at, _ends(each.chain)) for each in keepers[:KEEPERS_SHOWN]]
    return WhyData(path, published, tuple(shown), len(keepers))


def _ends(chain: Sequence[str]) -> tuple[str, ...]:
    """Return a chain, the middle of a long one left out."""
    if len(chain) <= CHAIN_SHOWN:
        return tuple(chain)
    half = CHAIN_SHOWN // 2
    return (*chain[:half], f"… {len(chain) - 2 * half} more …", *chain[-half:])


def _position_of(request: web.Request) -> int:
    digits = request.query.get("after", "") or "0"
    if not digits.isascii() or not digits.isdigit() or len(digits) > _DIGITS:
        raise BadRequestError("`after` is the number of rows before the page.")
    return int(digits)
