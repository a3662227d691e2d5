"""Tables of the journal and their format: created, checked, brought up to date.

The modules of this package share these tables; a change of them is a new `FORMAT`.
"""

from __future__ import annotations

import secrets
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Column, Integer, LargeBinary, MetaData, String, Table, insert, inspect, select
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.journal.errors import JournalError

#: What this version writes. 1 had no snapshots and no epoch, 2 a whole note for each submission, 3 no growing ones; all
#: are brought up to date when they are opened.
FORMAT: Final = 4
_FIRST_WITH_EPOCH: Final = 2

#: SQLite stores any integer in an INTEGER; PostgreSQL's has 32 bits, which a CRC without sign does not fit into.
_Big = sa.BigInteger().with_variant(Integer(), "sqlite")

metadata = MetaData()
meta = Table(
    "journal_meta",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", Integer, nullable=False),
)
frames = Table(
    "journal_frames",
    metadata,
    Column("seq", _Big, primary_key=True, autoincrement=False),
    Column("facts", Integer, nullable=False),
    Column("crc", _Big, nullable=False),
    Column("body", LargeBinary, nullable=False),
)
notes = Table(
    "journal_notes",
    metadata,
    Column("submission", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
#: What notes of several submissions may have in common, stored once.
shared = Table(
    "journal_shared_notes",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
shares = Table(
    "journal_note_shares",
    metadata,
    Column("submission", String(64), primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
)
#: What notes of open submissions have grown by, in order; part of their note itself once they are sealed.
growths = Table(
    "journal_note_growths",
    metadata,
    Column("submission", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
)
snapshots = Table(
    "journal_snapshots",
    metadata,
    Column("snapshot", String(32), primary_key=True),
    #: The last frame that it stands for.
    Column("seq", _Big, nullable=False),
    Column("parts", Integer, nullable=False),
)
parts = Table(
    "journal_snapshot_parts",
    metadata,
    Column("snapshot", String(32), primary_key=True),
    Column("part", Integer, primary_key=True, autoincrement=False),
    #: 0: facts of the core, 1: records of the read model; all facts come first.
    Column("kind", Integer, nullable=False),
    Column("items", Integer, nullable=False),
    Column("crc", _Big, nullable=False),
    Column("body", LargeBinary, nullable=False),
)


def check_format(connection: Connection) -> int | None:
    """Return the format of the journal that is there, None if there is none. Raises `JournalError`."""
    if not inspect(connection).has_table(meta.name):
        return None
    value = connection.execute(select(meta.c.value).where(meta.c.name == "facts_version")).scalar_one_or_none()
    if value is None:
        raise JournalError("the journal does not say its version; restore the database from a backup.")
    if value > FORMAT:
        raise JournalError(
            f"the journal was written by a newer version of drover (format {value}, this one reads {FORMAT}); "
            "start the newer version. Nothing was changed."
        )
    return int(value)


def bring_up_to_date(connection: Connection) -> None:
    """Create what is missing and write down the format. Raises `JournalError` for a newer one."""
    found = check_format(connection)
    if found == FORMAT:
        return
    metadata.create_all(connection)
    if found is None:
        connection.execute(insert(meta).values(name="facts_version", value=FORMAT))
    else:
        connection.execute(sa.update(meta).where(meta.c.name == "facts_version").values(value=FORMAT))
    if found is None or found < _FIRST_WITH_EPOCH:
        connection.execute(insert(meta).values(name="epoch", value=0))


async def identity(connection: AsyncConnection) -> int:
    """Return the journal's number, drawn if it has none. The caller has just raised the epoch, which locks the row."""
    query = select(meta.c.value).where(meta.c.name == "identity")
    found: int | None = (await connection.execute(query)).scalar_one_or_none()
    if found is None:
        found = secrets.randbelow(2**31 - 1) + 1
        await connection.execute(insert(meta).values(name="identity", value=found))
    return found
