"""A graph that is submitted again and again, with nothing to build, costs the farm's databases next to nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from coordinator.api.models import SubmissionState
from coordinator.api.requests import IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations, in_thread
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.support.cache import base_name, store_path, uploaded_claim
from tests.support.graphs import Made, Maker

#: Roots of the graph, all of them held, and sources that they name.
HELD = 600
SOURCES = 100
#: Times that it is submitted after the first.
REPEATS = 5
#: Bytes of the journal for each root of a repeat: its step's key, compressed. It was 274 with the whole note.
JOURNAL_BYTES_A_ROOT = 60
#: Bytes that the cache's database may grow by with each repeat: two pages; 192,512 with leases and roots of their own.
CACHE_BYTES = 8192


def size(database: Path) -> int:
    """Bytes of all pages, those that are free too."""
    with closing(sqlite3.connect(database)) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (page,) = connection.execute("PRAGMA page_size").fetchone()
    return int(pages) * int(page)


def leases(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute("SELECT count(*) FROM roots WHERE kind = 'lease'").fetchone()[0])


async def sent(farm: OpenedFarm) -> list[Made]:
    """Send a graph whose outputs and sources the cache has."""
    maker = Maker()
    sources = [store_path(f"source-{number}") for number in range(SOURCES)]
    members = [maker.plain(f"held-{number}", sources=[sources[number % SOURCES]]) for number in range(HELD)]
    cache = farm.coordinator.cache
    one = await uploaded_claim(cache, sources[0])
    paths = [*sources, *(made.outputs["out"] for made in members)]
    # Thousands of paths with the same bits: the object is uploaded once.
    await cache.publish([replace(one, path=replace(one.path, store_path=path)) for path in paths])
    await farm.client.send_derivations(in_thread(encode_derivations((made.name, made.data) for made in members)))
    return members


async def ask_and_submit(farm: OpenedFarm, members: list[Made]) -> str:
    """Do what `drover build` does for a graph that was sent before; returns the submission's name."""
    sources = dict.fromkeys(base_name(store_path(f"source-{number}")) for number in range(SOURCES))
    names = tuple(made.name for made in members)
    missing = await farm.client.missing(IntakeQuery(store_dir="/nix/store", derivations=names, sources=tuple(sources)))
    assert missing.sources == ()
    roots = tuple(RootRequest(attr=f"packages.x86_64-linux.{made.name[33:-4]}", drv=made.drv) for made in members)
    view = await farm.client.submit(SubmitRequest(roots=roots))
    assert (view.state, view.counts.held) == (SubmissionState.SUCCEEDED, HELD)
    return view.id


async def test_a_repeat_adds_neither_leases_nor_roots_to_the_cache_and_no_note_to_the_journal(
    open_farm: OpenFarm,
) -> None:
    async with open_farm() as farm:
        cache, journal = farm.root / "farm" / "cache.sqlite3", farm.root / "farm" / "journal.sqlite3"
        members = await sent(farm)
        first = await ask_and_submit(farm, members)
        await farm.client.collect("default", dry_run=False)
        before, written = size(cache), size(journal)
        for _ in range(REPEATS):
            await ask_and_submit(farm, members)
        await farm.client.collect("default", dry_run=False)
        assert leases(cache) == 0
        assert (size(journal) - written) / REPEATS <= JOURNAL_BYTES_A_ROOT * HELD
        assert (size(cache) - before) / REPEATS <= CACHE_BYTES
        [root] = await farm.client.cache_roots("default")
        assert (root.kind, root.name, root.paths) == ("submission", first, HELD)


async def test_paths_that_an_answer_calls_present_stay_until_their_submission_is_a_root(
    open_farm: OpenFarm,
) -> None:
    """Another client's submission of the same graph ends no lease that this one still needs."""
    async with open_farm() as farm:
        cache = farm.root / "farm" / "cache.sqlite3"
        members = await sent(farm)
        sources = tuple(base_name(store_path(f"source-{number}")) for number in range(SOURCES))
        query = IntakeQuery(store_dir="/nix/store", derivations=(), sources=sources)
        assert (await farm.client.missing(query)).sources == ()
        await ask_and_submit(farm, members)
        await farm.client.collect("default", dry_run=False)
        assert leases(cache) == 1
        roots = tuple(RootRequest(attr="", drv=made.drv) for made in members)
        await farm.client.submit(SubmitRequest(roots=roots))
        await farm.client.collect("default", dry_run=False)
        assert leases(cache) == 0
