"""The derivations that the coordinator has verified, and which of them are recipes of which step.

A row is written only when the derivation's whole input closure is stored and verified, so the reader of a row may
rely on everything below it. Rows never change. A member of a step gets its recipe index (`ordinal`) when it is
first submitted and keeps it for ever: the journal names recipes by that index.

Questions about many names are one query each: the names travel as one JSON array and are joined in SQL, which has no
limit on their number.

The tables lie in SQLite or in PostgreSQL. Every call may be done twice, and is where the database goes away meanwhile
(`infra.database.patiently`).
"""

from __future__ import annotations

import asyncio
from collections import namedtuple
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import orjson
from sqlalchemy import ColumnElement, Select, bindparam, case, func, insert, inspect, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator.errors import CoordinatorError
from coordinator.stores import derivation_tables as tables
from coordinator.stores.derivation_records import (
    ZSTD_HEADER_BYTES,
    Kind,
    Known,
    NewDerivation,
    Node,
    PackedDerivation,
    Stored,
    inflated_size,
    node_of,
    packed,
    pairs,
    unpacked,
)
from coordinator.stores.fresh_orders import FreshOrders
from infra.database import insert_or_ignore, names_parameter, names_table, open_engine, patiently, reason
from infra.database_work import Ask, Prepared, answered
from infra.nix.store_path import base_name_of, drv_name_of
from scheduler.model import StepKey
from scheduler.values import quick

#: Rows of an answer that are made at once, a microsecond each; the loop goes on in between.
ROWS_AT_ONCE = 2_000
#: Page of SQLite: a row has some 2 KiB, and is written in half of the time that it takes with pages of 4 KiB.
PAGE_BYTES: Final = 16_384
#: Nodes kept in memory so that a submission right after its upload asks the database nothing; emptied when full.
MAX_CACHED_NODES = 200_000
#: As many are kept while nothing is submitted; of more none is.
NODES_KEPT_AT_REST: Final = 25_000
#: Steps kept in memory from their order to their publication, some kilobyte each; emptied when full.
MAX_CACHED_INFOS: Final = 4096
#: Bytes of a row that is read together with its size, and bytes inflated of all orders that are given so.
SMALL_ROW_BYTES: Final = 16 * 1024
SMALL_ORDERS_BYTES: Final = 256 * 1024

_Result = TypeVar("_Result")


class DerivationsError(CoordinatorError):
    """The database of derivations cannot be used."""

    code = "derivations"


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """Recipe of a step as a worker builds it: see `workers.wire.messages.LeaseOrder`."""

    #: Full store path of the .drv.
    drv_path: str
    #: The .drv's bytes.
    derivation: bytes
    #: Full store paths: input sources and the chosen outputs of input derivations, sorted.
    inputs: tuple[str, ...]
    #: Full store paths of the outputs, sorted by output name.
    outputs: tuple[str, ...]


@quick
@dataclass(frozen=True, slots=True)
class StepInfo:
    """A step as people see it; taken from its first recipe."""

    key: StepKey
    name: str
    system: str
    features: tuple[str, ...]
    #: Full store path of the .drv.
    drv: str
    #: Output name and full store path, sorted by name.
    outputs: tuple[tuple[str, str], ...]


def step_info(node: Node, store_dir: str) -> StepInfo:
    """Return what people see of the step whose first recipe is `node`."""
    return _info(node.step, node.drv, node.system, node.features, node.outputs, store_dir)


class _RecipeQuestion(NamedTuple):
    """A question about recipes: for many, for few, and its rows."""

    query: Select[Any]
    prepared: Prepared
    row: Callable[..., Any]


