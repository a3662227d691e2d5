"""Roots, which keep paths from collection: pins, submissions, pushes and leases; and which of them keeps a path.

A root names paths by hash part, published or not, and keeps all that they refer to. A lease is a root with a short
life that its holder renews; it is taken before anything is looked up, so that what was answered stays.

Everything that names a path clears its tombstone and those of all that it refers to, in the same transaction. So
whatever a live root names, now or once it is published, is not tombstoned, and neither is its closure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache.catalog.catalog import Catalog
from infra.cache.catalog.database import chunked, not_expired, paths, reading, refs, root_paths, roots, writing
from infra.cache.catalog.tombstones import revive
from infra.database import insert_or_ignore, names_parameter, names_table
from infra.objects.errors import CacheError

#: The kinds of roots that no size budget ends; leases are not listed.
LEASE = "lease"
PIN = "pin"
ENVIRONMENT = "environment"
UNBUDGETED = (LEASE, PIN, ENVIRONMENT)
MAX_KIND_LENGTH = 32
MAX_NAME_LENGTH = 512
#: Paths that one root may name.
MAX_ROOT_PATHS = 1_000_000
#: Names written by one statement: all of a large root at once would be a hundred megabytes of parameters.
NAMED_AT_ONCE = 1_000
#: Lapsed leases that one transaction removes; each may name as many paths as a large graph has.
LEASES_AT_ONCE = 4
#: Uses closer together than this are one: they order roots for a size budget, and each is a write.
TOUCH_RESOLUTION_S = 600.0
#: `why` looks at this many referrers, and returns this many roots, the nearest first.
MAX_REFERRERS = 100_000
MAX_KEEPERS = 1000


@dataclass(frozen=True, slots=True)
class RootRow:
    """A root. `paths` is how many it names; `used_at` is when it was last kept, or one of them was requested."""

    kind: str
    name: str
    paths: int
    created_at: float
    expires_at: float | None
    used_at: float


@dataclass(frozen=True, slots=True)
class Keeper:
    """A root that keeps a path: `chain` leads from a path that it names to that path, each referring to the next."""

    kind: str
    name: str
    expires_at: float | None
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankedRoot:
    """A root that a size budget may end, unless it was kept again after `kept_at`."""

    id: int
    kind: str
    name: str
    kept_at: float


class Roots:
    """The roots of one cache."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def lease(self, holder: str, store_paths: Iterable[str], ttl_s: float) -> set[str]:
        """See `Cache.lease`."""
        # In a thread: a large submission has some ten thousand paths.
        wanted = await asyncio.to_thread(set, store_paths)
        # Sorted, since rows that lie side by side are written sooner.
        ours = await asyncio.to_thread(lambda: sorted(self._catalog.hash_parts(wanted)))
        hash_parts = _checked(LEASE, holder, ours)
        async with writing(self._catalog.database) as connection:
            now = self._catalog.now()
            # What an expired lease named need not be there any more: it begins anew.
            mine = (roots.c.kind == LEASE) & (roots.c.name == holder)
            await connection.execute(roots.delete().where(mine & ~not_expired(now)))
            before = (await connection.execute(sa.select(roots.c.expires_at).where(mine))).scalar_one_or_none()
            root = await _write(connection, LEASE, holder, now, max(now + ttl_s, before or 0.0))
            await _name(connection, root, hash_parts, only=False)
            await _revive_named(connection, hash_parts)
            rows = await self._catalog.rows(connection, hash_parts)
        return wanted - {row.store_path for row in await self._catalog.intact(rows.values())}

    async def renew(self, holder: str, ttl_s: float) -> bool:
        """See `Cache.renew`."""
        async with writing(self._catalog.database) as connection:
            now = self._catalog.now()
            mine = (roots.c.kind == LEASE) & (roots.c.name == holder) & not_expired(now)
            later = sa.case((roots.c.expires_at > now + ttl_s, roots.c.expires_at), else_=now + ttl_s)
            renewed = await connection.execute(roots.update().where(mine).values(expires_at=later))
        return renewed.rowcount > 0

    async def keep(self, kind: str, name: str, store_paths: Iterable[str], expires_at: float | None) -> None:
        """See `Cache.keep`."""
        wanted = set(store_paths)
        hash_parts = _checked(kind, name, await asyncio.to_thread(self._catalog.hash_parts, wanted))
        if len(hash_parts) != len(wanted):
            raise CacheError(f"the {kind} {name!r} names a path that is not one of this cache's store")
        async with writing(self._catalog.database) as connection:
            root = await _write(connection, kind, name, self._catalog.now(), expires_at)
            await _name(connection, root, hash_parts, only=True)
            await _revive_named(connection, hash_parts)

    async def drop(self, kind: str, name: str) -> bool:
        """See `Cache.drop`."""
        async with writing(self._catalog.database) as connection:
            dropped = await connection.execute(roots.delete().where((roots.c.kind == kind) & (roots.c.name == name)))
        return dropped.rowcount > 0

    async def drop_lapsed_leases(self) -> None:
        """See `Cache.drop_lapsed_leases`."""
        lapsed = sa.select(roots.c.id).where((roots.c.kind == LEASE) & ~not_expired(self._catalog.now()))
        while True:
            async with reading(self._catalog.database) as connection:
                chunk = (await connection.execute(lapsed.limit(LEASES_AT_ONCE))).scalars().all()
            if not chunk:
                return
            async with writing(self._catalog.database) as connection:
                # One may have been taken again meanwhile.
                await connection.execute(
                    roots.delete().where(roots.c.id.in_(chunk) & ~not_expired(self._catalog.now()))
                )

    async def living(self) -> list[RootRow]:
        """See `Cache.roots`."""
        async with reading(self._catalog.database) as connection:
            found = await connection.execute(by_use(self._catalog.now()).where(roots.c.kind != LEASE))
            return [
                RootRow(row.kind, row.name, row.paths, row.created_at, row.expires_at, row.used_at) for row in found
            ]

    async def touch(self, hash_parts: Collection[str]) -> None:
        """See `Cache.touch`."""
        async with writing(self._catalog.database) as connection:
            now = self._catalog.now()
            for chunk in chunked(sorted(hash_parts)):
                stale = paths.c.hash_part.in_(chunk) & (paths.c.last_used_at < now - TOUCH_RESOLUTION_S)
                await connection.execute(paths.update().where(stale).values(last_used_at=now))

    async def why(self, store_path: str) -> list[Keeper]:
        """See `Cache.why`."""
        hash_parts = self._catalog.hash_parts([store_path])
        async with reading(self._catalog.database) as connection:
            rows = await self._catalog.rows(connection, hash_parts)
            if not rows:
                naming = _naming(self._catalog.now()).where(root_paths.c.hash_part.in_(hash_parts)).limit(MAX_KEEPERS)
                found = await connection.execute(naming)
                return [Keeper(row.kind, row.name, row.expires_at, (store_path,)) for row in found]
            (row,) = rows.values()
            return await self._keepers(connection, row.serial)

    async def _keepers(self, connection: AsyncConnection, serial: int) -> list[Keeper]:
        """Go from a path to its referrers, theirs and so on, and name the roots met on the way."""
        #: Serial -> the next one on the shortest way to the path.
        towards = {serial: serial}
        #: Root -> (kind, name, expires_at, the path that it names).
        met: dict[int, tuple[str, str, float | None, int]] = {}
        frontier = [serial]
        while frontier and len(met) < MAX_KEEPERS and len(towards) < MAX_REFERRERS:
            reached: list[int] = []
            for chunk in chunked(frontier):
                naming = _naming(self._catalog.now()).join(paths, paths.c.hash_part == root_paths.c.hash_part)
                question = naming.add_columns(paths.c.serial).where(paths.c.serial.in_(chunk))
                for root in await connection.execute(question):
                    met.setdefault(root.id, (root.kind, root.name, root.expires_at, root.serial))
                edges = sa.select(refs.c.referrer, refs.c.reference).where(refs.c.reference.in_(chunk))
                for referrer, reference in await connection.execute(edges):
                    if referrer not in towards:
                        towards[referrer] = reference
                        reached.append(referrer)
            frontier = reached
        chains = [(*root, _way(towards, root[3])) for root in list(met.values())[:MAX_KEEPERS]]
        names = await _store_paths(connection, {step for *_, way in chains for step in way})
        return [
            Keeper(kind, name, expires_at, tuple(names[step] for step in way if step in names))
            for kind, name, expires_at, _, way in chains
        ]


