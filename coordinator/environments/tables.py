"""Tables of tracked environments, and the format that they have."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Double, Integer, LargeBinary, MetaData, Table, Text, func, inspect, select
from sqlalchemy.engine import Connection

#: What this version writes.
FORMAT: Final = 2

metadata = MetaData()
environments = Table(
    "environments",
    metadata,
    Column("name", Text, primary_key=True),
    #: JSON of `Environment`.
    Column("body", LargeBinary, nullable=False),
)
revisions = Table(
    "environment_revisions",
    metadata,
    Column("environment", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    #: JSON of `EnvironmentRevision`, which lists show, and zstd of the JSON of `WishList`, which few questions need.
    Column("body", LargeBinary, nullable=False),
    Column("content", LargeBinary, nullable=False),
)
pointers = Table(
    "environment_pointers",
    metadata,
    Column("environment", Text, primary_key=True),
    Column("system", Text, primary_key=True),
    #: JSON of `SystemPointer`.
    Column("body", LargeBinary, nullable=False),
)
#: The last assessment of each environment: one row, which the next one replaces.
assessments = Table(
    "environment_assessments",
    metadata,
    Column("environment", Text, primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("at", Double, nullable=False),
    #: zstd of JSON: coverage of each system, gaps.
    Column("body", LargeBinary, nullable=False),
)
#: One row for each day and system; days are counted from 1970-01-01.
trend = Table(
    "environment_trend",
    metadata,
    Column("environment", Text, primary_key=True),
    Column("system", Text, primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("here", Integer, nullable=False),
    Column("upstream", Integer, nullable=False),
    Column("local", Integer, nullable=False),
    Column("impossible", Integer, nullable=False),
)
meta = Table("environments_meta", metadata, Column("format", Integer, primary_key=True, autoincrement=False))
#: One row: which coordinator may write (`FencingToken`).
reign = Table(
    "environments_reign",
    metadata,
    Column("journal", BigInteger, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
)

#: Those with rows of one environment, whose column is `environment`.
OF_ENVIRONMENT: Final = (revisions, pointers, assessments, trend)


def format_of(connection: Connection) -> int:
    """Return the format of the tables that are there, 0 without any."""
    if not inspect(connection).has_table(meta.name):
        return 0
    return connection.execute(select(func.max(meta.c.format))).scalar_one() or 0
