"""One frame of SQLite's journal stored under its epoch, in one trip to the database's thread.

The driver does each call in a thread of its own, and each trip there and back takes the event loop two rounds. Through
SQLAlchemy a commit takes two trips and five times the processor. PostgreSQL's driver works in the loop, and needs the
row's lock of `Journal.fence`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncEngine

from infra.sqlite_driver import in_one_trip

_STATEMENT: Final = """
INSERT INTO journal_frames (seq, facts, crc, body) SELECT :seq, :facts, :crc, :body
WHERE EXISTS (SELECT 1 FROM journal_meta WHERE name = 'epoch' AND value = :epoch) RETURNING seq
"""


async def store_single_frame(engine: AsyncEngine, frame: Mapping[str, Any], epoch: int) -> bool:
    """Store a row of the frames' table in a commit of its own, unless another epoch has begun; returns whether it did.

    SQLite is locked for writing by then, so that the epoch holds until the commit. Raises `SQLAlchemyError`.
    """

    def store(sqlite: sqlite3.Connection) -> bool:
        before = sqlite.isolation_level
        # One statement is a transaction by itself: the driver's own BEGIN and COMMIT would each give the interpreter
        # to the event loop and wait for it again.
        sqlite.isolation_level = None
        try:
            return bool(sqlite.execute(_STATEMENT, {**frame, "epoch": epoch}).fetchall())
        finally:
            sqlite.isolation_level = before

    return await in_one_trip(engine, store)