class DerivationStore:
    """The tables `derivations` and `members`; one instance on one engine."""

    def __init__(self, engine: AsyncEngine, store_dir: str = "/nix/store") -> None:
        self._engine = engine
        self._store_dir = store_dir
        #: Copies of rows; may be emptied at any time.
        self._nodes: dict[str, Node] = {}
        #: Rows as they were written; may be emptied at any time.
        self._fresh = FreshOrders()
        #: Of steps that were ordered; may be emptied at any time.
        self._infos: dict[StepKey, StepInfo] = {}
        self._wanted = names_table(engine)
        stored = tables.derivations.c
        length = func.length(stored.aterm)
        others = func.length(stored.inputs) + func.length(stored.detail)
        is_small = length + others <= SMALL_ROW_BYTES
        self._whole = self._recipes_query(stored.drv, stored.aterm, stored.inputs, stored.detail)
        self._inputs = self._recipes_query(stored.inputs)
        self._measured = self._recipes_query(
            stored.drv,
            length.label("stored"),
            func.substr(stored.aterm, 1, ZSTD_HEADER_BYTES).label("header"),
            others.label("others"),
            *(case((is_small, column)).label(column.name) for column in (stored.aterm, stored.inputs, stored.detail)),
        )
        self._insert = insert_or_ignore(engine, "derivations", "drv, step, kind, detail, inputs, modulo, aterm")
        self._insert_output = insert_or_ignore(engine, tables.outputs.name, "path, step")
        self._insert_member = insert_or_ignore(engine, "members", "step, ordinal, drv")

    @classmethod
    def open(cls, url: str, store_dir: str = "/nix/store") -> DerivationStore:
        """Return a store on an engine of its own; `close` disposes of it."""
        # A journalled submission must find its derivations after a power cut.
        return cls(open_engine(url, synchronous="FULL", page_bytes=PAGE_BYTES), store_dir)

    async def prepare(self) -> None:
        """Create the tables where they are missing. Raises `DerivationsError`, also for those of a newer release."""
        try:
            # On its own first: a database that must not be touched is not even locked.
            async with self._engine.connect() as connection:
                found = await connection.run_sync(tables.format_of)
                has_outputs = await connection.run_sync(lambda sync: inspect(sync).has_table(tables.outputs.name))
            if found > tables.FORMAT:
                raise DerivationsError(
                    f"the database of derivations was written by a newer version of drover (format {found}, this one "
                    f"reads {tables.FORMAT}); start the newer version. Nothing was changed."
                )
            if found < tables.FORMAT or not has_outputs:
                async with self._engine.begin() as connection:
                    others = [table for table in tables.metadata.sorted_tables if table is not tables.outputs]
                    await connection.run_sync(tables.metadata.create_all, others)
                    if not has_outputs:
                        await connection.run_sync(tables.add_outputs_table, self._insert_output)
                    if found < tables.FORMAT:
                        await connection.execute(insert(tables.meta).values(format=tables.FORMAT))
        except (SQLAlchemyError, OSError) as error:
            raise DerivationsError(f"cannot open the database of derivations: {reason(error)}.") from None

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    async def unknown(self, names: Sequence[str]) -> list[str]:
        """Return those .drv base names that are not stored, in their order. One query."""
        wanted = self._wanted
        query = (
            select(wanted.c.value)
            .outerjoin(tables.derivations, tables.derivations.c.drv == wanted.c.value)
            .where(tables.derivations.c.drv.is_(None))
        )
        rows = await self._answers(query, names)

        def absent() -> list[str]:
            found = {row[0] for row in rows}
            return [name for name in dict.fromkeys(names) if name in found]

        # As all that walks the answer for a whole graph: in a thread.
        return await asyncio.to_thread(absent)

    async def known(self, names: Sequence[str]) -> dict[str, Known]:
        """Return hash modulo, kind and outputs of those .drv base names that are stored. One query."""
        columns = (
            tables.derivations.c.drv,
            tables.derivations.c.modulo,
            tables.derivations.c.kind,
            tables.derivations.c.detail,
        )
        return {
            drv: Known(modulo, Kind(kind), pairs(orjson.loads(detail)[2]))
            for drv, modulo, kind, detail in await self._rows(select(*columns), names)
        }

    async def stored(self, names: Iterable[str]) -> dict[str, Stored]:
        """Return hash modulo and size of those .drv base names that are stored, without reading them. One query."""
        columns = (
            tables.derivations.c.drv,
            tables.derivations.c.modulo,
            func.length(tables.derivations.c.aterm).label("stored"),
            func.substr(tables.derivations.c.aterm, 1, ZSTD_HEADER_BYTES).label("header"),
        )
        rows = await self._rows(select(*columns), names)
        return {row.drv: Stored(row.modulo, inflated_size(row.header, row.stored)) for row in rows}

    async def texts(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of .drv files by base name; all are in memory at once, `stored` says how many."""
        rows = await self._rows(select(tables.derivations.c.drv, tables.derivations.c.aterm), names)
        return await asyncio.to_thread(lambda: {row.drv: unpacked(row.aterm) for row in rows})

    async def nodes(self, names: Sequence[str]) -> dict[str, Node]:
        """Return the nodes of those .drv base names that are stored. At most one query."""
        found, missing = await asyncio.to_thread(self._remembered, names)
        if not missing:
            return found
        columns = (
            tables.derivations.c.drv,
            tables.derivations.c.step,
            tables.derivations.c.kind,
            tables.derivations.c.detail,
        )
        rows = await self._rows(select(*columns), missing)
        fresh = await asyncio.to_thread(lambda: [node_of(*row) for row in rows])
        self._remember(fresh)
        found.update((node.drv, node) for node in fresh)
        return found

    def _remembered(self, names: Sequence[str]) -> tuple[dict[str, Node], list[str]]:
        """Return the nodes that are in memory, and the names of the others."""
        found = {name: node for name in names if (node := self._nodes.get(name)) is not None}
        return found, [name for name in names if name not in found]

    def walk(self, names: Iterable[str], nodes: dict[str, Node], fresh: list[Node]) -> list[str]:
        """Add the nodes at and below `names` that are in memory to `nodes` and `fresh`; return the names of others.

        It ends at what `nodes` has. For a thread: right after an upload it walks the whole graph.
        """
        absent: dict[str, None] = {}
        frontier = list(names)
        while frontier:
            level: list[Node] = []
            for name in frontier:
                node = self._nodes.get(name)
                if node is None:
                    absent[name] = None
                else:
                    nodes[name] = node
                    level.append(node)
            fresh += level
            frontier = list(dict.fromkeys([need for node in level for need in node.needs if need not in nodes]))
        return list(absent)

    async def add(self, batch: Sequence[NewDerivation]) -> None:
        """Store verified derivations in one transaction; those already stored stay as they are."""
        await self.add_packed(await asyncio.to_thread(packed, batch))

    async def add_packed(self, batch: Sequence[PackedDerivation]) -> None:
        """Do the same for those that are packed."""

        async def insert() -> None:
            async with self._engine.begin() as connection:
                for start in range(0, len(batch), tables.INSERT_ROWS):
                    some = batch[start : start + tables.INSERT_ROWS]
                    await connection.exec_driver_sql(self._insert, [each.row for each in some])
                    nodes = (each.node for each in some)
                    outputs = [row for node in nodes for row in tables.output_rows(node.step, node.outputs)]
                    if outputs:
                        await connection.exec_driver_sql(self._insert_output, outputs)

        await _translated(insert)
        self._remember([each.node for each in batch])
        self._fresh.add(batch)

    async def members(self, keys: Sequence[StepKey]) -> dict[StepKey, list[str]]:
        """Return the .drv base names that are recipes of each step, by recipe index. One query."""
        wanted = self._wanted
        query = (
            select(tables.members.c.step, tables.members.c.drv)
            .join(wanted, wanted.c.value == tables.members.c.step)
            .order_by(tables.members.c.step, tables.members.c.ordinal)
        )
        rows = await self._answers(query, keys)

        def by_step() -> dict[StepKey, list[str]]:
            found: dict[StepKey, list[str]] = {}
            for step, drv in rows:
                found.setdefault(StepKey(step), []).append(drv)
            return found

        return await asyncio.to_thread(by_step)

    async def makers(self, paths: Sequence[str]) -> dict[str, str]:
        """Return the .drv base name that is the first recipe of the step which makes each output (full paths).

        Paths that no submitted derivation makes are absent.
        """
        wanted = self._wanted
        query = select(tables.outputs.c.path, tables.outputs.c.step).join(
            wanted, wanted.c.value == tables.outputs.c.path
        )
        steps = {path: StepKey(base_name_of(path)) for path in paths}
        steps.update((path, StepKey(step)) for path, step in await self._answers(query, paths))
        members = await self.members(list(dict.fromkeys(steps.values())))
        return {path: members[step][0] for path, step in steps.items() if step in members}

    async def add_members(self, new: Sequence[tuple[StepKey, int, str]]) -> None:
        """Give recipes (step, index, .drv base name) their places, in one transaction."""
        # In the order of the keys: half of the time, because one page of an index after the other is written.
        rows = await asyncio.to_thread(sorted, new)

        async def insert() -> None:
            async with self._engine.begin() as connection:
                for start in range(0, len(rows), tables.INSERT_ROWS):
                    await connection.exec_driver_sql(self._insert_member, rows[start : start + tables.INSERT_ROWS])

        await _translated(insert)
        self._fresh.place(new)

    async def order_sizes(
        self, wanted: Sequence[tuple[StepKey, int]]
    ) -> tuple[dict[tuple[StepKey, int], int], dict[tuple[StepKey, int], BuildOrder]]:
        """Return the bytes in memory of what `orders` gives for each (step, recipe index), and orders of small ones.

        Unknown pairs are in neither. One query for each index, and nothing large is inflated or read: few bytes in the
        database may be tens of megabytes inflated. Of what is small, SMALL_ORDERS_BYTES in all are given.
        """
        sizes: dict[tuple[StepKey, int], int] = {}
        small: dict[tuple[StepKey, int], BuildOrder] = {}
        left = SMALL_ORDERS_BYTES
        for pair, row in self._fresh_recipes(wanted) or await self._recipes(wanted, self._measured):
            size = sizes[pair] = inflated_size(row.header, row.stored) + row.others
            if row.aterm is not None and size <= left:
                small[pair] = self._order(row)
                left -= size
                if pair[1] == 0:
                    self._remember_info(pair[0], row)
        return sizes, small

    async def orders(self, wanted: Iterable[tuple[StepKey, int]]) -> Mapping[tuple[StepKey, int], BuildOrder]:
        """Return what to send for each (step, recipe index); unknown pairs are absent. One query for each index.

        All are in memory at once: `order_sizes` counts before how many fit.
        """
        rows = await self._recipes(wanted, self._whole)
        # In a thread: one derivation may have tens of megabytes.
        return await asyncio.to_thread(lambda: {pair: self._order(row) for pair, row in rows})

    def _fresh_recipes(self, wanted: Sequence[tuple[StepKey, int]]) -> list[tuple[tuple[StepKey, int], Any]]:
        """Return what `_recipes` gives to `_measured`, of rows that are kept since they were written; all or none."""
        found = []
        for each in self._fresh.take(wanted):
            node, text, others = each.node, each.aterm, len(each.inputs) + len(each.detail)
            measures = len(text), text[:ZSTD_HEADER_BYTES], others
            row = self._measured.row(node.step, node.drv, *measures, text, each.inputs, each.detail)
            found.append(((node.step, 0), row))
        return found

    def _order(self, row: Any) -> BuildOrder:
        """Return the order that a row of `_whole` is."""
        return BuildOrder(
            f"{self._store_dir}/{row.drv}",
            unpacked(row.aterm),
            tuple(orjson.loads(row.inputs)),
            tuple([path for _, path in orjson.loads(row.detail)[2]]),
        )

    def _remember_info(self, step: StepKey, row: Any) -> None:
        """Keep what is asked once its first recipe is built."""
        if len(self._infos) >= MAX_CACHED_INFOS:
            self._infos.clear()
        self._infos[step] = self._info_of(step, row.drv, row.detail)

    def _info_of(self, step: StepKey, drv: str, detail: bytes) -> StepInfo:
        system, features, outputs, *_ = orjson.loads(detail)
        return _info(step, drv, system, tuple(features), pairs(outputs), self._store_dir)

    async def inputs(self, step: StepKey, recipe: int) -> tuple[str, ...]:
        """Return the inputs (full store paths) of a step's recipe, without its derivation; none where it is unknown."""
        for _, row in await self._recipes([(step, recipe)], self._inputs):
            return tuple(await asyncio.to_thread(orjson.loads, row.inputs))
        return ()

    async def steps(self, keys: Sequence[StepKey]) -> Mapping[StepKey, StepInfo]:
        """Return what people want to know of each step; absent are those never submitted. At most one query."""
        if len(keys) <= ROWS_AT_ONCE and all(key in self._infos for key in keys):
            # Of use once: for the publication.
            return {key: self._infos.pop(key) for key in dict.fromkeys(keys)}
        wanted = self._wanted
        query = (
            select(tables.members.c.step, tables.derivations.c.drv, tables.derivations.c.detail)
            .join(wanted, wanted.c.value == tables.members.c.step)
            .join(tables.derivations, tables.derivations.c.drv == tables.members.c.drv)
            .where(tables.members.c.ordinal == 0)
        )
        rows = await self._answers(query, keys)

        def infos() -> dict[StepKey, StepInfo]:
            return {StepKey(step): self._info_of(StepKey(step), drv, detail) for step, drv, detail in rows}

        return await asyncio.to_thread(infos)

    async def _recipes(
        self, wanted: Iterable[tuple[StepKey, int]], question: _RecipeQuestion
    ) -> list[tuple[tuple[StepKey, int], Any]]:
        """Return columns of (step, recipe index) pairs; a step's other recipes may be large and are not read."""
        steps: dict[int, list[StepKey]] = {}
        for step, index in wanted:
            steps.setdefault(index, []).append(step)
        found: list[tuple[tuple[StepKey, int], Any]] = []
        for index, keys in steps.items():
            names = dict.fromkeys(keys)
            rows: Sequence[Any]
            if len(names) <= ROWS_AT_ONCE:
                given = {"names": names_parameter(names), "ordinal": index}
                rows = await _translated(partial(answered, self._engine, Ask(question.prepared, given)))
            else:
                rows = await self._answers(question.query, names, ordinal=index)
            found += [((StepKey(row[0]), index), question.row(*row)) for row in rows]
        return found

    def _recipes_query(self, *columns: ColumnElement[Any]) -> _RecipeQuestion:
        """Return a question about recipes of one index; made once, because making it costs as much as asking it."""
        query = (
            select(tables.members.c.step, *columns)
            .select_from(tables.members)
            .join(self._wanted, self._wanted.c.value == tables.members.c.step)
            .join(tables.derivations, tables.derivations.c.drv == tables.members.c.drv)
            .where(tables.members.c.ordinal == bindparam("ordinal"))
        )
        names = [str(column.key) for column in query.selected_columns]
        return _RecipeQuestion(query, Prepared(lambda _: query), namedtuple("_RecipeRow", names))  # noqa: PYI024 - its fields are the query's

    async def _rows(self, query: Select[Any], names: Iterable[str]) -> Sequence[Any]:
        return await self._answers(query.join(self._wanted, self._wanted.c.value == tables.derivations.c.drv), names)

    async def _answers(self, query: Select[Any], names: Iterable[str], **others: int) -> Sequence[Any]:
        parameters = {"names": names_parameter(names), **others}

        async def ask() -> Sequence[Any]:
            async with self._engine.connect() as connection:
                rows: list[Any] = []
                for some in (await connection.execute(query, parameters)).partitions(ROWS_AT_ONCE):
                    rows += some
                    await asyncio.sleep(0)
            return rows

        return await _translated(ask)

    def rest(self) -> list[object]:
        """Forget nodes where they are many, and return them, to be freed in slices."""
        if len(self._nodes) <= NODES_KEPT_AT_REST:
            return []
        self._fresh.clear()
        # Replaced and not emptied: a thread may walk it.
        nodes, self._nodes = self._nodes, {}
        return list(nodes.values())

    def _remember(self, nodes: Sequence[Node]) -> None:
        if len(self._nodes) + len(nodes) > MAX_CACHED_NODES:
            self._nodes.clear()
        if len(nodes) <= MAX_CACHED_NODES:
            self._nodes.update((node.drv, node) for node in nodes)


def _info(  # noqa: PLR0917 - the fields of what it makes
    key: StepKey,
    drv: str,
    system: str,
    features: tuple[str, ...],
    outputs: tuple[tuple[str, str], ...],
    store_dir: str,
) -> StepInfo:
    return StepInfo(key, drv_name_of(drv), system, features, f"{store_dir}/{drv}", outputs)


async def _translated(call: Callable[[], Awaitable[_Result]]) -> _Result:
    try:
        return await patiently(call, "derivations are read or written")
    except (SQLAlchemyError, OSError) as error:
        raise DerivationsError(f"the database of derivations failed: {reason(error)}.") from error