def by_use(now: float) -> sa.Select[tuple[int, str, str, float, float, float | None, int, float]]:
    """Return the question for live roots: `id kind name created_at kept_at expires_at paths used_at`, last used first.

    A root is used when it is kept, and when a path that it names itself is requested: of what it refers to one cannot
    know for whose sake.
    """
    last_use = sa.func.coalesce(sa.func.max(paths.c.last_used_at), 0.0)
    used_at = sa.case((last_use > roots.c.kept_at, last_use), else_=roots.c.kept_at).label("used_at")
    columns = (roots.c.id, roots.c.kind, roots.c.name, roots.c.created_at, roots.c.kept_at, roots.c.expires_at)
    return (
        sa.select(*columns, sa.func.count(root_paths.c.hash_part).label("paths"), used_at)
        .outerjoin(root_paths, root_paths.c.root == roots.c.id)
        .outerjoin(paths, paths.c.hash_part == root_paths.c.hash_part)
        .where(not_expired(now))
        .group_by(*columns)
        .order_by(used_at.desc(), roots.c.id.desc())
    )


def _naming(now: float) -> sa.Select[tuple[int, str, str, float | None]]:
    columns = (roots.c.id, roots.c.kind, roots.c.name, roots.c.expires_at)
    return (
        sa.select(*columns)
        .join(root_paths, root_paths.c.root == roots.c.id)
        .where(not_expired(now))
        .order_by(roots.c.id)
    )


