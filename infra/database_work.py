"""Work on a database as generators of statements, which SQLite does in one trip to its thread.

A transaction of a few statements costs ten trips to the driver's thread, and SQLAlchemy's layers around each take more
of the processor than SQLite itself. So what is done for each build is written as a generator: it yields `Ask`s, gets
their rows, and returns what comes of them. On SQLite the whole of it runs in the driver's thread, on statements that
were compiled once (`in_thread`); elsewhere each statement is awaited (`awaited`). Both do the same: one text for both.

Work may run beside the event loop: it changes nothing that belongs to the loop. What takes long where it is much is
yielded as `Apart`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from infra.sqlite_driver import in_one_trip

#: Items from which on the work on them leaves the event loop.
INLINE_ITEMS: Final = 64
_SQLITE: Final = sqlite_dialect(paramstyle="qmark")

_T = TypeVar("_T")


class Prepared:
    """A statement that is made once for each kind of database: to make and compile one costs more than to ask it.

    `make` gets the name of SQLAlchemy's dialect; `keys` are the columns of an insertion.
    """

    def __init__(self, make: Callable[[str], sa.Executable], keys: Sequence[str] | None = None) -> None:
        self._make = make
        self._keys = keys
        self._made: dict[str, sa.Executable] = {}
        self._text: tuple[str, list[str], dict[str, Any]] | None = None

    def clause(self, dialect: str) -> sa.Executable:
        """Return the statement as SQLAlchemy has it."""
        if dialect not in self._made:
            self._made[dialect] = self._make(dialect)
        return self._made[dialect]

    def text(self) -> tuple[str, list[str], dict[str, Any]]:
        """Return SQLite's text, the names of its marks in order, and values for those that nothing is given for."""
        if self._text is None:
            self._text = _compiled(self.clause(_SQLITE.name), self._keys)
        return self._text


@dataclass(frozen=True, slots=True)
class Ask:
    """One statement, once with some values or once for each of many; its answer is a list of rows."""

    statement: Prepared | sa.Executable
    given: Mapping[str, Any] | Sequence[Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Apart:
    """Work that takes no database; its answer is what `do` returns. In a thread where the items are many."""

    items: int
    do: Callable[[], Any]


Work: TypeAlias = Generator[Ask | Apart, Any, _T]


def in_thread(connection: sqlite3.Connection, work: Work[_T]) -> _T:
    """Do work to its end on the calling thread; what a statement raises is raised here."""
    answer: Any = None
    with closing(work), closing(connection.cursor()) as cursor:
        while True:
            try:
                step = work.send(answer)
            except StopIteration as end:
                result: _T = end.value
                return result
            answer = step.do() if isinstance(step, Apart) else _rows(cursor, step)


async def awaited(connection: AsyncConnection, work: Work[_T]) -> _T:
    """Do work to its end, waiting for each statement."""
    answer: Any = None
    with closing(work):
        while True:
            try:
                step = work.send(answer)
            except StopIteration as end:
                result: _T = end.value
                return result
            if isinstance(step, Apart):
                answer = step.do() if step.items <= INLINE_ITEMS else await asyncio.to_thread(step.do)
                continue
            statement = step.statement
            clause = statement.clause(connection.dialect.name) if isinstance(statement, Prepared) else statement
            found = await connection.execute(clause, step.given or None)
            answer = found.all() if found.returns_rows else []


async def answered(engine: AsyncEngine, ask: Ask) -> list[Any]:
    """Return the rows of one question that reads little; on SQLite in one trip."""

    def work() -> Work[list[Any]]:
        rows: list[Any] = yield ask
        return rows

    if engine.dialect.name == _SQLITE.name:
        return await in_one_trip(engine, lambda sqlite: in_thread(sqlite, work()))
    async with engine.connect() as connection:
        return await awaited(connection, work())


def _rows(cursor: sqlite3.Cursor, ask: Ask) -> list[Any]:
    text, names, values = ask.statement.text() if isinstance(ask.statement, Prepared) else _compiled(ask.statement)
    rows: list[Any] = []
    for given in (ask.given,) if isinstance(ask.given, Mapping) else ask.given:
        cursor.execute(text, [given[name] if name in given else values[name] for name in names])
        rows += cursor.fetchall()
    return rows


def _compiled(clause: Any, keys: Sequence[str] | None = None) -> tuple[str, list[str], dict[str, Any]]:
    compiled = clause.compile(dialect=_SQLITE, column_keys=keys, compile_kwargs={"render_postcompile": True})
    return str(compiled), list(compiled.positiontup or ()), dict(compiled.params)
