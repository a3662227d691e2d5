"""Catalog of published paths: rows, whether their objects are there, and a small memory of hot ones.

A path can be fetched if it has a row, no tombstone, and an object. Where objects are files, a file that is gone or has
another size makes the path absent everywhere. (Of remote stores the database is believed: a request for each narinfo
would cost a round trip.) An object is answered as long as any row names it, tombstoned or not: who read the narinfo
before the tombstone may still come for the NAR, which is what the grace before deletion is for.

Rows of hot paths are remembered for RECENT_S. Who tombstones or deletes calls `forget` afterwards, and a row that was
read before that is not remembered; so a narinfo that this process made absent stays absent. What another process
changed is noticed after RECENT_S, much less than any grace.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.cache.catalog.database import Database, chunked, conflicts, paths, reading, refs
from infra.cache.errors import ClosureTooLargeError
from infra.database import names_parameter, names_table_of
from infra.database_work import INLINE_ITEMS, Apart, Ask, Prepared, Work
from infra.nix.narinfo import rendered_references
from infra.nix.store_path import HASH_PART_LENGTH, StoreDir, base_name_of, hash_part_of
from infra.objects.store import LocalObjectStore, ObjectStore

#: Narinfos kept in memory, some 1 KiB each, and for how long one is believed.
NARINFOS_IN_MEMORY = 8192
RECENT_S = 900.0
#: Paths of a closure that is answered from memory: a look at the file of each takes some us of the event loop.
CLOSURE_IN_MEMORY = 64
#: Paths of one closure, in the question and in the answer.
MAX_CLOSURE = 100_000
#: Paths whose use is remembered until it is written down.
USED_IN_MEMORY = 50_000
#: Paths that are looked at without leaving the event loop; about 2 us each, and some more for a file.
LOOK_INLINE = INLINE_ITEMS
#: Rows that are read together where a question reaches many: some milliseconds of the event loop.
ROWS_AT_ONCE = 1_000
#: Paths whose references are read together: some thousands, which hold the event loop for milliseconds.
REFERRERS_AT_ONCE = 500


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Row:
    """Row of one path, as far as decisions need it."""

    serial: int
    store_path: str
    nar_hash: str
    url: str
    file_size: int
    narinfo: bytes
    tombstoned_at: float | None

    @property
    def base_name(self) -> str:
        """File name of the store path."""
        return base_name_of(self.store_path)

    @property
    def hash_part(self) -> str:
        """The 32 characters before the name."""
        return hash_part_of(self.store_path)


_ROW_COLUMNS = (
    paths.c.serial,
    paths.c.store_path,
    paths.c.nar_hash,
    paths.c.url,
    paths.c.file_size,
    paths.c.narinfo,
    paths.c.tombstoned_at,
)


def row_columns() -> tuple[sa.Column[Any], ...]:
    """Return the columns that a `Row` is made of, in order."""
    return _ROW_COLUMNS


def _rows_question(dialect: str) -> sa.Select[Any]:
    wanted = names_table_of(dialect)
    return sa.select(*_ROW_COLUMNS).join(wanted, wanted.c.value == paths.c.hash_part)


#: Rows by hash part.
_ROWS = Prepared(_rows_question)


class Catalog:
    """The published paths of one cache; reads only. It holds what the rooms beside it need too.

    `now` gives Unix seconds.
    """

    def __init__(self, database: Database, objects: ObjectStore, store_dir: StoreDir, now: Callable[[], float]) -> None:
        self.database = database
        self.objects = objects
        self.store_dir = store_dir
        self.now = now
        #: Hash part or URL -> (row, when it was read), oldest use first, at most twice NARINFOS_IN_MEMORY.
        self._recent: OrderedDict[str, tuple[Row, float]] = OrderedDict()
        #: Hash parts requested since `take_used`, at most USED_IN_MEMORY.
        self._used: set[str] = set()
        #: Hash parts that are to be looked up with the next question, and who waits for each.
        self._wanted: dict[str, asyncio.Future[Row | None]] = {}
        self._asking: asyncio.Task[None] | None = None
        #: Calls of `forget`: what was read before one may be out of date after it.
        self.forgotten = 0

    async def close(self) -> None:
        """End the question under way; who waits for its answer is cancelled."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def missing(self, store_paths: Iterable[str]) -> set[str]:
        """See `Cache.missing`."""
        wanted = set(store_paths)
        parts = await apart(len(wanted), lambda: self.hash_parts(wanted))
        async with reading(self.database) as connection:
            rows = await self.rows(connection, parts)
        present = await self.fetchable(rows.values())
        return await apart(len(present), lambda: wanted - {row.store_path for row in present})

    async def differing(self, claims: Mapping[str, str]) -> dict[str, bool]:
        """See `Cache.differing`."""
        async with reading(self.database) as connection:
            rows = await self.rows(connection, self.hash_parts(claims))
            other = [
                row
                for row in await self.fetchable(rows.values())
                if claims.get(row.store_path, row.nar_hash) != row.nar_hash
            ]
            known: set[tuple[int, str]] = set()
            for chunk in chunked([row.serial for row in other]):
                question = sa.select(conflicts.c.serial, conflicts.c.nar_hash).where(conflicts.c.serial.in_(chunk))
                known.update((serial, nar_hash) for serial, nar_hash in await connection.execute(question))
        return {row.store_path: (row.serial, claims[row.store_path]) in known for row in other}

    async def narinfo(self, hash_part: str) -> bytes | None:
        """See `Cache.narinfo`."""
        if len(hash_part) != HASH_PART_LENGTH:
            return None
        row = self._remembered(hash_part) or await self._look_up(hash_part)
        if row is None or row.tombstoned_at is not None:
            return None
        self._note_use(hash_part)
        return row.narinfo

    def narinfo_in_memory(self, hash_part: str) -> bytes | None:
        """See `Cache.narinfo_in_memory`."""
        row = self._remembered(hash_part)
        if row is None:
            return None
        self._note_use(hash_part)
        return row.narinfo

    def closure_in_memory(self, names: Collection[str], *, recursive: bool, at_most: int) -> list[Row] | None:
        """Return the rows of base names, or hash parts alone, and of all that they reach, references first.

        None unless all of them are in memory, can be fetched, and are at most `at_most` and CLOSURE_IN_MEMORY.
        """
        found: dict[str, Row] = {}
        left = list(names)
        while left:
            name = left.pop()
            part = name[:HASH_PART_LENGTH]
            row = found.get(part) or self._remembered(part)
            if row is None or name not in {part, row.base_name}:
                return None
            if part in found:
                continue
            if len(found) == min(at_most, CLOSURE_IN_MEMORY):
                return None
            found[part] = row
            if recursive:
                left += rendered_references(row.narinfo)
        # A path is published after all that it refers to.
        return sorted(found.values(), key=attrgetter("serial"))

    def remember(self, rows: Iterable[Row], forgotten: int, *, displacing: bool = True) -> None:
        """Keep rows in memory that were read, or written, when `forgotten` was as it is given here.

        Where they are not `displacing`, nothing that is in use goes for them.
        """
        if forgotten != self.forgotten:
            return
        now = self.now()
        for row in rows:
            if not displacing and not self._has_room(now):
                return
            if row.tombstoned_at is None:
                for name in (row.hash_part, row.url):
                    self._recent[name] = (row, now)
                    self._recent.move_to_end(name)
        while len(self._recent) > 2 * NARINFOS_IN_MEMORY:
            self._recent.popitem(last=False)

    def _has_room(self, now: float) -> bool:
        """Return whether a row can be remembered once what is too old to be believed was dropped."""
        while len(self._recent) > 2 * (NARINFOS_IN_MEMORY - 1):
            oldest, (_, read_at) = next(iter(self._recent.items()))
            if abs(now - read_at) < RECENT_S:
                return False
            del self._recent[oldest]
        return True

    def small_object(self, url: str, at_most: int) -> bytes | None:
        """See `Cache.small_object`."""
        row, read_at = self._recent.get(url, (None, 0.0))
        if row is None or row.file_size > at_most or abs(self.now() - read_at) >= RECENT_S:
            return None
        if not isinstance(self.objects, LocalObjectStore):
            return None
        content = self.objects.read_now(url)
        if content is None or len(content) != row.file_size:
            return None
        self._recent.move_to_end(url)
        return content

    def take_used(self) -> set[str]:
        """Return the hash parts that were requested since the last call, some of them where there were too many."""
        used, self._used = self._used, set()
        return used

    def _note_use(self, hash_part: str) -> None:
        if len(self._used) < USED_IN_MEMORY:
            self._used.add(hash_part)

    async def object_size(self, url: str) -> int | None:
        """See `Cache.object_size`."""
        row = self._remembered(url) or await self._find_object(url)
        return None if row is None else row.file_size

    async def closure(
        self, store_paths: Iterable[str], *, recursive: bool, at_most: int | None = None
    ) -> tuple[list[bytes], list[str]]:
        """See `Cache.closure`."""
        wanted = set(store_paths)
        if len(wanted) > MAX_CLOSURE:
            raise ClosureTooLargeError(f"{len(wanted)} paths were asked for at once; the limit is {MAX_CLOSURE}")
        hash_parts = await apart(len(wanted), lambda: self.hash_parts(wanted))
        reached: dict[int, Row] = {}
        async with reading(self.database) as connection:
            if not recursive:
                reached = {row.serial: row for row in (await self.rows(connection, hash_parts)).values()}
            elif at_most is not None:
                for chunk in chunked(hash_parts):
                    reached.update(await self._nearest(connection, chunk, at_most))
            else:
                reached = {row.serial: row for row in await self._reach(connection, hash_parts)}
            if len(reached) > MAX_CLOSURE:
                raise ClosureTooLargeError(f"the closure has more than {MAX_CLOSURE} paths; ask for parts of it")
        present = await self.fetchable(reached.values())
        return await apart(len(reached), lambda: _answer(wanted, reached, present))

    async def lost(self, inputs: Iterable[str], suspects: Iterable[str]) -> set[str]:
        """See `Cache.lost`."""
        wanted, suspected = set(inputs), set(suspects)
        if len(wanted) > MAX_CLOSURE:
            raise ClosureTooLargeError(f"{len(wanted)} paths were asked for at once; the limit is {MAX_CLOSURE}")
        hash_parts = await apart(len(wanted), lambda: self.hash_parts(wanted))
        async with reading(self.database) as connection:
            rows = await self._reach(connection, hash_parts)
        reached = await apart(len(rows), lambda: {row.store_path: row for row in rows})
        intact = await self.fetchable(reached.values())
        here = await apart(len(intact), lambda: {row.store_path for row in intact})
        lost = (wanted | reached.keys()) - here
        for path in sorted(suspected & here):
            # The database has it; a remote store is queried for what a reader did not find.
            if await self.objects.head(reached[path].url) != reached[path].file_size:
                lost.add(path)
        return lost

    def forget(self, rows: Iterable[tuple[str, str]]) -> None:
        """Forget rows that were tombstoned, deleted or repaired: their hash parts and URLs."""
        self.forgotten += 1
        for names in rows:
            for name in names:
                self._recent.pop(name, None)

    # For those that decide inside a transaction of their own.

    def hash_parts(self, store_paths: Iterable[str]) -> list[str]:
        """Return the hash parts of those texts that are full paths of this store, each once."""
        # What is no path of this store cannot be published: it stays missing.
        return list(self.store_dir.hash_parts(store_paths))

    async def rows(self, connection: AsyncConnection, hash_parts: Sequence[str]) -> dict[str, Row]:
        """Return the rows that there are, tombstoned or not, by hash part."""
        found: dict[str, Row] = {}
        if not hash_parts:
            return found
        answer = await connection.execute(_ROWS.clause(connection.dialect.name), {"names": names_parameter(hash_parts)})
        for some in answer.partitions(ROWS_AT_ONCE):
            for values in some:
                row = Row(*values)
                found[row.hash_part] = row
            await asyncio.sleep(0)
        return found

    def finding_rows(self, hash_parts: Collection[str]) -> Work[dict[str, Row]]:
        """Do the work of `rows`."""
        if not hash_parts:
            return {}
        found = yield Ask(_ROWS, {"names": names_parameter(hash_parts)})
        rows: list[Row] = yield Apart(len(found), lambda: [Row(*values) for values in found])
        return {row.hash_part: row for row in rows}

    async def numbered(self, connection: AsyncConnection, serials: Sequence[int]) -> list[Row]:
        """Return the rows with these serials that there are, tombstoned or not, by serial."""
        question = sa.select(*_ROW_COLUMNS).where(paths.c.serial.in_(serials)).order_by(paths.c.serial)
        return [Row(*values) for values in await connection.execute(question)]

    async def fetchable(self, rows: Iterable[Row]) -> list[Row]:
        """Return those rows whose paths can be fetched."""
        looked_at = list(rows)
        return await apart(
            len(looked_at), lambda: [row for row in looked_at if row.tombstoned_at is None and self.is_intact(row)]
        )

    async def intact(self, rows: Iterable[Row]) -> list[Row]:
        """Return those rows whose objects are there, tombstoned or not."""
        looked_at = list(rows)
        return await apart(len(looked_at), lambda: [row for row in looked_at if self.is_intact(row)])

    def is_intact(self, row: Row) -> bool:
        """Return whether the object of a row has its size, as far as that is cheap to know."""
        if isinstance(self.objects, LocalObjectStore):
            return self.objects.head_now(row.url) == row.file_size
        return True

    def _remembered(self, key: str) -> Row | None:
        """Return a row in memory by its hash part or URL, if its object is there."""
        row, read_at = self._recent.get(key, (None, 0.0))
        if row is None or abs(self.now() - read_at) >= RECENT_S or not self.is_intact(row):
            return None
        self._recent.move_to_end(key)
        return row

    async def _look_up(self, hash_part: str) -> Row | None:
        """Return a row whose object is there, from the database.

        What is asked for while a question is under way is asked together with the next: clients ask for many narinfos
        at one time, and a question costs more than the rows of its answer.
        """
        waiting = self._wanted.get(hash_part)
        if waiting is None:
            waiting = self._wanted[hash_part] = asyncio.get_running_loop().create_future()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_for_wanted(), name="narinfos")
        # Others may wait for the same row.
        return await asyncio.shield(waiting)

    async def _ask_for_wanted(self) -> None:
        while self._wanted:
            some = dict(itertools.islice(self._wanted.items(), ROWS_AT_ONCE))
            for hash_part in some:
                del self._wanted[hash_part]
            forgotten = self.forgotten
            try:
                async with reading(self.database) as connection:
                    rows = await self.rows(connection, list(some))
                found = {hash_part: self._noted(rows.get(hash_part), forgotten) for hash_part in some}
            except asyncio.CancelledError:
                for waiting in (*some.values(), *self._wanted.values()):
                    waiting.cancel()
                self._wanted.clear()
                raise
            except Exception as error:  # noqa: BLE001 - it is theirs who wait
                for waiting in some.values():
                    waiting.set_exception(error)
                    # All of them may have left.
                    waiting.exception()
            else:
                for hash_part, waiting in some.items():
                    waiting.set_result(found[hash_part])

    async def _find_object(self, url: str) -> Row | None:
        """Return a row whose object, which is there, has this URL."""
        # Also where the row in memory has lost its object: it may have been repaired with another.
        forgotten = self.forgotten
        async with reading(self.database) as connection:
            question = sa.select(*_ROW_COLUMNS).where(paths.c.url == url).order_by(paths.c.serial).limit(1)
            row = next((Row(*values) for values in await connection.execute(question)), None)
        return self._noted(row, forgotten)

    def _noted(self, row: Row | None, forgotten: int) -> Row | None:
        """Return a row whose object is there, and remember it unless rows were forgotten since it was read."""
        if row is None or not self.is_intact(row):
            return None
        self.remember([row], forgotten)
        return row

    async def _nearest(self, connection: AsyncConnection, hash_parts: Sequence[str], at_most: int) -> dict[int, Row]:
        """Return the rows that are reached, the nearest `at_most` if there are more, and always the requested ones.

        Level by level: neither SQLite nor PostgreSQL walks a recursive question no further than it is read.
        """
        found = {row.serial: row for row in (await self.rows(connection, hash_parts)).values()}
        level: list[int] = list(found)
        while level and len(found) < at_most:
            further: dict[int, Row] = {}
            for chunk in chunked(level):
                question = (
                    sa.select(*_ROW_COLUMNS)
                    .where(paths.c.serial.in_(sa.select(refs.c.reference).where(refs.c.referrer.in_(chunk))))
                    .limit(at_most)
                )
                for values in await connection.execute(question):
                    row = Row(*values)
                    if row.serial not in found and len(found) + len(further) < at_most:
                        further[row.serial] = row
            found |= further
            level = list(further)
        return found

    async def _reach(self, connection: AsyncConnection, hash_parts: Sequence[str]) -> list[Row]:
        """Return the rows of paths and of all that they reach."""
        roots: list[int] = []
        for chunk in chunked(hash_parts, ROWS_AT_ONCE):
            roots += (await connection.execute(sa.select(paths.c.serial).where(paths.c.hash_part.in_(chunk)))).scalars()
        found: list[Row] = []
        for part in chunked(list(await reached_serials(connection, roots)), ROWS_AT_ONCE):
            found += await self.numbered(connection, part)
        return found


