"""Opening the database of derivations: made, taken on, refused, each without touching what is not understood."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coordinator.stores import fresh_orders
from coordinator.stores.derivation_records import Kind, Node, PackedDerivation
from coordinator.stores.derivations import SMALL_ORDERS_BYTES, DerivationsError, DerivationStore
from coordinator.stores.fresh_orders import FreshOrders
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


async def test_an_order_soon_after_its_derivation_is_the_one_that_the_database_gives(
    room: IntakeHarness, tmp_path: Path
) -> None:
    make = Maker()
    plain = [make.plain(f"step-{n}", text="x" * (300 * n), outputs=("dev", "out")) for n in range(4)]
    fixed = make.fixed("file", b"content")
    await room.send([*plain, fixed])
    # Nothing of what is sent is ordered before it was submitted.
    assert await room.derivations.order_sizes([(StepKey(plain[0].step), 0)]) == ({}, {})
    await room.submit(*plain, fixed)
    other = DerivationStore.open(f"sqlite+aiosqlite:///{tmp_path}/derivations.sqlite3")
    wanted = [(StepKey(made.step), 0) for made in (*plain, fixed)]
    from_database = await other.order_sizes(wanted)
    assert len(from_database[1]) == len(wanted)
    # One of several is not kept: all are read.
    assert await room.derivations.order_sizes(wanted) == from_database
    _sql(tmp_path / "derivations.sqlite3", "DELETE FROM members")
    orders: dict[object, object] = {}
    sizes: dict[object, object] = {}
    for pair in wanted[:4]:
        size, order = await room.derivations.order_sizes([pair])
        sizes |= size
        orders |= order
    assert (sizes, orders) == tuple({pair: given[pair] for pair in wanted[:4]} for given in from_database)
    # Each once: a second attempt reads it, and so does what may be made by several recipes.
    assert await room.derivations.order_sizes(wanted) == ({}, {})
    await other.close()


def test_what_is_kept_for_orders_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_orders, "KEPT", 6)
    monkeypatch.setattr(fresh_orders, "KEPT_BYTES", 1000)
    monkeypatch.setattr(fresh_orders, "KEPT_BYTES_EACH", 500)
    kept = FreshOrders()

    def row(name: str, size: int) -> PackedDerivation:
        node = Node(f"{name}.drv", StepKey(name), Kind.INPUT_ADDRESSED, "x86_64-linux", (), (), ())
        return PackedDerivation(node, b"", b"", b"", b"x" * size)

    def taken(*names: str) -> list[str]:
        return [name for name in names if kept.take([(StepKey(name), 0)])]

    def keep(*rows: PackedDerivation) -> None:
        kept.add(rows)
        kept.place([(each.node.step, 0, each.node.drv) for each in rows])

    keep(*[row(f"few-{n}", 10) for n in range(9)])
    assert taken(*[f"few-{n}" for n in range(9)]) == [f"few-{n}" for n in range(3, 9)]
    keep(*[row(f"large-{n}", 400) for n in range(4)], row("larger", 501))
    assert taken(*[f"large-{n}" for n in range(4)], "larger") == ["large-2", "large-3"]
    # Room that was given back is room for others, and a set with one that is not there takes none.
    keep(row("one", 500), row("two", 500))
    assert not kept.take([(StepKey("one"), 0), (StepKey("three"), 0)])
    assert taken("one", "two") == ["one", "two"]
    keep(row("one", 10))
    kept.clear()
    assert not taken("one")
