"""Outputs that derivations here make, found by the hash part of their path, as a request for a narinfo names them.

The tables are those of `coordinator.stores.derivations`; only submitted derivations count, because only these have a
place among the recipes of a step. Reads only, but for two indexes that are made where they are missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Select, literal_column, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator.stores import derivation_tables as tables
from coordinator.stores.derivations import DerivationsError
from infra.database import names_parameter, names_table, open_engine, patiently, reason
from infra.nix.store_path import HASH_PART_LENGTH, drv_name_of, hash_part_of
from scheduler.model import StepKey


@dataclass(frozen=True, slots=True)
class KnownOutput:
    """A path that the farm knows how to make."""

    #: Full store path.
    path: str
    step: StepKey
    #: Full store path of a .drv that makes it.
    drv: str
    system: str

    @property
    def hash_part(self) -> str:
        """The 32 characters before the name."""
        return hash_part_of(self.path)

    @property
    def name(self) -> str:
        """Name of the derivation."""
        return drv_name_of(self.drv)


class KnownOutputs:
    """Looks outputs up; one instance on one engine."""

    def __init__(self, engine: AsyncEngine, store_dir: str) -> None:
        self._engine = engine
        self._store_dir = store_dir
        self._by_step = f"substr(step, 1, {HASH_PART_LENGTH})"
        self._by_path = f"substr(path, {len(store_dir) + 2}, {HASH_PART_LENGTH})"
        wanted = names_table(engine)
        recipe = (tables.members.c.step == tables.derivations.c.step) & (
            tables.members.c.drv == tables.derivations.c.drv
        )
        columns = (tables.members.c.step, tables.derivations.c.drv, tables.derivations.c.detail)
        hash_of_step: ColumnElement[str] = literal_column(f"substr(members.step, 1, {HASH_PART_LENGTH})")
        self._question: Select[Any] = (
            select(tables.members.c.step.label("output"), *columns)
            .select_from(wanted)
            .join(tables.members, (hash_of_step == wanted.c.value) & (tables.members.c.ordinal == 0))
            .join(tables.derivations, recipe)
        )
        hash_of_path: ColumnElement[str] = literal_column(self._by_path.replace("path", f"{tables.outputs.name}.path"))
        self._other_question: Select[Any] = (
            select(tables.outputs.c.path.label("output"), *columns)
            .select_from(wanted)
            .join(tables.outputs, hash_of_path == wanted.c.value)
            .join(tables.members, (tables.members.c.step == tables.outputs.c.step) & (tables.members.c.ordinal == 0))
            .join(tables.derivations, recipe)
        )

    @classmethod
    def open(cls, url: str, store_dir: str) -> KnownOutputs:
        """Return a store on an engine of its own; `close` disposes of it."""
        return cls(open_engine(url), store_dir)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    async def prepare(self) -> None:
        """Make the indexes where they are missing; the tables are there. Raises `DerivationsError`."""
        indexes = (
            f"CREATE INDEX IF NOT EXISTS members_by_hash_part ON members ({self._by_step})",
            f"CREATE INDEX IF NOT EXISTS derivation_outputs_by_hash_part ON {tables.outputs.name} ({self._by_path})",
        )

        async def make() -> None:
            async with self._engine.begin() as connection:
                for statement in indexes:
                    await connection.execute(text(statement))

        try:
            await patiently(make, "derivations are indexed")
        except (SQLAlchemyError, OSError) as error:
            raise DerivationsError(f"cannot index the database of derivations: {reason(error)}.") from None

    async def find(self, hash_parts: Iterable[str]) -> list[KnownOutput]:
        """Return those of the hash parts that belong to an output of a submitted derivation. Two queries.

        Raises:
            DerivationsError: The database failed.
        """
        parameters = {"names": names_parameter(hash_parts)}

        async def ask() -> list[Any]:
            async with self._engine.connect() as connection:
                found = list(await connection.execute(self._question, parameters))
                return found + list(await connection.execute(self._other_question, parameters))

        try:
            rows = await patiently(ask, "derivations are read")
        except (SQLAlchemyError, OSError) as error:
            raise DerivationsError(f"the database of derivations failed: {reason(error)}.") from error
        return await asyncio.to_thread(lambda: [self._known(row) for row in rows])

    def _known(self, row: Any) -> KnownOutput:
        path = row.output if row.output.startswith("/") else f"{self._store_dir}/{row.output}"
        return KnownOutput(path, StepKey(row.step), f"{self._store_dir}/{row.drv}", orjson.loads(row.detail)[0])
