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


async def revive(connection: AsyncConnection, serials: Sequence[int]) -> set[int]:
    """Clear the tombstones of paths and of all that they refer to; returns whose there were.

    To be called inside a writing transaction, by everything that names a path. Only tombstoned paths are walked
    through: others have no tombstoned references.
    """
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
        found = (await connection.execute(sa.select(reach.c.serial))).scalars().all()
        for part in chunked(found):
            await connection.execute(paths.update().where(paths.c.serial.in_(part)).values(tombstoned_at=None))
        revived.update(found)
    return revived
