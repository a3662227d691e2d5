"""Frames of the journal and parts of its snapshots: facts as rows with a number, a count and a CRC, and back."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from coordinator.journal.codec import Record, decode_facts, decode_records, encode_facts, encode_records
from coordinator.journal.errors import CodecError, JournalError
from scheduler.facts import Fact

#: Facts in one frame; a larger batch becomes several frames of one commit.
FRAME_FACTS: Final = 4096

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A piece of the journal as `load` gives it: facts, or records of the read model that belong behind them."""

    facts: tuple[Fact, ...] = ()
    records: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class FrameBody:
    """Facts of one frame, encoded."""

    facts: int
    crc: int
    body: bytes


def frame_bodies(facts: Sequence[Fact]) -> list[FrameBody]:
    """Return the facts of one commit as bodies of frames."""
    frames: list[FrameBody] = []
    # Notes alone get an empty frame, so that the last `seq` always shows whether a commit took place.
    for start in range(0, len(facts), FRAME_FACTS) or (0,):
        part = facts[start : start + FRAME_FACTS]
        body = encode_facts(part)
        frames.append(FrameBody(len(part), zlib.crc32(body), body))
    return frames


def numbered(frames: Sequence[FrameBody], seq: int) -> list[dict[str, Any]]:
    """Return the rows of one commit, numbered from `seq` + 1 on."""
    return [
        {"seq": number, "facts": frame.facts, "crc": frame.crc, "body": frame.body}
        for number, frame in enumerate(frames, seq + 1)
    ]


def encoded_parts(facts: Iterable[Fact], records: Iterable[Record]) -> Iterator[tuple[int, int, bytes]]:
    """Yield kind (as in `tables.parts`), number of items and body of each part of a snapshot."""
    for batch in _sliced(facts):
        yield 0, len(batch), encode_facts(batch)
    for some_records in _sliced(records):
        yield 1, len(some_records), encode_records(some_records)


def _sliced(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == FRAME_FACTS:
            yield batch
            batch = []
    if batch:
        yield batch


def decoded(kind: int, items: int, body: bytes, where: str) -> Loaded:
    """Return what a body of `items` facts (kind 0) or records (1) holds. Raises `JournalError`: `where`, and why."""
    try:
        loaded = Loaded(records=decode_records(body)) if kind else Loaded(facts=decode_facts(body))
    except CodecError as error:
        raise JournalError(f"{where}: {error}") from None
    found = len(loaded.facts) + len(loaded.records)
    if found != items:
        raise JournalError(f"{where}: it holds {found} facts instead of {items}.")
    return loaded
