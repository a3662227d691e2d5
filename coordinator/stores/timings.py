"""Store of timings: what is known of every attempt of every step, in SQLite or PostgreSQL.

One row an attempt, keyed by step and attempt. Writing is an upsert that overwrites nothing by ignorance: a column that
a writer does not know (None) keeps what it has, so that rows may be written again, in parts, and after a restart.

Timings explain the farm and decide nothing. Whatever goes wrong here is one `TimingsError`; callers count what is lost
and go on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Literal

import orjson
from sqlalchemy import (
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    func,
    insert,
    inspect,
    or_,
    select,
    text,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator.errors import CoordinatorError
from infra.database import names_parameter, names_table, open_engine, reason
from infra.nix.store_path import package_of

#: What this version writes. 2: indexes for windows of time. 3: seconds of fetching and sending, and features.
FORMAT: Final = 3
#: Attempts that take longer have an index of their own, so that a window of time need not look far back for them.
LONG_S: Final = 3600.0
#: Rows that one statement deletes: readers and the writer get their turn in between.
DELETE_ROWS: Final = 2_000
#: Characters of a failure's message that are kept; the log and the journal have all.
MESSAGE_CHARACTERS: Final = 500
#: Submissions that an attempt names.
MAX_WANTED_BY: Final = 16
#: How long a writer of SQLite waits for another one: readers of a history wait as long.
BUSY_TIMEOUT_MS: Final = 1_000
#: Outcomes that say something of a worker: a build that was handed back or stopped does not.
JUDGED: Final = ("done", "failed", "retried", "lost")

Outcome = Literal["done", "failed", "retried", "lost", "returned", "moved", "cancelled"]


class TimingsError(CoordinatorError):
    """The database of timings cannot be used; `values` if it refuses what it was given, however often that is."""

    code = "timings"
    status = 503

    def __init__(self, message: str, *, values: bool = False) -> None:
        super().__init__(message)
        self.values = values


@dataclass(slots=True)
class Measured:
    """Measurements of an attempt by its agent, in the coordinator's time. Stretches are (name, at, seconds)."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    more_phases: int = 0
    more_phases_s: float = 0.0
    #: (line of the log from 1, phase that begins there), in the order of the log.
    landmarks: list[tuple[int, str]] = field(default_factory=list)
    #: (path, source, bytes of its NAR, at, seconds, whether another attempt had begun to fetch it).
    fetches: list[tuple[str, str, int, float, float, bool]] = field(default_factory=list)
    more_fetches: int = 0
    more_fetches_bytes: int = 0
    #: The worker was lost: these are what it had sent until then, closed at the end of the lease.
    cut: bool = False
    #: The span that the order named, which is in the worker's log; "" from an older worker.
    traceparent: str = ""


@dataclass(slots=True)
class AttemptTiming:
    """One attempt of one step. Times are the coordinator's, Unix seconds; None is not known."""

    step: str
    attempt: int
    #: Index of the step's recipe.
    recipe: int | None = None
    #: Of the step's derivation, with and without its version.
    name: str | None = None
    package: str | None = None
    system: str | None = None
    worker: str | None = None
    #: That the recipe asks for, sorted and joined by commas; "" for none.
    features: str | None = None
    #: Class of the isolation that it was built in.
    isolation: str | None = None
    submitted_at: float | None = None
    ready_at: float | None = None
    leased_at: float | None = None
    #: The report of a success arrived.
    built_at: float | None = None
    verify_at: float | None = None
    verify_s: float | None = None
    publish_s: float | None = None
    ended_at: float | None = None
    #: None while it runs.
    outcome: Outcome | None = None
    #: Of a failure, see `scheduler.model.FailureKind`.
    reason: str | None = None
    message: str | None = None
    build_s: float | None = None
    #: Fetching inputs, and packing and sending outputs, as the attempt waited for it.
    inputs_s: float | None = None
    upload_s: float | None = None
    cpu_s: float | None = None
    peak_memory_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    #: NARs of inputs that this attempt fetched; of outputs unpacked, and as they were sent.
    fetched_bytes: int | None = None
    output_bytes: int | None = None
    uploaded_bytes: int | None = None
    #: Ids of the submissions that wanted it when it ended, the oldest first, joined by commas; the first MAX_WANTED_BY.
    wanted_by: str | None = None
    measured: Measured | None = None


