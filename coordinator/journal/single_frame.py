"""One frame of SQLite's journal stored under its epoch, in one trip to the database's thread.

The driver does each call in a thread of its own, and each trip there and back takes the event loop two rounds: a
statement is three or four trips through SQLAlchemy, so that a build's report waited for twelve. PostgreSQL's driver
works in the loop, and needs the row's lock of `Journal.fence`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

if TYPE_CHECKING:
    import aiosqlite

_STATEMENT: Final = """
INSERT INTO journal_frames (seq, facts, crc, body) SELECT :seq, :facts, :crc, :body
WHERE EXISTS (SELECT 1 FROM journal_meta WHERE name = 'epoch' AND value = :epoch) RETURNING seq
"""


async def store_single_frame(connection: AsyncConnection, frame: Mapping[str, Any], epoch: int) -> bool:
    """Store a row of the frames' table in the transaction, unless another epoch has begun; returns whether it did.

    SQLite is locked for writing by then, so that the epoch holds until the commit. Raises `SQLAlchemyError`.
    """
    driver: aiosqlite.Connection = cast("Any", await connection.get_raw_connection()).driver_connection
    try:
        return bool(await driver.execute_fetchall(_STATEMENT, {**frame, "epoch": epoch}))
    except sqlite3.Error as error:
        # As SQLAlchemy does for its own calls. The body is no part of what people read.
        raise DBAPIError.instance(_STATEMENT, None, error, sqlite3.Error) from error
