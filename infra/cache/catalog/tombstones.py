"""Tombstones: marks of paths that no root reaches. Readers treat these as absent; the collector deletes them later.

The rule is that what is not tombstoned refers only to what is not tombstoned; with it, whatever is answered can be
fetched with all that it refers to. Setting tombstones keeps it by looking at the referrers inside the transaction
(`collector`), clearing them by going on to the references (`revive`).
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache.catalog.database import chunked, paths, refs
from infra.database_work import Ask, Work, awaited


async def revive(connection: AsyncConnection, serials: Sequence[int]) -> set[int]:
    """Clear the tombstones of paths and of all that they refer to; returns whose there were.

    To be called inside a writing transaction, by everything that names a path. Only tombstoned paths are walked
    through: others have no tombstoned references.
    """
    return await awaited(connection, reviving(serials))


def reviving(serials: Sequence[int]) -> Work[set[int]]:
    """Do the work of `revive`."""
    revived: set[int] = set()
    dead = paths.c.tombstoned_at.is_not(None)
    for chunk in chunked(serials):
        reach = sa.select(paths.c.serial).where(paths.c.serial.in_(chunk), dead).cte("reach", recursive=True)
        reach = reach.union(
            sa.select(paths.c.serial)
            .join(refs, refs.c.reference == paths.c.serial)
            .join(reach, refs.c.referrer == reach.c.serial)
            .where(dead)
        )
        found = [serial for (serial,) in (yield Ask(sa.select(reach.c.serial)))]
        for part in chunked(found):
            yield Ask(paths.update().where(paths.c.serial.in_(part)).values(tombstoned_at=None))
        revived.update(found)
    return revived
