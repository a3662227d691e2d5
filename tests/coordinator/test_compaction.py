"""A journal that begins with a snapshot tells the same as the whole one, whenever it is cut and whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from coordinator.engine.compaction import Compactor, _Silence, compact
from coordinator.journal.errors import FencedError, JournalError
from coordinator.journal.journal import Journal
from coordinator.readmodel.views import Views
from infra.database import open_engine
from scheduler import invariants
from scheduler.facts import Fact, StepCached
from scheduler.farm import Farm
from scheduler.model import StepKey
from tests.scheduler.simulation import play
from tests.support.patience import PATIENCE_S


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'j'}"
    return str(request.getfixturevalue("postgres_url"))


async def _restored(journal: Journal) -> tuple[Farm, Views]:
    farm, views = Farm(), Views(_Silence())
    async for piece in journal.load():
        views.fold(farm.replaying(piece.facts), settle=False)
        if piece.records:
            views.restore(piece.records)
    views.settle()
    return farm, views


def _told(farm: Farm, views: Views) -> tuple[object, list[Fact], list[str]]:
    return invariants.durable(farm.state), farm.snapshot(), sorted(map(repr, views.records()))


@pytest.mark.parametrize("seed", range(6))
async def test_snapshot_and_tail_give_what_the_whole_journal_gives(tmp_path: Path, seed: int) -> None:
    """A farm's whole life is journalled in batches; after some of them a snapshot is made of what is durable."""
    calls = [durable for call in play(seed).calls if (durable := [fact for fact in call if fact.durable])]
    chance = random.Random(seed)
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'j'}")
    journal = Journal(engine)
    await journal.prepare()
    await journal.take_over()
    at = 0
    while at < len(calls):
        size = chance.randint(1, 20)
        await journal.append(list(chain.from_iterable(calls[at : at + size])))
        at += size
        # The first batch always, so that every life has one.
        if chance.random() < 0.1 or at == size:
            await compact(Journal(engine, epoch=journal.epoch))
    assert await journal.snapshots.ends()
    whole, views = Farm(), Views(_Silence())
    facts: Sequence[Fact] = list(chain.from_iterable(calls))
    views.fold(whole.replaying(facts), settle=False)
    views.settle()
    reader = Journal(engine)
    assert _told(*await _restored(reader)) == _told(whole, views)
    assert reader.tail < len(facts)
    await engine.dispose()


async def test_the_process_that_makes_snapshots_leaves_a_shorter_tail(database: str) -> None:
    engine = open_engine(database)
    journal = Journal(engine)
    await journal.prepare()
    await journal.take_over()
    for n in range(50):
        await journal.append([StepCached(StepKey(f"k{n}"))])
    await Compactor(database, journal).snapshot()
    assert (await journal.snapshots.ends(), journal.tail) == ([50], 0)
    await journal.append([StepCached(StepKey("k50"))])
    assert journal.tail == 1
    again = Journal(engine)
    farm, _ = await _restored(again)
    assert (len(farm.state.steps), again.tail) == (51, 1)
    await engine.dispose()


async def test_a_snapshot_is_due_once_the_tail_has_more_facts_than_it_would_have_itself(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite+aiosqlite:///{tmp_path / 'j'}")
    journal = Journal(engine)
    await journal.prepare()
    await journal.take_over()
    steps: set[StepKey] = set()
    compactor = Compactor("", journal, steps=lambda: len(steps), every=3)
    due = asyncio.create_task(compactor.due())
    for n in range(5):
        # Of each step a first fact, which makes it known.
        steps.add(StepKey(f"k{n}"))
        await journal.append([StepCached(StepKey(f"k{n}"))])
    for n in range(2):
        await journal.append([StepCached(StepKey(f"k{n}"))])
    assert not due.done()
    await journal.append([StepCached(StepKey("k0"))])
    async with asyncio.timeout(PATIENCE_S):
        await due
    journal.snapshot_taken(1)
    again = asyncio.create_task(compactor.due())
    await asyncio.sleep(0)
    assert not again.done()
    await journal.append([StepCached(StepKey("k0"))])
    async with asyncio.timeout(PATIENCE_S):
        await again
    await engine.dispose()


async def test_a_snapshot_of_a_coordinator_that_is_no_more_in_office_is_not_made(database: str) -> None:
    engine = open_engine(database)
    old, new = Journal(engine), Journal(engine)
    await old.prepare()
    await old.take_over()
    await old.append([StepCached(StepKey("k"))])
    await new.take_over()
    with pytest.raises(FencedError):
        await compact(Journal(engine, epoch=old.epoch))
    with pytest.raises(JournalError, match="another coordinator has taken over"):
        await Compactor(database, old).snapshot()
    assert await new.snapshots.ends() == []
    await engine.dispose()


_WRITER = """
import asyncio, sys
from coordinator.engine.compaction import compact
from coordinator.journal.journal import Journal
from infra.database import open_engine
from scheduler.facts import StepCached
async def main():
    engine = open_engine(sys.argv[1])
    journal = Journal(engine)
    await journal.prepare()
    await journal.take_over()
    async for _ in journal.load():
        pass
    n = int(sys.argv[2])
    async def snapshots():
        while True:
            await compact(Journal(engine, epoch=journal.epoch))
    making = asyncio.create_task(snapshots())
    while not making.done():
        await journal.append([StepCached(f"k{n}")])
        n += 1
        print(n, flush=True)
    await making
asyncio.run(main())
"""


async def test_a_writer_killed_at_any_moment_loses_nothing_that_was_stored(database: str) -> None:
    """A child appends and makes snapshots as fast as it can; it is killed after a chosen number of appends."""
    chance = random.Random(7)
    stored = 0
    for _ in range(5):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _WRITER, database, str(stored), stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert child.stdout is not None
        for _ in range(chance.randint(1, 150)):
            stored = int(await child.stdout.readline())
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        said = (await child.stdout.read()).split()
        stored = max([stored, *map(int, said)])
        await child.wait()
        engine = open_engine(database)
        farm, _ = await _restored(Journal(engine))
        await engine.dispose()
        keys = list(farm.state.steps)
        # The last append may have been stored without its writer living to say so.
        assert keys in ([f"k{n}" for n in range(stored)], [f"k{n}" for n in range(stored + 1)])
        stored = len(keys)
