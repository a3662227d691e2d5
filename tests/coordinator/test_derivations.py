"""Opening the database of derivations: made, taken on, refused, each without touching what is not understood."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator.stores.derivations import SMALL_ORDERS_BYTES, DerivationsError, DerivationStore
from infra.database import open_engine
from scheduler.model import StepKey
from tests.coordinator.test_intake import IntakeHarness, limits, room
from tests.support.graphs import Maker

__all__ = ["limits", "room"]


async def _open(file: Path) -> None:
    store = DerivationStore.open(f"sqlite+aiosqlite:///{file}")
    try:
        await store.prepare()
        assert await store.unknown(["x.drv"]) == ["x.drv"]
    finally:
        await store.close()


def _sql(file: Path, statement: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(file) as database:
        rows = database.execute(statement).fetchall()
    database.close()
    return rows


async def test_a_database_has_large_pages_and_one_of_an_earlier_release_keeps_its_small_ones(tmp_path: Path) -> None:
    await _open(tmp_path / "new")
    assert _sql(tmp_path / "new", "PRAGMA page_size") == [(16_384,)]
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path}/old")
    await DerivationStore(engine).prepare()
    await engine.dispose()
    await _open(tmp_path / "old")
    assert _sql(tmp_path / "old", "PRAGMA page_size") == [(4096,)]


async def test_a_database_of_a_newer_release_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "d"
    await _open(file)
    _sql(file, "UPDATE derivations_meta SET format = 99")
    before = file.read_bytes()
    with pytest.raises(DerivationsError, match=r"newer version of drover \(format 99"):
        await _open(file)
    assert file.read_bytes() == before


async def test_a_database_that_does_not_say_its_format_is_taken_on(tmp_path: Path) -> None:
    file = tmp_path / "d"
    await _open(file)
    _sql(file, "DROP TABLE derivations_meta")
    await _open(file)
    await _open(file)


async def test_a_database_from_before_outputs_were_noted_knows_what_makes_them(
    room: IntakeHarness, tmp_path: Path
) -> None:
    made = Maker().plain("made", outputs=("dev", "lib", "out"))
    await room.send([made])
    await room.submit(made)
    _sql(tmp_path / "derivations.sqlite3", "DROP TABLE derivation_outputs")
    await room.derivations.prepare()
    paths = list(made.outputs.values())
    assert await room.derivations.makers([*paths, f"{paths[0]}-other"]) == dict.fromkeys(paths, made.name)


async def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "d"
    file.write_bytes(b"something else entirely, but not short" * 100)
    before = file.read_bytes()
    with pytest.raises(DerivationsError, match="file is not a database"):
        await _open(file)
    assert file.read_bytes() == before


async def test_a_small_order_comes_with_its_size_and_a_large_one_when_it_is_its_turn(room: IntakeHarness) -> None:
    make = Maker()
    small, large = make.plain("small"), make.plain("large", text="".join(f"{n}," for n in range(60_000)))
    await room.send([small, large])
    await room.submit(small, large)
    wanted = [(StepKey(each.step), 0) for each in (small, large)]
    sizes, orders = await room.derivations.order_sizes([*wanted, (StepKey("nosuch"), 0)])
    whole = await room.derivations.orders(wanted)
    assert list(orders) == wanted[:1]
    assert orders[wanted[0]] == whole[wanted[0]]
    assert set(sizes) == set(wanted)
    assert all(size > len(whole[pair].derivation) for pair, size in sizes.items())


async def test_small_orders_together_have_a_bound(room: IntakeHarness) -> None:
    make = Maker()
    many = [make.plain(f"p{n}", text="x" * 15_000) for n in range(2 + SMALL_ORDERS_BYTES // 15_000)]
    await room.send(many)
    await room.submit(*many)
    sizes, orders = await room.derivations.order_sizes([(StepKey(each.step), 0) for each in many])
    assert len(sizes) == len(many)
    assert 0 < len(orders) < len(many)
    assert sum(sizes[pair] for pair in orders) <= SMALL_ORDERS_BYTES


async def test_what_was_ordered_is_published_without_another_question(room: IntakeHarness, tmp_path: Path) -> None:
    make = Maker()
    one, other = make.plain("one", outputs=("dev", "out")), make.plain("other")
    await room.send([one, other])
    await room.submit(one, other)
    asked = await room.derivations.steps([StepKey(one.step), StepKey(other.step)])
    await room.derivations.order_sizes([(StepKey(one.step), 0)])
    # What is not there any more cannot be read.
    _sql(tmp_path / "derivations.sqlite3", "DELETE FROM members")
    assert await room.derivations.steps([StepKey(one.step)]) == {StepKey(one.step): asked[StepKey(one.step)]}
    assert await room.derivations.steps([StepKey(other.step)]) == {}
