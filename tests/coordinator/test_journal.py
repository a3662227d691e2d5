"""The journal keeps what it was given, in order, and refuses what it does not understand."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import secrets
import sqlite3
import subprocess
import sys
import types
import typing
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, select, text
from sqlalchemy import table as sql_table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.journal import journal as journal_module
from coordinator.journal.codec import (
    Evidence,
    RootNote,
    StoredNote,
    SubmissionNote,
    decode_evidence,
    decode_facts,
    decode_note,
    decode_notes,
    encode_evidence,
    encode_facts,
    encode_note,
    evidence_shown,
)
from coordinator.journal.errors import CodecError, FencedError, JournalError
from coordinator.journal.frames import FRAME_FACTS
from coordinator.journal.journal import Journal
from coordinator.state_lock import StateDirBusyError, StateLock
from infra import database as database_module
from infra.database import open_engine
from scheduler.facts import Fact, StepAbandoned, StepAdded, StepCached, SubmissionAccepted, SubmissionForgotten
from scheduler.model import Instant, Recipe, Requirements, StepKey, StepSpec, SubmissionId
from workers.wire.messages import Output

_TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """A strategy for any type that a fact may hold, from its annotations alone."""
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    plain = {
        str: _TEXT,
        int: st.integers(0, 2**53),
        float: st.floats(0, 1e12),
        bytes: st.binary(max_size=16),
        bool: st.booleans(),
    }
    if kind in plain:
        return plain[kind]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        some, _none = typing.get_args(kind)
        return st.none() | _values(some)
    if typing.get_origin(kind) is tuple:
        *items, last = typing.get_args(kind)
        several = st.lists(_values(items[0]), max_size=3).map(tuple)
        return several if last is Ellipsis else st.tuples(*map(_values, [*items, last]))
    if typing.get_origin(kind) is frozenset:
        return st.frozensets(_values(typing.get_args(kind)[0]), max_size=3)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{field.name: _values(hints[field.name]) for field in dataclasses.fields(kind)})
    return st.sampled_from(kind)


_FACTS: st.SearchStrategy[Fact] = st.one_of([_values(kind) for kind in typing.get_args(Fact)])


@given(st.lists(_FACTS, max_size=40))
def test_every_fact_comes_back_as_it_went_in(batch: list[Fact]) -> None:
    assert decode_facts(encode_facts(batch)) == tuple(batch)


@given(st.lists(_FACTS, min_size=1, max_size=4), st.data())
def test_damaged_frames_are_one_typed_error_or_another_valid_frame(batch: list[Fact], data: st.DataObject) -> None:
    frame = bytearray(encode_facts(batch))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    for damaged in (bytes(frame), cut):
        with contextlib.suppress(CodecError):
            decode_facts(damaged)


def test_a_fact_with_an_unknown_tag_or_field_is_refused() -> None:
    for frame, sentence in (
        (b'[["step-eaten",{}]]', "a kind that this version of drover does not know"),
        (b'[["step-held",{"step":"a","more":1}]]', "a StepCached belongs: it has a field that this version"),
        (b'[["step-leased",{"lease":{"step":"a","attempt":1,"more":1},"builder":"b","recipe":0,"at":1.0}]]', "a field"),
        (b'[["step-held",{"step":1}]]', "Expected `str`, got `int`"),
        (b'[["step-held",{}]]', "missing required field `step`"),
        (b'[["step-lost",{"step":"\\ud800"}]]', "damaged"),
    ):
        with pytest.raises(CodecError, match=sentence):
            decode_facts(frame)


def test_equal_keys_and_requirements_are_one_object_in_memory() -> None:
    def spec(name: str, *needs: str) -> StepSpec:
        return StepSpec(StepKey(name), (Recipe(Requirements("x", ("kvm",)), tuple(map(StepKey, needs))),))

    one, two = decode_facts(encode_facts([StepAdded(spec("some key")), StepAdded(spec("other", "some key"))]))
    assert isinstance(one, StepAdded)
    assert isinstance(two, StepAdded)
    assert two.spec.recipes[0].needs[0] is one.spec.key
    assert two.spec.recipes[0].requirements is one.spec.recipes[0].requirements


def test_submissions_of_before_they_could_say_how_long_they_wait_can_be_read() -> None:
    said = '"submission":"s","roots":[]'
    accepted = f'["submission-accepted",{{{said},"at":1.0,"members":[],"held":[],"joined":[]}}]'
    frame = f'[{accepted},["submission-restored",{{{said}}}]]'
    assert [getattr(fact, "wait_s", 0) for fact in decode_facts(frame.encode())] == [None, None]


def test_evidence_comes_back_as_it_went_in() -> None:
    output = Output(
        name="out", path="/nix/store/x-a", nar_hash="sha256:x", nar_size=1, references=("x-a",), url="nar/x.nar.zst",
        compression="zstd", file_hash="sha256:y", file_size=77,
    )  # fmt: skip
    evidence = Evidence((output,), "A")
    assert decode_evidence(encode_evidence(evidence)) == evidence
    assert evidence_shown(encode_evidence(evidence)) == (77, "A")
    with pytest.raises(CodecError):
        decode_evidence(b'{"v":2}')


def test_evidence_of_before_classes_of_isolation_can_be_read() -> None:
    assert decode_evidence(b'{"v":1,"outputs":[]}') == Evidence(())
    assert evidence_shown(b'{"v":1,"outputs":[{"file_size":7}]}') == (7, "")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'j'}"
    return str(request.getfixturevalue("postgres_url"))


@asynccontextmanager
async def _opened_beside(url: str, *, patience_s: float = 5.0) -> AsyncIterator[tuple[AsyncEngine, Journal]]:
    """A journal as a coordinator has it before it loads, and the database that it is in."""
    engine = open_engine(url)
    try:
        journal = Journal(engine, patience_s=patience_s)
        await journal.prepare()
        await journal.take_over()
        yield engine, journal
    finally:
        await engine.dispose()


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Journal]:
    async with _opened_beside(url) as (_, journal):
        yield journal


async def _written(url: str, batches: Sequence[Sequence[Fact]], notes: dict[SubmissionId, StoredNote]) -> None:
    async with _opened(url) as journal:
        for batch in batches:
            await journal.append(batch, notes)
            notes = {}


async def _facts(journal: Journal) -> list[Fact]:
    return [fact async for piece in journal.load() for fact in piece.facts]


async def _read(url: str) -> tuple[list[Fact], dict[SubmissionId, StoredNote]]:
    async with _opened(url) as journal:
        return await _facts(journal), dict(await journal.notes())


async def _looked_at(url: str) -> None:
    engine = open_engine(url)
    try:
        journal = Journal(engine)
        await journal.prepare()
        await _facts(journal)
    finally:
        await engine.dispose()


async def _sql(url: str, *statements: str) -> None:
    engine = open_engine(url)
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await engine.dispose()


def _file(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path / 'j'}"


def _steps(count: int) -> list[Fact]:
    return [StepAdded(StepSpec(StepKey(f"k{n}"), (Recipe(Requirements("sys")),))) for n in range(count)]


def _held(*numbers: int) -> list[Fact]:
    return [StepCached(StepKey(f"k{n}")) for n in numbers]


async def test_batches_come_back_in_order_after_a_restart(database: str) -> None:
    batches: list[list[Fact]] = [
        _steps(FRAME_FACTS * 2 + 3),
        [StepCached(StepKey("k1"))],
        [StepAbandoned(StepKey("k2"))],
    ]
    await _written(database, batches, {SubmissionId("s"): StoredNote(b"note")})
    facts, notes = await _read(database)
    assert facts == [fact for batch in batches for fact in batch]
    assert notes == {SubmissionId("s"): StoredNote(b"note")}


async def test_more_frames_than_one_read_come_back(database: str) -> None:
    batches: list[list[Fact]] = [_held(n) for n in range(200)]
    await _written(database, batches, {})
    facts, _ = await _read(database)
    assert facts == [fact for batch in batches for fact in batch]


def _append_and_die(database: str) -> None:
    """Let a process append five times and die right after the last returned, without closing anything."""
    program = (
        "import asyncio, os, signal, sys\n"
        "from coordinator.journal.journal import Journal\n"
        "from infra.database import open_engine\n"
        "from scheduler.facts import StepCached\n"
        "async def main():\n"
        "    journal = Journal(open_engine(sys.argv[1]))\n"
        "    await journal.prepare()\n"
        "    await journal.take_over()\n"
        "    for n in range(5):\n"
        "        await journal.append([StepCached(f'k{n}')])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program, database], cwd=root, check=False).returncode == -9


async def test_appended_facts_survive_a_kill(database: str) -> None:
    await asyncio.to_thread(_append_and_die, database)
    facts, _ = await _read(database)
    assert facts == _held(*range(5))


@pytest.mark.parametrize("lost", [1, 10_000])
async def test_a_torn_tail_costs_the_last_appends_and_nothing_else(tmp_path: Path, lost: int) -> None:
    """As a power cut may leave it: the file that SQLite appends to ends early."""
    await asyncio.to_thread(_append_and_die, _file(tmp_path))
    log = tmp_path / "j-wal"
    os.truncate(log, log.stat().st_size - lost)
    facts, _ = await _read(_file(tmp_path))
    assert 0 < len(facts) < 5
    assert facts == _held(*range(len(facts)))
    async with _opened(_file(tmp_path)) as journal:
        await _facts(journal)
        await journal.append(_held(7))
    assert (await _read(_file(tmp_path)))[0] == [*facts, *_held(7)]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("UPDATE journal_frames SET body = x'5b5d' WHERE seq = 2", "frame 2: its checksum"),
        ("UPDATE journal_frames SET body = substr(body, 1, 20) WHERE seq = 3", "frame 3: its checksum"),
        ("DELETE FROM journal_frames WHERE seq = 2", "frame 2 is missing"),
        ("UPDATE journal_meta SET value = 99 WHERE name = 'facts_version'", "start the newer version"),
        ("DELETE FROM journal_meta", "does not say its version"),
    ],
)
async def test_a_damaged_journal_stops_the_start_and_stays_as_it_is(tmp_path: Path, damage: str, sentence: str) -> None:
    await _written(_file(tmp_path), [_steps(2), _steps(3), _steps(1)], {})
    await _sql(_file(tmp_path), damage)
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(JournalError, match=sentence):
        await _looked_at(_file(tmp_path))
    assert (tmp_path / "j").read_bytes() == before


async def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"something else entirely, but not short" * 100)
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(JournalError, match=r"cannot open the journal: file is not a database"):
        await _read(_file(tmp_path))
    assert (tmp_path / "j").read_bytes() == before


async def test_a_full_disk_is_one_sentence_and_what_was_stored_stays(tmp_path: Path) -> None:
    async with _opened_beside(_file(tmp_path), patience_s=0.2) as (engine, journal):
        await journal.append(_held(1))
        async with engine.connect() as connection:
            await connection.execute(text("PRAGMA max_page_count = 16"))
        with pytest.raises(JournalError, match="disk is full"):
            await journal.append(_steps(50_000))
    assert (await _read(_file(tmp_path)))[0] == _held(1)


async def test_a_commit_of_one_frame_on_a_full_disk_is_the_same_sentence(tmp_path: Path) -> None:
    """It takes a shorter way to the driver than one of several."""
    async with _opened_beside(_file(tmp_path), patience_s=0.2) as (engine, journal):
        await journal.append(_held(1))
        async with engine.connect() as connection:
            await connection.execute(text("PRAGMA max_page_count = 16"))
        with pytest.raises(JournalError, match="disk is full"):
            await journal.append([StepCached(StepKey(secrets.token_hex(500_000)))])
    assert (await _read(_file(tmp_path)))[0] == _held(1)


async def test_room_on_a_full_disk_is_waited_for(tmp_path: Path) -> None:
    async with _opened_beside(_file(tmp_path), patience_s=60.0) as (engine, journal):
        async with engine.connect() as connection:
            await connection.execute(text("PRAGMA max_page_count = 16"))
        appending = asyncio.create_task(journal.append(_steps(50_000)))
        while "disk is full" not in journal.trouble:  # noqa: ASYNC110 - what is waited for is a database's doing
            await asyncio.sleep(0.02)
        async with engine.connect() as connection:
            await connection.execute(text("PRAGMA max_page_count = 1000000"))
        await appending
        assert journal.trouble == ""
    assert (await _read(_file(tmp_path)))[0] == _steps(50_000)


async def test_a_database_that_does_not_answer_is_reported(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SLOW_S", 0.1)
    async with _opened_beside(postgres_url) as (engine, journal):
        async with engine.begin() as other:
            await other.execute(text("LOCK TABLE journal_frames IN ACCESS EXCLUSIVE MODE"))
            appending = asyncio.create_task(journal.append(_held(1)))
            while "its database does not answer" not in journal.trouble:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
        await appending
        assert journal.trouble == ""


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_coordinator_that_was_paused_inside_a_transaction_goes_on_unless_another_leads_by_then(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    monkeypatch.setattr(database_module, "IDLE_IN_TRANSACTION_MS", 100)
    waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    fence, pauses = Journal.fence, [True]

    async def paused(journal: Journal, connection: AsyncConnection) -> None:
        if pauses and pauses.pop():
            async with open_beside.connect() as plain:
                other = await plain.execution_options(isolation_level="AUTOCOMMIT")
                # Until the database has ended the transaction that waits here.
                while (await other.execute(text(waits))).scalar_one():  # noqa: ASYNC110 - a database's doing
                    await asyncio.sleep(0.02)
            if replaced:
                await Journal(open_beside).take_over()
        await fence(journal, connection)

    async with _opened_beside(postgres_url) as (_, journal):
        open_beside = open_engine(postgres_url)
        monkeypatch.setattr(Journal, "fence", paused)
        try:
            if replaced:
                with pytest.raises(FencedError, match="another coordinator has taken over"):
                    await journal.append(_held(1))
            else:
                await journal.append(_held(1))
        finally:
            await open_beside.dispose()
    assert (await _read(postgres_url))[0] == ([] if replaced else _held(1))


async def test_a_journal_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    await _written(_file(tmp_path), [_held(1)], {})
    engine = open_engine(f"{_file(tmp_path).replace('///', '///file:')}?mode=ro&uri=true")
    journal = Journal(engine)
    await journal.prepare()
    with pytest.raises(JournalError, match="readonly database"):
        await journal.take_over()
    await engine.dispose()


async def test_a_database_that_is_not_there_is_one_sentence_at_once() -> None:
    engine = open_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    with pytest.raises(JournalError, match="cannot open the journal"):
        await Journal(engine).prepare()
    await engine.dispose()


async def test_a_journal_of_the_first_release_is_taken_on(tmp_path: Path) -> None:
    await _written(_file(tmp_path), [_held(1)], {})
    await _sql(
        _file(tmp_path),
        "DROP TABLE journal_snapshots",
        "DROP TABLE journal_snapshot_parts",
        "DELETE FROM journal_meta WHERE name = 'epoch'",
        "UPDATE journal_meta SET value = 1 WHERE name = 'facts_version'",
    )
    assert (await _read(_file(tmp_path)))[0] == _held(1)


async def test_a_journal_of_before_shared_notes_is_taken_on(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "j")) as connection:
        connection.executescript(Path(__file__).with_name("journal_format_2.sql").read_text())
    new = _note("new", 100)
    async with _opened(_file(tmp_path)) as journal:
        assert [type(fact).__name__ for fact in await _facts(journal)] == ["StepAdded", "SubmissionAccepted"]
        await journal.append([], {SubmissionId("new"): encode_note(new)})
    notes = decode_notes((await _read(_file(tmp_path)))[1])
    assert notes.pop(SubmissionId("new")) == new
    [old] = notes.values()
    assert (old.label, old.roots[0].attr, old.derivations) == ("of before", "hello", 1)


def _note(label: str, roots: int) -> SubmissionNote:
    places = [f"{number:032}-step" for number in range(roots)]
    made = [RootNote(each, f"/{each}.drv", StepKey(each), (("out", f"/{each}"),)) for each in places]
    return SubmissionNote(label, tuple(made), roots)


async def test_notes_of_one_graph_are_stored_once_until_the_last_is_forgotten(database: str) -> None:
    notes = {SubmissionId(name): _note(name, 500) for name in ("one", "two", "three")}
    other = {SubmissionId("other"): _note("other", 600), SubmissionId("small"): _note("small", 1)}
    async with _opened(database) as journal:
        await journal.append([], {name: encode_note(note) for name, note in notes.items()})
        await journal.append([], {name: encode_note(note) for name, note in other.items()})
    read = decode_notes((await _read(database))[1])
    assert read == notes | other
    assert read[SubmissionId("one")].roots is read[SubmissionId("three")].roots
    left = list(notes)
    async with _opened_beside(database) as (engine, journal):
        await _facts(journal)
        for at, name in enumerate(left, start=1):
            assert len({note.shared for note in (await journal.notes()).values() if note.shared}) == 2
            await journal.append([SubmissionForgotten(name, Instant(1.0))])
            assert decode_notes(await journal.notes()) == {each: notes[each] for each in left[at:]} | other
        assert await _count(engine, "journal_shared_notes") == await _count(engine, "journal_note_shares") == 1
        await journal.append([SubmissionForgotten(name, Instant(1.0)) for name in other])
        assert await _count(engine, "journal_shared_notes") == await _count(engine, "journal_notes") == 0


async def _count(engine: AsyncEngine, table: str) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(select(func.count()).select_from(sql_table(table)))).scalar_one())


@pytest.mark.parametrize("roots", [1, 500])
def test_a_damaged_note_is_one_typed_error(roots: int) -> None:
    stored = encode_note(_note("x", roots))
    assert decode_note(stored) == _note("x", roots)
    for damaged in (StoredNote(stored.own[:-1], stored.shared), StoredNote(b"[]", stored.shared or b"{")):
        with pytest.raises(CodecError):
            decode_note(damaged)
    with pytest.raises(CodecError):
        decode_note(StoredNote(stored.own, stored.shared[:-5] or b"-"))


async def test_a_leader_that_was_taken_over_from_writes_nothing_more(database: str) -> None:
    async with _opened(database) as old:
        await old.append(_held(1))
        async with _opened(database) as new:
            assert new.epoch == old.epoch + 1
            assert await _facts(new) == _held(1)
            with pytest.raises(FencedError, match="another coordinator has taken over"):
                await old.append(_held(2), {SubmissionId("s"): StoredNote(b"note")})
            with pytest.raises(FencedError):
                await old.snapshots.save(1, _held(1), [])
            await new.append(_held(3))
            with pytest.raises(FencedError):
                await old.append(_held(2))
    assert await _read(database) == (_held(1, 3), {})


async def test_a_snapshot_stands_for_the_frames_before_it(database: str) -> None:
    async with _opened(database) as journal:
        for n in range(1, 4):
            await journal.append(_held(n))
            # Not what the frames say, so that it is seen where facts come from.
            await journal.snapshots.save(journal.seq, _held(-n), [])
        await journal.append(_held(4))
        assert await journal.snapshots.ends() == [3, 2]
    assert (await _read(database))[0] == _held(-3, 4)


async def test_a_damaged_snapshot_is_passed_over_for_the_one_before(database: str) -> None:
    async with _opened(database) as journal:
        for n in range(1, 4):
            await journal.append(_held(n))
            await journal.snapshots.save(journal.seq, _held(-n), [])
        await journal.append(_held(4))
    await _sql(database, _DAMAGE_THE_NEWEST)
    assert (await _read(database))[0] == _held(-2, 3, 4)
    await _sql(database, "UPDATE journal_snapshot_parts SET crc = 1")
    with pytest.raises(JournalError, match="every snapshot of the journal is damaged"):
        await _read(database)


_DAMAGE_THE_NEWEST = """
    UPDATE journal_snapshot_parts SET crc = 1
    WHERE snapshot = (SELECT snapshot FROM journal_snapshots ORDER BY seq DESC LIMIT 1)
