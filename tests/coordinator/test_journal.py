"""The journal keeps what it was given, in order, and refuses what it does not understand."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from coordinator.codec import (
    CodecError,
    Evidence,
    decode_evidence,
    decode_facts,
    encode_evidence,
    encode_facts,
    evidence_size,
)
from coordinator.journal import FRAME_FACTS, Journal, JournalError, StateDirBusyError, StateLock, database_engine
from scheduler.facts import Fact, StepAbandoned, StepAdded, StepHeld
from scheduler.model import Recipe, Requirements, StepKey, StepSpec, SubmissionId
from workers.protocol import Output

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
        return st.lists(_values(typing.get_args(kind)[0]), max_size=3).map(tuple)
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
    for frame in (b'[["step-eaten",{}]]', b'[["step-held",{"step":"a","more":1}]]', b'[["step-held",{"step":1}]]'):
        with pytest.raises(CodecError):
            decode_facts(frame)


def test_evidence_comes_back_as_it_went_in() -> None:
    output = Output(
        name="out", path="/nix/store/x-a", nar_hash="sha256:x", nar_size=1, references=("x-a",), url="nar/x.nar.zst",
        compression="zstd", file_hash="sha256:y", file_size=77,
    )  # fmt: skip
    evidence = Evidence("/nix/store/y-a.drv", (output,))
    assert decode_evidence(encode_evidence(evidence)) == evidence
    assert evidence_size(encode_evidence(evidence)) == 77
    with pytest.raises(CodecError):
        decode_evidence(b'{"v":2}')


async def _written(path: Path, batches: Sequence[Sequence[Fact]], notes: dict[SubmissionId, bytes]) -> None:
    engine = database_engine(f"sqlite+aiosqlite:///{path}")
    journal = Journal(engine)
    await journal.prepare()
    for batch in batches:
        await journal.append(batch, notes)
        notes = {}
    await engine.dispose()


async def _read(path: Path) -> tuple[list[Fact], dict[SubmissionId, bytes]]:
    engine = database_engine(f"sqlite+aiosqlite:///{path}")
    try:
        journal = Journal(engine)
        await journal.prepare()
        facts = [fact async for frame in journal.load() for fact in frame]
        return facts, dict(await journal.notes())
    finally:
        await engine.dispose()


def _steps(count: int) -> list[Fact]:
    return [StepAdded(StepSpec(StepKey(f"k{n}"), (Recipe(Requirements("sys")),))) for n in range(count)]


async def test_batches_come_back_in_order_after_a_restart(tmp_path: Path) -> None:
    batches: list[list[Fact]] = [_steps(FRAME_FACTS * 2 + 3), [StepHeld(StepKey("k1"))], [StepAbandoned(StepKey("k2"))]]
    await _written(tmp_path / "j", batches, {SubmissionId("s"): b"note"})
    facts, notes = await _read(tmp_path / "j")
    assert facts == [fact for batch in batches for fact in batch]
    assert notes == {SubmissionId("s"): b"note"}


async def test_more_frames_than_one_read_come_back(tmp_path: Path) -> None:
    batches: list[list[Fact]] = [[StepHeld(StepKey(f"k{n}"))] for n in range(200)]
    await _written(tmp_path / "j", batches, {})
    facts, _ = await _read(tmp_path / "j")
    assert facts == [fact for batch in batches for fact in batch]


async def test_what_was_appended_survives_a_kill(tmp_path: Path) -> None:
    """Facts must survive kill -9: the process dies right after `append` returns, without closing anything."""
    program = (
        "import asyncio, os, signal, sys\n"
        "from coordinator.journal import Journal, database_engine\n"
        "from scheduler.facts import StepHeld\n"
        "async def main():\n"
        "    journal = Journal(database_engine(sys.argv[1]))\n"
        "    await journal.prepare()\n"
        "    for n in range(5):\n"
        "        await journal.append([StepHeld(f'k{n}')])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    url = f"sqlite+aiosqlite:///{tmp_path / 'j'}"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, url], cwd=root, check=False)  # noqa: ASYNC221
    assert done.returncode == -9
    facts, _ = await _read(tmp_path / "j")
    assert facts == [StepHeld(StepKey(f"k{n}")) for n in range(5)]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("UPDATE journal_frames SET body = x'5b5d' WHERE seq = 2", "frame 2: its checksum"),
        ("DELETE FROM journal_frames WHERE seq = 2", "frame 2 is missing"),
        ("UPDATE journal_meta SET value = 99", "start the newer version"),
        ("DELETE FROM journal_meta", "does not say its version"),
    ],
)
async def test_a_damaged_journal_stops_the_start_and_stays_as_it_is(tmp_path: Path, damage: str, sentence: str) -> None:
    await _written(tmp_path / "j", [_steps(2), _steps(3), _steps(1)], {})
    engine = database_engine(f"sqlite+aiosqlite:///{tmp_path / 'j'}")
    async with engine.begin() as connection:
        await connection.execute(text(damage))
    await engine.dispose()
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(JournalError, match=sentence):
        await _read(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == before


async def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"something else entirely, but not short" * 100)
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(JournalError, match=r"cannot open the journal: file is not a database"):
        await _read(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == before


async def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    engine = database_engine(f"sqlite+aiosqlite:///{tmp_path / 'j'}")
    journal = Journal(engine)
    await journal.prepare()
    async with engine.connect() as connection:
        await connection.execute(text("PRAGMA max_page_count = 8"))
    with pytest.raises(JournalError, match="disk is full"):
        await journal.append(_steps(50_000))
    await engine.dispose()


def test_a_state_directory_has_one_owner_and_the_error_names_it(tmp_path: Path) -> None:
    with StateLock(tmp_path / "state"):
        with pytest.raises(StateDirBusyError, match=rf"process {os.getpid()}\b"), StateLock(tmp_path / "state"):
            pass
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with StateLock(tmp_path / "state"):
        pass


settings.register_profile("coordinator", deadline=None)
settings.load_profile("coordinator")
