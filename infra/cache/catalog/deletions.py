"""Objects that are being deleted, and how a publication that comes at the same time stays right.

An object is deleted only if its key is written down here first, in the transaction that makes sure that no row names
it (any more); the entry is marked done after the deletion, and stays for FORGOTTEN_AFTER_S. A publication verifies an
object, which takes its time, and then decides inside its transaction: an object with an entry that is not done, or
that was not done already when verification began, may be gone, and is refused with a reason that a new upload mends.
An object whose entry was done before is a new one with the same bytes. So it does not matter when a deletion happens
between the two, nor in which process, as long as a publication takes less than PUBLISH_WITHIN_S.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache.catalog.database import chunked, conflicts, deletions, paths
from infra.database import names_parameter, names_table_of
from infra.database_work import Ask, Prepared, Work

#: How long a deletion that is done is remembered.
FORGOTTEN_AFTER_S = 86_400.0
#: A publication that takes longer is refused; half of the above, because clocks differ.
PUBLISH_WITHIN_S = 43_200.0


def deleted(urls: Collection[str]) -> Work[dict[str, int | None]]:
    """Return, for objects with an entry, which deletion of the key it was; None while it is not done."""
    rows = (yield Ask(_ENTRIES, {"names": names_parameter(sorted(urls))})) if urls else ()
    return {url: None if done_at is None else serial for serial, url, done_at in rows}


def _entries(dialect: str) -> sa.Select[Any]:
    wanted = names_table_of(dialect)
    columns = (deletions.c.serial, deletions.c.url, deletions.c.done_at)
    return sa.select(*columns).join(wanted, wanted.c.value == deletions.c.url)


#: Entries by key.
_ENTRIES = Prepared(_entries)


def maybe_deleted(before: Mapping[str, int | None], now: Mapping[str, int | None]) -> set[str]:
    """Return the objects that may be gone although they were verified in between the two answers of `deleted`."""
    return {url for url, deletion in now.items() if deletion is None or before.get(url) != deletion}


async def unreferenced_objects(connection: AsyncConnection, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return those objects (with sizes) that no row names and whose deletion is not written down."""
    free = dict(sizes)
    for chunk in chunked(sorted(sizes)):
        named = [sa.select(table.c.url).where(table.c.url.in_(chunk)) for table in (paths, conflicts)]
        waiting = sa.select(deletions.c.url).where(deletions.c.url.in_(chunk), deletions.c.done_at.is_(None))
        for question in (*named, waiting):
            for url in (await connection.execute(question)).scalars():
                free.pop(url, None)
    return free


async def schedule_deletion(connection: AsyncConnection, sizes: Mapping[str, int]) -> dict[str, int]:
    """Write down those objects (with sizes) that nothing names; they may then be deleted. Returns them.

    To be called inside the writing transaction that took away what named them.
    """
    free = await unreferenced_objects(connection, sizes)
    for chunk in chunked(sorted(free)):
        # One that came back after an earlier deletion gets a new entry.
        await connection.execute(deletions.delete().where(deletions.c.url.in_(chunk)))
        await connection.execute(deletions.insert(), [{"url": url, "file_size": free[url]} for url in chunk])
    return free