def _checked(kind: str, name: str, hash_parts: list[str]) -> list[str]:
    if not 0 < len(kind) <= MAX_KIND_LENGTH or not 0 < len(name) <= MAX_NAME_LENGTH:
        raise CacheError(
            f"a root needs a kind of 1 to {MAX_KIND_LENGTH} and a name of 1 to {MAX_NAME_LENGTH} characters"
        )
    if len(hash_parts) > MAX_ROOT_PATHS:
        raise CacheError(f"the {kind} {name!r} names {len(hash_parts)} paths; the limit is {MAX_ROOT_PATHS}")
    return hash_parts


async def _write(connection: AsyncConnection, kind: str, name: str, now: float, expires_at: float | None) -> int:
    """Make a root, or keep it anew; returns its id."""
    same = (roots.c.kind == kind) & (roots.c.name == name)
    kept = roots.update().where(same).values(kept_at=now, expires_at=expires_at).returning(roots.c.id)
    root = (await connection.execute(kept)).scalar_one_or_none()
    if root is None:
        values = {"kind": kind, "name": name, "created_at": now, "kept_at": now, "expires_at": expires_at}
        root = (await connection.execute(roots.insert().values(values).returning(roots.c.id))).scalar_one()
    return int(root)


async def _name(connection: AsyncConnection, root: int, hash_parts: Sequence[str], *, only: bool) -> None:
    """Let a root name these paths too, or `only` these."""
    question = sa.select(root_paths.c.hash_part).where(root_paths.c.root == root)
    named: set[str] = set()
    for chunk in (await connection.execute(question)).scalars().partitions(NAMED_AT_ONCE):
        named.update(chunk)
        await asyncio.sleep(0)
    new = [hash_part for hash_part in hash_parts if hash_part not in named]
    insert = insert_or_ignore(connection, root_paths.name, "root, hash_part")
    for chunk in chunked(new, NAMED_AT_ONCE):
        await connection.exec_driver_sql(insert, [(root, hash_part) for hash_part in chunk])
    if only:
        for chunk in chunked(sorted(named.difference(hash_parts))):
            gone = (root_paths.c.root == root) & root_paths.c.hash_part.in_(chunk)
            await connection.execute(root_paths.delete().where(gone))


async def _revive_named(connection: AsyncConnection, hash_parts: Sequence[str]) -> None:
    wanted = names_table(connection)
    question = sa.select(paths.c.serial).join(wanted, wanted.c.value == paths.c.hash_part)
    dead = question.where(paths.c.tombstoned_at.is_not(None))
    found = (await connection.execute(dead, {"names": names_parameter(hash_parts)})).scalars().all()
    for chunk in chunked(found):
        await revive(connection, chunk)


def _way(towards: dict[int, int], serial: int) -> list[int]:
    way = [serial]
    while towards[way[-1]] != way[-1]:
        way.append(towards[way[-1]])
    return way


async def _store_paths(connection: AsyncConnection, serials: Collection[int]) -> dict[int, str]:
    names: dict[int, str] = {}
    for chunk in chunked(sorted(serials)):
        question = sa.select(paths.c.serial, paths.c.store_path).where(paths.c.serial.in_(chunk))
        names.update((serial, store_path) for serial, store_path in await connection.execute(question))
    return names
