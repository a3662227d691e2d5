"""Tables of derivations, their recipes and outputs, and the format that they have.

Databases from before outputs were stored get that table, filled from the derivations that are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import orjson
from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, Text, UniqueConstraint, func, inspect, select
from sqlalchemy.engine import Connection

#: What this version writes. Databases from before it was written down are of format 1 too.
FORMAT: Final = 1
#: Rows of one executemany; keeps the driver's thread from holding megabytes of parameters twice.
INSERT_ROWS = 5_000

metadata = MetaData()
derivations = Table(
    "derivations",
    metadata,
    Column("drv", Text, primary_key=True),
    Column("step", Text, nullable=False),
    Column("kind", Integer, nullable=False),
    #: JSON: system, features, outputs, needs, sources; what is always read together is one value.
    Column("detail", LargeBinary, nullable=False),
    Column("inputs", LargeBinary, nullable=False),
    Column("modulo", LargeBinary, nullable=False),
    #: zstd where that pays; its first bytes distinguish it from an ATerm.
    Column("aterm", LargeBinary, nullable=False),
)
members = Table(
    "members",
    metadata,
    Column("step", Text, primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("drv", Text, nullable=False),
    UniqueConstraint("step", "drv"),
)
#: Steps of those outputs that do not name their step; databases from before it lack the table.
outputs = Table(
    "derivation_outputs",
    metadata,
    #: Full store path.
    Column("path", Text, primary_key=True),
    Column("step", Text, nullable=False),
)
meta = Table("derivations_meta", metadata, Column("format", Integer, primary_key=True, autoincrement=False))


def format_of(connection: Connection) -> int:
    """Return the format of the tables that are there, 0 where they do not say one."""
    if not inspect(connection).has_table(meta.name):
        return 0
    return connection.execute(select(func.max(meta.c.format))).scalar_one() or 0


def add_outputs_table(connection: Connection, insert_output: str) -> None:
    """Make the table of outputs and fill it from the derivations that are there."""
    outputs.create(connection)
    query = select(derivations.c.drv, derivations.c.step, derivations.c.detail).order_by(derivations.c.drv)
    last = ""
    while rows := connection.execute(query.where(derivations.c.drv > last).limit(INSERT_ROWS)).all():
        unnamed = [row for _, step, detail in rows for row in output_rows(step, orjson.loads(detail)[2])]
        if unnamed:
            connection.exec_driver_sql(insert_output, unnamed)
        last = rows[-1].drv


def output_rows(step: str, outputs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the rows of `outputs` for those outputs that do not name the step."""
    named = f"/{step}"
    return [(path, step) for _, path in outputs if not path.endswith(named)]
