"""Sums of a cache's content, for people and for `/metrics`. Queries only, no object is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from infra.cache.catalog.catalog import Catalog
from infra.cache.catalog.database import conflicts, not_expired, paths, reading, realisations, refs, root_paths, roots
from infra.cache.retention.roots import LEASE


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """Sums over one cache. Sizes are bytes.

    Attributes:
        paths: Paths that can be fetched, and `nar_bytes` is their size unpacked.
        tombstoned: Paths that are absent and wait for their deletion.
        file_bytes: Size of all objects that rows name; one that serves several paths counts once.
        saved_bytes: What that saves: each path after the first of an object.
        realisations: In both layouts.
        conflicts: Other bits that were offered for published paths.
        leases: Paths named by live leases.
        roots: Live roots by kind, leases left out.
        dangling: References of fetchable paths to paths that are absent. Anything but 0 is a bug.
    """

    paths: int
    tombstoned: int
    nar_bytes: int
    file_bytes: int
    saved_bytes: int
    realisations: int
    conflicts: int
    leases: int
    roots: Mapping[str, int]
    dangling: int


async def inspect(catalog: Catalog) -> CacheInfo:
    """See `Cache.info`."""
    now = catalog.now()
    visible = paths.c.tombstoned_at.is_(None)
    referrer, reference = paths.alias("referrer"), paths.alias("reference")
    objects = (
        sa.select(sa.func.max(paths.c.file_size).label("size"), sa.func.count().label("uses"))
        .group_by(paths.c.url)
        .subquery()
    )
    dangling = (
        sa.select(sa.func.count())
        .select_from(refs)
        .join(referrer, referrer.c.serial == refs.c.referrer)
        .join(reference, reference.c.serial == refs.c.reference)
        .where(referrer.c.tombstoned_at.is_(None), reference.c.tombstoned_at.is_not(None))
    )
    leases = (
        sa.select(sa.func.count())
        .select_from(root_paths.join(roots, roots.c.id == root_paths.c.root))
        .where(roots.c.kind == LEASE, not_expired(now))
    )
    question = sa.select(
        sa.select(sa.func.count()).select_from(paths).where(visible).scalar_subquery(),
        sa.select(sa.func.count()).select_from(paths).where(~visible).scalar_subquery(),
        sa.select(sa.func.coalesce(sa.func.sum(paths.c.nar_size), 0)).where(visible).scalar_subquery(),
        sa.select(sa.func.coalesce(sa.func.sum(objects.c.size), 0)).scalar_subquery(),
        sa.select(sa.func.coalesce(sa.func.sum(objects.c.size * (objects.c.uses - 1)), 0)).scalar_subquery(),
        sa.select(sa.func.count()).select_from(realisations).scalar_subquery(),
        sa.select(sa.func.count()).select_from(conflicts).scalar_subquery(),
        leases.scalar_subquery(),
        dangling.scalar_subquery(),
    )
    kinds = (
        sa.select(roots.c.kind, sa.func.count()).where(not_expired(now), roots.c.kind != LEASE).group_by(roots.c.kind)
    )
    async with reading(catalog.database) as connection:
        sums = [int(value) for value in (await connection.execute(question)).one()]
        by_kind = {kind: int(count) for kind, count in await connection.execute(kinds)}
    names = ("paths", "tombstoned", "nar_bytes", "file_bytes", "saved_bytes", "realisations", "conflicts", "leases")
    return CacheInfo(**dict(zip(names, sums, strict=False)), roots=by_kind, dangling=sums[-1])
