"""Plans of wish lists at a farm that has built some of them, with upstreams that have others, are silent or gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from coordinator.api.plan_models import PlanView, WishPlan
from coordinator.api.requests import IntakeQuery, PlanQuery
from coordinator.cli.evaluation import EvaluationRequest
from coordinator.cli.plan import PlanRequest, plan
from coordinator.cli.wish_reading import WishRequest
from coordinator.client.errors import RefusedError
from coordinator.config import CacheSettings, LimitSettings, Settings, UpstreamSettings
from coordinator.plans import lookup
from coordinator.wishes.document import document_of
from coordinator.wishes.reading import WishReading, read_wishes
from infra.nix.store_path import StoreDir
from tests.coordinator.test_intake_upstreams import BUILT, KEY, Elsewhere, elsewhere
from tests.support.farm import BIN
from tests.support.patience import PATIENCE_S
from tests.support.wishes import catalog_entry, flox_lock, store_path

from .conftest import PRELUDE, OpenedFarm, OpenFarm
from .test_rebuild_api import built, graph

__all__ = ["elsewhere"]

LINUX, MAC = "x86_64-linux", "aarch64-darwin"


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    """An upstream that takes questions and answers none."""
    ended = asyncio.Event()

    async def wait(_request: web.Request) -> web.Response:
        await ended.wait()
        return web.Response(status=503)

    app = web.Application()
    app.router.add_get("/{name:.*}", wait)
    async with TestServer(app) as server:
        yield str(server.make_url("/"))
        ended.set()


@pytest.fixture
def settings(tmp_path: Path, elsewhere: Elsewhere, silent: str) -> Settings:
    urls = (elsewhere.url, silent, f"http://127.0.0.1:{unused_port()}")
    upstreams = tuple(UpstreamSettings(url=url, public_keys=(str(KEY.public),)) for url in urls)
    return Settings(
        state_dir=tmp_path / "farm",
        port=0,
        limits=LimitSettings(request_bytes=1024 * 1024),
        cache=CacheSettings(upstreams=upstreams),
    )


def entry(name: str, drv: str, out: str, system: str = LINUX, **changes: Any) -> dict[str, Any]:
    return {**catalog_entry(name, system), "derivation": drv, "outputs": {"out": out}, **changes}


async def locked(farm: OpenedFarm) -> bytes:
    """Build some of a graph, and return a lock of all kinds of packages."""
    made = await built(farm, graph(status=1), "copy", "above")
    fresh = (await farm.evaluate(graph(comment="other"), "copy", "mac"))[:2]
    step = {root.attr: root for root in fresh}
    store = farm.root / "client"
    outputs = {
        name: "/nix/store/"
        + (await asyncio.to_thread((store / root.drv[1:]).read_text)).split('"out","/nix/store/')[1].split('"')[0]
        for name, root in step.items()
    }
    return flox_lock(
        [
            entry("copy", *made["copy"]),
            entry("above", *made["above"]),
            entry("elsewhere", store_path("elsewhere.drv"), BUILT),
            entry("fresh", step["copy"].drv, outputs["copy"]),
            entry("fresh", step["mac"].drv, outputs["mac"], MAC),
            entry("never", store_path("never-1.drv"), store_path("never-1")),
            entry("paid", store_path("paid-1.drv"), store_path("paid-1"), unfree=True),
            {"install_id": "notes", "store_path": store_path("notes"), "system": LINUX, "priority": 5},
        ],
        systems=(LINUX, MAC),
    )


async def asked(farm: OpenedFarm, lock: bytes, *present: str) -> tuple[PlanView, dict[tuple[str, str], WishPlan]]:
    wishes = read_wishes("manifest.lock", lock, WishReading(StoreDir("/nix/store"), LINUX))
    view = await farm.client.plan(PlanQuery(wishes=document_of(wishes), present=present))
    return view, {(each.name, each.system): each for each in view.wishes}


async def shown(farm: OpenedFarm, lock: bytes) -> tuple[list[str], str]:
    """Run the command on a lock; return its lines and its Markdown."""
    file, page = farm.root / "manifest.lock", farm.root / "plan.markdown"
    await asyncio.to_thread(file.write_bytes, lock)
    ready = farm.coordinator.ready
    child = await asyncio.create_subprocess_exec(
        *(str(BIN / "drover"), "plan", file, "--markdown", page, "--store", farm.root / "client"),
        env={**os.environ, "DROVER_URL": ready.url, "DROVER_TOKEN_FILE": str(ready.token_file)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        out, errors = await child.communicate()
    assert child.returncode == 0, errors.decode()
    return out.decode().splitlines(), await asyncio.to_thread(page.read_text)


async def planned_here(farm: OpenedFarm, text: str, *attrs: str) -> dict[str, dict[str, Any]]:
    """Plan attributes of a file that is evaluated here and never sent; return the wishes by name."""
    file, page = farm.root / "default.nix", farm.root / "here.json"
    await asyncio.to_thread(file.write_text, PRELUDE + text)
    evaluation = EvaluationRequest(attrs=attrs, evaluators=1, eval_cache=False)
    settings = ("--option", "substituters", "")
    wishes = WishRequest((str(file),), evaluation, settings=settings, store=str(farm.root / "client"))
    with page.open("w") as out, contextlib.redirect_stdout(out):
        assert await plan(farm.client, PlanRequest(wishes, as_json=True)) == 0
    return {each["name"]: each for each in json.loads(await asyncio.to_thread(page.read_text))["wishes"]}


async def test_a_plan_says_of_each_package_what_became_of_it_and_changes_nothing(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch, elsewhere: Elsewhere
) -> None:
    # What answers has time for that on a busy machine; what does not is waited for as long.
    monkeypatch.setattr(lookup, "PATIENCE_S", 2.0)
    monkeypatch.setattr(lookup, "BUDGET_S", PATIENCE_S)
    async with open_farm("one") as farm:
        lock = await locked(farm)
        steps, submissions = farm.coordinator.views.step_total(), len(await farm.client.submissions())
        view, found = await asked(farm, lock)
        assert {key: each.state for key, each in found.items()} == {
            ("copy", LINUX): "here",
            ("above", LINUX): "failed",
            ("elsewhere", LINUX): "upstream",
            ("fresh", LINUX): "buildable",
            ("fresh", MAC): "no_worker",
            ("never", LINUX): "buildable",
            ("paid", LINUX): "unfree",
            ("notes", LINUX): "gone",
        }
        assert found["above", LINUX].cause_name == "bad"
        assert found["above", LINUX].since > 0
        assert found["elsewhere", LINUX].paths == 2
        # `copy` and `root` were built before, with another comment.
        fresh, never = found["fresh", LINUX], found["never", LINUX]
        assert (fresh.steps, fresh.unknown, fresh.build_s > 0) == (2, 0, True)
        assert (never.steps, never.unknown, never.build_s) == (0, 1, 0)
        assert [each.state for each in view.upstreams] == ["answered", "slow", "away"]
        linux, mac = view.systems
        assert (linux.system, linux.upstream_paths, linux.here_paths) == (LINUX, 2, 1)
        assert (linux.steps, linux.ungraphed, linux.slots) == (5, 1, 2)
        assert (mac.counts, mac.slots) == ({"no_worker": 1}, 0)

        less, _ = await asked(farm, lock, BUILT)
        assert (less.systems[0].present, less.systems[0].upstream_paths) == (1, 0)

        # What this machine alone has is counted by its word, with the history of the farm.
        here = await planned_here(farm, graph(comment="third"), "copy", "above")
        assert [(each["steps"], each["unknown"], each["state"]) for each in here.values()] == [
            (2, 0, "buildable"),
            (4, 2, "buildable"),
        ]
        drvs = tuple(each.name for each in (farm.root / "client/nix/store").glob("*.drv"))
        stored = (
            await farm.client.missing(IntakeQuery(store_dir="/nix/store", derivations=drvs, sources=()))
        ).derivations
        assert len(stored) == 4

        assert farm.coordinator.views.step_total() == steps
        assert len(await farm.client.submissions()) == submissions
        assert elsewhere.nars_sent == 0

        lines, page = await shown(farm, lock)
        assert (lines[0].split(), lines[1].split()) == (["PACKAGE", LINUX, MAC], ["copy", "here", "no", "package"])
        assert max(map(len, lines[:9])) <= 80
        assert "fresh         build " in "\n".join(lines)
        for sentence in (
            f"{LINUX} (this machine): 1 here, 1 upstream, 2 build, 1 fails, 1 unfree, 1 gone",
            "  Nix would fetch 1 paths from the farm (",
            "how long fetching takes is unknown; --rate says how fast this machine fetches",
            "  and build 5 derivations here, for about ",
            " as the farm's workers took and an unknown time for 3 of them; 1 of them with what they stand on, which",
            f"above fails on {LINUX} because of bad since 20",
            f"fresh: no worker builds for {MAC}",
            "notes: no cache has it, and a path without derivation is only copied",
            "did not answer in time: it counts as having nothing",
            "does not answer: it counts as having nothing",
        ):
            assert any(line.startswith(sentence) or sentence in line for line in lines), (sentence, lines)
        assert "| <code>above</code> | fails | no package |" in page

        other = WishReading(StoreDir("/gnu/store"), LINUX)
        wishes = read_wishes("x", store_path("a", store_dir="/gnu/store").encode(), other)
        with pytest.raises(RefusedError, match="not in the store directory /nix/store"):
            await farm.client.plan(PlanQuery(wishes=document_of(wishes)))