async def reached_serials(connection: AsyncConnection, roots: Iterable[int]) -> set[int]:
    """Return the serials of paths and of all that they reach, level by level: a recursive question has no bound.

    Raises:
        ClosureTooLargeError: there are more than MAX_CLOSURE.
    """
    reached = set(roots)
    level = list(reached)
    while level:
        further: set[int] = set()
        for chunk in chunked(level, REFERRERS_AT_ONCE):
            question = sa.select(refs.c.reference).distinct().where(refs.c.referrer.in_(chunk))
            further.update((await connection.execute(question)).scalars())
        level = list(further - reached)
        reached.update(level)
        if len(reached) > MAX_CLOSURE:
            raise ClosureTooLargeError(f"the closure has more than {MAX_CLOSURE} paths; ask for parts of it")
    return reached


async def apart(count: int, work: Callable[[], _T]) -> _T:
    """Do the work on so many paths, in a thread where they are many."""
    return work() if count <= LOOK_INLINE else await asyncio.to_thread(work)


def _answer(wanted: set[str], reached: Mapping[int, Row], present: Iterable[Row]) -> tuple[list[bytes], list[str]]:
    """Return the narinfos of what was reached and is present, references first, and all other paths."""
    here = {row.store_path for row in present}
    rows = [reached[serial] for serial in sorted(reached)]
    missing = (wanted | {row.store_path for row in rows}) - here
    return [row.narinfo for row in rows if row.store_path in here], sorted(missing)