"""


async def test_frames_of_a_broken_off_snapshot_are_removed_by_the_next(database: str) -> None:
    async with _opened_beside(database) as (engine, journal):
        await journal.append(_held(1))

        def torn() -> Iterator[Fact]:
            yield from _steps(FRAME_FACTS)
            raise CodecError("cut off")

        with pytest.raises(CodecError):
            await journal.snapshots.save(1, torn(), [])
        assert await journal.snapshots.ends() == []
        await journal.snapshots.save(1, _held(-1), [])
        async with engine.connect() as connection:
            left = await connection.execute(text("SELECT count(*) FROM journal_snapshot_parts"))
            assert left.scalar_one() == 1


def test_a_state_directory_has_one_owner_and_the_error_names_it(tmp_path: Path) -> None:
    with StateLock(tmp_path / "state"):
        with pytest.raises(StateDirBusyError, match=rf"process {os.getpid()}\b"), StateLock(tmp_path / "state"):
            pass
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with StateLock(tmp_path / "state"):
        pass


def test_keys_that_a_large_frame_repeats_are_stored_once() -> None:
    """As in a snapshot of a farm to which one graph was submitted again and again."""
    keys = tuple(StepKey(f"{hashlib.sha256(b'%d' % number).hexdigest()[:32]}-step") for number in range(6000))
    accepted = [SubmissionAccepted(SubmissionId(f"s{n}"), Instant(1.0), keys, keys, keys, ()) for n in range(10)]
    one, ten = encode_facts(accepted[:1]), encode_facts(accepted)
    assert len(ten) < len(one) * 1.5
    assert decode_facts(ten) == tuple(accepted)
