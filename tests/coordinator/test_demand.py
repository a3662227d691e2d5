"""What people ask the cache for in vain is shown, and becomes priority or builds within the configured bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.cli.demand import demand_lines
from coordinator.client.api_client import ApiClient
from coordinator.config import Settings
from coordinator.demand import demand as room
from coordinator.demand_settings import DemandAction, DemandSettings
from coordinator.intake.limits import IntakeLimits
from coordinator.main import open_coordinator
from coordinator.stores.derivations import DerivationStore
from coordinator.stores.known_outputs import KnownOutputs
from infra.nix.store_path import base_name_of, hash_part_of
from tests.coordinator.conftest import OpenedFarm
from tests.coordinator.test_engine import ScriptedWorker, report, started
from tests.coordinator.test_intake import IntakeHarness, limits
from tests.coordinator.test_web import browser_of
from tests.support.cache import open_cache, store_path
from tests.support.graphs import Made, Maker
from workers.wire.messages import Succeeded

__all__ = ["limits"]


@asynccontextmanager
async def farm_with(tmp_path: Path, worker: ScriptedWorker, demand: DemandSettings) -> AsyncIterator[OpenedFarm]:
    settings = Settings(state_dir=tmp_path / "farm", port=0, demand=demand)
    async with (
        open_coordinator(settings, worker.start) as coordinator,
        ApiClient(coordinator.ready.url, coordinator.ready.token_file.read_text().strip()) as client,
    ):
        yield OpenedFarm(coordinator, client, tmp_path, settings)


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LOOK_EVERY_S", 0.01)


async def sent(farm: OpenedFarm, *members: Made) -> None:
    """Let a submitter have sent derivations, and want them no more."""
    await farm.client.send_derivations(in_thread(encode_derivations([(each.name, each.data) for each in members])))
    made = await farm.client.submit(wish(*members))
    await farm.client.cancel(made.id)


def wish(*members: Made) -> SubmitRequest:
    return SubmitRequest(roots=tuple(RootRequest(attr=each.name, drv=each.drv) for each in members))


async def ask(farm: OpenedFarm, paths: Sequence[str], *people: int) -> None:
    """Ask for narinfos, each as several people: from addresses of their own."""
    for person in people:
        connector = aiohttp.TCPConnector(local_addr=(f"127.0.{person}.1", 0))
        async with aiohttp.ClientSession(connector=connector) as session:
            for path in paths:
                async with session.get(f"{farm.coordinator.ready.cache_url}/{hash_part_of(path)}.narinfo") as answer:
                    assert answer.status == 404


async def test_what_was_asked_for_in_vain_is_listed_with_name_and_people_until_it_is_there(tmp_path: Path) -> None:
    worker, make = ScriptedWorker(), Maker()
    hello = make.plain("hello-2.12", outputs=("doc", "out"))
    nowhere = store_path("nowhere")
    async with farm_with(tmp_path, worker, DemandSettings()) as farm:
        await sent(farm, hello)
        await ask(farm, [hello.outputs["doc"]], *range(10))
        await ask(farm, [hello.outputs["out"], nowhere], 1)
        await ask(farm, [nowhere], 1)

        async def listed() -> list[tuple[str, str, str]]:
            return [(each.path, each.name, each.system) for each in await farm.client.demand()]

        known = [(hello.outputs[name], "hello-2.12", "x86_64-linux") for name in ("doc", "out")]
        while await listed() != [*known, ("", "", "")]:
            await ask(farm, [hello.outputs["out"]], 1)
        doc, _, unknown = await farm.client.demand()
        assert 6 <= doc.people <= 14
        assert (doc.state, doc.drv, unknown.hash_part) == ("abandoned", hello.drv, hash_part_of(nowhere))
        assert (unknown.people, unknown.requests) == (1, 2)
        lines = demand_lines([doc, unknown], doc.last_at + 90.0)
        assert lines[1].endswith("x86_64-linux  1m30s ago  abandoned")
        assert lines[2].endswith("no derivation here makes it")
        assert [each.hash_part for each in await farm.client.demand(1)] == [doc.hash_part]
        async with browser_of(farm) as browser:
            await browser.log_in()
            page = (await browser.get("/caches/default"))[1]
        assert "People wait for" in page
        assert "hello-2.12" in page
        # Nothing is built for it, and what has been built is waited for no more.
        await worker.hello()
        submitted = await farm.client.submit(wish(hello))
        order = await started(farm, worker)
        outputs = [await worker.upload(path) for path in hello.outputs.values()]
        named = tuple(each.model_copy(update={"name": name}) for name, each in zip(hello.outputs, outputs, strict=True))
        await worker.speak(report(order, Succeeded(outputs=named)))
        await farm.ended(submitted.id)
        assert [each.path for each in await farm.client.demand()] == [""]
        assert len(worker.orders) == 1


async def test_strangers_have_built_what_a_submitter_sent_once_and_no_more_than_the_bound(tmp_path: Path) -> None:
    worker, make = ScriptedWorker(), Maker()
    below = make.plain("below")
    tops = [make.plain(f"top-{number}", [below]) for number in range(3)]
    build = DemandSettings(action=DemandAction.BUILD, people=2, per_hour=2)
    async with farm_with(tmp_path, worker, build) as farm:
        await sent(farm, below, *tops)
        await worker.hello()
        await ask(farm, [store_path(f"made-up {number}") for number in range(50)], 1, 2)
        await ask(farm, [top.outputs["out"] for top in tops[1:]], 1)
        assert worker.orders == [], "one alone"
        await ask(farm, [tops[0].outputs["out"]], 1, 2, 3)
        order = await started(farm, worker)
        assert order.drv_path == below.drv
        await ask(farm, [top.outputs["out"] for top in tops[1:]], 2, 3)
        await farm.until(lambda: len(farm.coordinator.views.submission_rows()) == 3)
        await ask(farm, [top.outputs["out"] for top in tops], 4)
        made = [each for each in await farm.client.submissions() if each.owner == "demand"]
        assert len(made) == 2
        assert {(each.priority, len(each.roots)) for each in made} == {(-5, 1)}
        assert {each.submission for each in await farm.client.demand()} == {"", *(each.id for each in made)}


async def test_a_submission_that_is_to_build_what_people_wait_for_goes_before_others_once(tmp_path: Path) -> None:
    worker, make = ScriptedWorker(), Maker()
    below, above = make.plain("below"), make.plain("first")
    top = make.plain("top", [below])
    action = DemandSettings(action=DemandAction.PRIORITY)
    async with farm_with(tmp_path, worker, action) as farm:
        members = [(each.name, each.data) for each in (below, above, top)]
        await farm.client.send_derivations(in_thread(encode_derivations(members)))
        other, wanted = await farm.client.submit(wish(above)), await farm.client.submit(wish(top))
        await ask(farm, [below.outputs["out"]], 1, 2, 3)
        row = farm.coordinator.views.submission(wanted.id)
        await farm.until(lambda: row.terms.priority == 1)
        await ask(farm, [below.outputs["out"]], 4, 5, 6)
        assert (await farm.client.submission(other.id)).priority == 0
        assert row.terms.priority == 1
        (listed,) = await farm.client.demand()
        assert listed.note == f"submission {wanted.id} has priority 1 because of it"


async def test_what_nothing_can_be_done_for_keeps_nothing_from_what_is_asked_for_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CONSIDERED", 1)
    worker, make = ScriptedWorker(), Maker()
    unwanted, wanted = make.plain("unwanted"), make.plain("wanted")
    async with farm_with(tmp_path, worker, DemandSettings(action=DemandAction.PRIORITY)) as farm:
        await sent(farm, unwanted)
        await farm.client.send_derivations(in_thread(encode_derivations([(wanted.name, wanted.data)])))
        made = await farm.client.submit(wish(wanted))
        await ask(farm, [unwanted.outputs["out"]], *range(9))
        await ask(farm, [wanted.outputs["out"]], 1, 2, 3)
        row = farm.coordinator.views.submission(made.id)
        await farm.until(lambda: row.terms.priority == 1)


async def test_a_question_for_a_closure_counts_what_it_asks_for_in_vain_once(tmp_path: Path) -> None:
    made = Maker().plain("hello-1")
    path, nowhere = made.outputs["out"], store_path("nowhere")
    async with farm_with(tmp_path, ScriptedWorker(), DemandSettings()) as farm:
        await sent(farm, made)
        names = [base_name_of(path), hash_part_of(path), base_name_of(nowhere), "no hash at all", "e" * 255]
        async with aiohttp.ClientSession() as session:
            url = f"{farm.coordinator.ready.cache_url}/narinfos"
            async with session.post(url, json={"paths": names, "closure": True}) as answer:
                assert sorted((await answer.json())["missing"]) == sorted(names)
        while not any(each.known for each in await farm.client.demand()):
            pass
        found = {each.hash_part: (each.name, each.people, each.requests) for each in await farm.client.demand()}
        assert found == {hash_part_of(path): ("hello-1", 1, 1), hash_part_of(nowhere): ("", 1, 1)}


async def test_nothing_is_counted_where_demand_is_off(tmp_path: Path) -> None:
    async with farm_with(tmp_path, ScriptedWorker(), DemandSettings(action=DemandAction.OFF)) as farm:
        await ask(farm, [store_path("x")], 1, 2)
        assert await farm.client.demand() == []


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_outputs_are_found_by_the_hash_part_of_any_of_them(
    tmp_path: Path, database: str, request: pytest.FixtureRequest, limits: IntakeLimits
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/d.sqlite3"
    if database == "postgresql":
        url = str(request.getfixturevalue("postgres_url"))
    make = Maker()
    sent_once, known_only = make.plain("sent", outputs=("dev", "out", "man")), make.plain("known")
    derivations, outputs = DerivationStore.open(url), KnownOutputs.open(url, "/nix/store")
    await derivations.prepare()
    try:
        async with open_cache(tmp_path) as cache:
            harness = IntakeHarness(cache, derivations, limits)
            await harness.send([sent_once, known_only])
            await harness.submit(sent_once)
        for _ in range(2):
            await outputs.prepare()
        parts = [hash_part_of(path) for each in (sent_once, known_only) for path in each.outputs.values()]
        found = await outputs.find([*parts, "0" * 32])
        assert {each.path for each in found} == set(sent_once.outputs.values()), "what was never planned is not known"
        assert {(each.drv, each.name, each.system) for each in found} == {(sent_once.drv, "sent", "x86_64-linux")}
    finally:
        await outputs.close()
        await derivations.close()