@dataclass(frozen=True, slots=True)
class AttemptEnds:
    """Ended attempts of one recipe of one step that ended alike."""

    step: str
    recipe: int | None
    outcome: str
    reason: str | None
    count: int
    #: When the first and the last of them ended, and the highest number among them.
    first_at: float
    last_at: float
    last_attempt: int


#: Columns by the type of the field; keys and `measured` stand apart.
_FLOATS: Final = frozenset(name for name, _ in AttemptTiming.__annotations__.items() if name.endswith(("_at", "_s")))
_TEXTS: Final = frozenset(
    {"name", "package", "system", "worker", "features", "isolation", "outcome", "reason", "message", "wanted_by"}
)
_COLUMNS: Final = tuple(each.name for each in fields(AttemptTiming))
_MEASURED: Final = _COLUMNS.index("measured")
_in_order: Final = attrgetter(*_COLUMNS)

metadata = MetaData()
attempts = Table(
    "attempt_timings",
    metadata,
    Column("step", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    *(
        Column(name, LargeBinary if name == "measured" else Text if name in _TEXTS else Double)
        for name in _COLUMNS
        if name not in {"step", "attempt"}
    ),
    Index("attempt_timings_package", "package", "ended_at"),
    Index("attempt_timings_ended", "ended_at"),
    # All that an overview of a window of time reads.
    Index("attempt_timings_window", "leased_at", "ended_at", "worker", "outcome", "wanted_by"),
)
#: The condition of the index of long attempts, as queries must repeat it.
IS_LONG: Final = text(f"ended_at - leased_at > {LONG_S}")
Index("attempt_timings_long", attempts.c.ended_at, sqlite_where=IS_LONG, postgresql_where=IS_LONG)
meta = Table("timings_meta", metadata, Column("format", Integer, primary_key=True, autoincrement=False))
_WHOLE: Final = frozenset(name for name in _COLUMNS if name not in _TEXTS | _FLOATS | {"step", "measured"})


class TimingStore:
    """The table of attempts. Every method raises `TimingsError` where the database fails."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._wanted = names_table(engine)
        self._upsert = _upsert(engine)
        #: The file of SQLite, and which one it was when it was prepared: one that is removed can still be written to.
        self._file = engine.url.database if engine.dialect.name == "sqlite" else None
        self._prepared: tuple[int, int] | None = None
        #: Attempts that were in files which were removed, and of these those that may come back with their file.
        self.removed = 0
        self._out_of_place = 0
        #: What its writer found wrong with it, "" while all is well: what is read then may lack the newest attempts.
        self.trouble = ""

    @classmethod
    def open(cls, url: str) -> TimingStore:
        """Return a store on an engine of its own; `close` disposes of it."""
        return cls(open_engine(url, busy_ms=BUSY_TIMEOUT_MS))

    async def prepare(self) -> None:
        """Create the tables where they are missing; those of a newer release are refused and not touched."""
        if not self._in_place:
            await self._let_go()
        try:
            async with self._engine.connect() as connection:
                found = await connection.run_sync(_format_of)
            if found > FORMAT:
                raise TimingsError(
                    f"the database of timings was written by a newer version of drover (format {found}, this one reads "
                    f"{FORMAT}); timings are not kept until the newer version runs. Nothing was changed."
                )
            if found < FORMAT:
                async with self._engine.begin() as connection:
                    await connection.run_sync(_create)
                    await connection.execute(insert(meta).values(format=FORMAT))
        except (SQLAlchemyError, OSError) as error:
            raise _failed(error) from None
        # A file that is put back has what it had.
        self.removed += 0 if found else self._out_of_place
        self._out_of_place = 0
        self._prepared = _identity(self._file)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    async def save(self, rows: Sequence[AttemptTiming]) -> None:
        """Write rows, in one transaction; what a row does not know stays as it is."""
        self._require_in_place()
        try:
            async with self._engine.begin() as connection:
                await connection.exec_driver_sql(self._upsert, [_values(row) for row in rows])
        except (SQLAlchemyError, OSError, ValueError, TypeError, OverflowError) as error:
            # The last three are values that cannot be stored: lost, but no reason to end a farm.
            raise _failed(error) from None

    async def of_steps(self, steps: Iterable[str]) -> list[AttemptTiming]:
        """Return all attempts of steps, by step and attempt."""
        query = (
            select(attempts)
            .join(self._wanted, self._wanted.c.value == attempts.c.step)
            .order_by(attempts.c.step, attempts.c.attempt)
        )
        return await self._rows(query, {"names": names_parameter(steps)})

    async def of_package(self, name: str, system: str, limit: int) -> list[AttemptTiming]:
        """Return the newest ended attempts of a package, by its name with or without version; "" is any system."""
        package = package_of(name)
        query = (
            select(attempts)
            .where(attempts.c.package == package, attempts.c.ended_at.is_not(None))
            .order_by(attempts.c.ended_at.desc())
            .limit(limit)
        )
        if package != name:
            query = query.where(attempts.c.name == name)
        return await self._rows(query.where(attempts.c.system == system) if system else query, {})

    async def ends_of(self, steps: Iterable[str]) -> list[AttemptEnds]:
        """Return how the attempts of steps ended, counted by recipe, outcome and reason."""
        columns = (attempts.c.step, attempts.c.recipe, attempts.c.outcome, attempts.c.reason)
        at = attempts.c.ended_at
        query = (
            select(*columns, func.count(), func.min(at), func.max(at), func.max(attempts.c.attempt))
            .join(self._wanted, self._wanted.c.value == attempts.c.step)
            .where(attempts.c.outcome.is_not(None), at.is_not(None))
            .group_by(*columns)
        )
        rows = await self.answers(query, {"names": names_parameter(steps)})
        return [AttemptEnds(step, _index(recipe), *others) for step, recipe, *others in rows]

    async def last_verdicts(
        self, package: str, system: str, step: str, before: float | None, limit: int
    ) -> list[AttemptTiming]:
        """Return the newest attempts of a package that were done or failed for good, without those of one step.

        `before` is the latest time of their end, None for any. They hold step, attempt, recipe, end and outcome alone.
        """
        columns = (attempts.c.step, attempts.c.attempt, attempts.c.recipe, attempts.c.ended_at, attempts.c.outcome)
        query = (
            select(*columns)
            .where(
                attempts.c.package == package,
                attempts.c.system == system,
                attempts.c.step != step,
                attempts.c.outcome.in_(("done", "failed")),
                attempts.c.ended_at.is_not(None) if before is None else attempts.c.ended_at <= before,
            )
            .order_by(attempts.c.ended_at.desc())
            .limit(limit)
        )
        return [AttemptTiming(**row._mapping) for row in await self.answers(query, {})]  # noqa: SLF001 - SQLAlchemy's public name for it

    async def usual_builds(self, packages: Sequence[tuple[str, str]], limit: int) -> dict[tuple[str, str], list[float]]:
        """Return the seconds that the newest successful builds of some packages (name, system) took, in one query."""
        costs = await self.usual_costs(packages, limit)
        return {package: [build_s for build_s, _ in its] for package, its in costs.items()}

    async def usual_costs(
        self, packages: Sequence[tuple[str, str]], limit: int
    ) -> dict[tuple[str, str], list[tuple[float, float | None]]]:
        """Return the seconds of `usual_builds`, each with those of processors where they were measured."""
        mark = "?" if self._engine.dialect.name == "sqlite" else "%s"
        each = (
            f"SELECT * FROM (SELECT {number} AS number, build_s, cpu_s FROM {attempts.name} "  # noqa: S608
            f"WHERE package = {mark} AND system = {mark} AND outcome = 'done' AND build_s IS NOT NULL "
            f"ORDER BY ended_at DESC LIMIT {int(limit)}) AS builds_{number}"
            for number in range(len(packages))
        )
        query, values = " UNION ALL ".join(each), tuple(part for package in packages for part in package)
        found: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
        try:
            async with self._engine.connect() as connection:
                rows: Sequence[Any] = (await connection.exec_driver_sql(query, values)).all()
        except (SQLAlchemyError, OSError, ValueError, UnicodeError) as error:
            raise _failed(error) from None
        for number, build_s, cpu_s in rows:
            found.setdefault(packages[number], []).append((build_s, cpu_s))
        return found

    async def ended_between(self, since: float, until: float, every_s: float) -> list[tuple[int, str, int]]:
        """Count the attempts that ended in each stretch of `every_s` from `since` on: (stretch, outcome, attempts)."""
        elapsed = (attempts.c.ended_at - since) / every_s
        # A cast rounds in one database and cuts in the other.
        stretch = cast(elapsed if self._engine.dialect.name == "sqlite" else func.floor(elapsed), Integer)
        query = (
            select(stretch.label("stretch"), attempts.c.outcome, func.count())
            .where(attempts.c.ended_at >= since, attempts.c.ended_at < until, attempts.c.outcome.is_not(None))
            .group_by("stretch", attempts.c.outcome)
        )
        return [(int(row[0]), row[1], row[2]) for row in await self.answers(query, {})]

    async def drop(self, before: float, most: int) -> int:
        """Delete attempts leased before a time, then the oldest beyond `most` rows; returns how many.

        At most `DELETE_ROWS` go: the caller calls again while there are that many. 0 for `most` is no limit.
        """
        try:
            async with self._engine.begin() as connection:
                count = (await connection.execute(select(func.count()).select_from(attempts))).scalar_one()
                beyond = max(0, count - most) if most else 0
                oldest = select(attempts.c.step, attempts.c.attempt).order_by(attempts.c.leased_at)
                due = oldest.where(or_(attempts.c.leased_at < before, attempts.c.ended_at < before))
                chosen = (await connection.execute(due.limit(DELETE_ROWS))).all()
                if not chosen and beyond:
                    chosen = (await connection.execute(oldest.limit(min(beyond, DELETE_ROWS)))).all()
                if chosen:
                    row = (attempts.c.step == bindparam("b_step")) & (attempts.c.attempt == bindparam("b_attempt"))
                    keys = [{"b_step": step, "b_attempt": attempt} for step, attempt in chosen]
                    await connection.execute(delete(attempts).where(row), keys)
                return len(chosen)
        except (SQLAlchemyError, OSError) as error:
            raise _failed(error) from None

    @property
    def dialect(self) -> str:
        """Name of the database's kind: `sqlite` or `postgresql`."""
        return self._engine.dialect.name

    @property
    def _in_place(self) -> bool:
        """True unless the file that was prepared is no longer where it was."""
        return self._prepared is None or _identity(self._file) == self._prepared

    def _require_in_place(self) -> None:
        if not self._in_place:
            raise TimingsError(f"the database of timings failed: its file {self._file} was removed or replaced.")

    async def _let_go(self) -> None:
        """Count what a removed file held, as far as it can still be read, and close it."""
        try:
            async with self._engine.connect() as connection:
                self._out_of_place = (await connection.execute(select(func.count()).select_from(attempts))).scalar_one()
        except (SQLAlchemyError, OSError):
            pass  # what cannot be read cannot be counted
        await self._engine.dispose()
        self._prepared = None

    async def _rows(self, query: Any, parameters: dict[str, object]) -> list[AttemptTiming]:
        return [_timing(row) for row in await self.answers(query, parameters)]

    async def answers(self, query: Any, parameters: Mapping[str, object] | None = None) -> Sequence[Any]:
        """Return the rows of a query of this package's modules."""
        self._require_in_place()
        try:
            async with self._engine.connect() as connection:
                return (await connection.execute(query, parameters or {})).all()
        except (SQLAlchemyError, OSError) as error:
            raise _failed(error) from None

    async def answers_in_pieces(self, query: Any, rows: int) -> AsyncGenerator[Sequence[Any]]:
        """Yield the rows of a query that has very many, so many at a time: each costs the event loop some 2 us."""
        self._require_in_place()
        try:
            async with self._engine.connect() as connection, connection.stream(query) as result:
                async for piece in result.partitions(rows):
                    yield piece
        except (SQLAlchemyError, OSError) as error:
            raise _failed(error) from None


def _failed(error: BaseException) -> TimingsError:
    # A statement that never came to the database has values that its driver cannot send.
    unsent = isinstance(error, StatementError) and not isinstance(error, DBAPIError)
    refused = isinstance(error, (ValueError, TypeError, OverflowError, DataError, IntegrityError))
    return TimingsError(f"the database of timings failed: {reason(error)}.", values=unsent or refused)


def _identity(file: str | None) -> tuple[int, int] | None:
    """Return device and number of a file; None where there is none."""
    try:
        found = Path(file).stat() if file else None
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found is not None else None


def _create(connection: Connection) -> None:
    """Create what is missing; tables of format 1 have other indexes, those of format 2 lack columns."""
    metadata.create_all(connection)
    present = {column["name"] for column in inspect(connection).get_columns(attempts.name)}
    for column in attempts.columns:
        if column.name not in present:
            kind = column.type.compile(connection.dialect)
            connection.execute(text(f"ALTER TABLE {attempts.name} ADD COLUMN {column.name} {kind}"))
    connection.execute(text("DROP INDEX IF EXISTS attempt_timings_leased"))
    for index in attempts.indexes:
        index.create(connection, checkfirst=True)


def _format_of(connection: Connection) -> int:
    if not inspect(connection).has_table(meta.name):
        return 0
    return connection.execute(select(func.max(meta.c.format))).scalar_one() or 0


def _upsert(engine: AsyncEngine) -> str:
    mark = "?" if engine.dialect.name == "sqlite" else "%s"
    known = ", ".join(
        f"{name} = COALESCE(excluded.{name}, {attempts.name}.{name})"
        for name in _COLUMNS
        if name not in {"step", "attempt"}
    )
    marks = ", ".join(mark for _ in _COLUMNS)
    return (  # constants only
        f"INSERT INTO {attempts.name} ({', '.join(_COLUMNS)}) VALUES ({marks}) "  # noqa: S608
        f"ON CONFLICT (step, attempt) DO UPDATE SET {known}"
    )


def _index(value: float | None) -> int | None:
    return None if value is None else int(value)


def _values(row: AttemptTiming) -> tuple[object, ...]:
    """Values in the order of the columns."""
    values: tuple[object, ...] = _in_order(row)
    if row.measured is None:
        return values
    return (*values[:_MEASURED], orjson.dumps(row.measured), *values[_MEASURED + 1 :])


def _timing(row: Any) -> AttemptTiming:
    values: dict[str, Any] = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
    measured = values.pop("measured")
    for name in _WHOLE:
        if values[name] is not None:
            values[name] = int(values[name])
    timing = AttemptTiming(**values)
    if measured is not None:
        stretches = orjson.loads(measured)
        for name in ("spans", "phases", "fetches", "landmarks"):
            # Absent from what an older version wrote.
            stretches[name] = [tuple(each) for each in stretches.get(name, ())]
        timing.measured = Measured(**stretches)
    return timing
