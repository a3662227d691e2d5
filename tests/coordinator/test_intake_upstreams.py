"""A built path that nobody sends comes from an upstream that is trusted, with all that it refers to, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from coordinator.api.models import SubmissionState
from coordinator.api.requests import IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.client.api_client import ApiClient
from coordinator.config import CacheSettings, Settings, UpstreamSettings
from coordinator.errors import MissingMemberError
from coordinator.main import open_coordinator
from infra.cache.cache import Cache
from infra.cache.pulls import closure_pulls
from infra.cache.pulls.upstream import Upstream
from tests.coordinator.conftest import OpenedFarm
from tests.coordinator.test_engine import ScriptedWorker, output_path, report, started
from tests.coordinator.test_intake import IntakeHarness, limits, make, needs, room
from tests.support.cache import STORE_DIR, base_name, open_cache, publish, secret_key, store_path
from tests.support.graphs import Maker
from workers.wire.messages import Succeeded

__all__ = ["limits", "make", "room"]

KEY = secret_key("elsewhere-1", 9)
BELOW, BUILT, OTHER = (store_path(name) for name in ("below", "built", "other"))


@dataclass
class Elsewhere:
    """Another farm's cache, served over HTTP."""

    cache: Cache
    url: str = ""
    status: int = 200
    nars_sent: int = 0

    async def answer(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if self.status != 200:
            return web.Response(status=self.status)
        if name.endswith(".narinfo"):
            text = await self.cache.narinfo(name.removesuffix(".narinfo"))
            return web.Response(status=404) if text is None else web.Response(body=text)
        self.nars_sent += 1
        return web.Response(body=await self.cache.objects.get_bytes(name))


@pytest.fixture
async def elsewhere(tmp_path: Path) -> AsyncIterator[Elsewhere]:
    (tmp_path / "elsewhere").mkdir()
    async with open_cache(tmp_path / "elsewhere", [KEY]) as cache:
        made = Elsewhere(cache)
        app = web.Application()
        app.router.add_get("/{name:.*}", made.answer)
        async with TestServer(app) as server:
            made.url = str(server.make_url("/"))
            await publish(cache, BELOW)
            await publish(cache, BUILT, references=[BELOW, BUILT])
            await publish(cache, OTHER)
            yield made


@pytest.fixture
async def upstream(elsewhere: Elsewhere, room: IntakeHarness) -> AsyncIterator[Upstream]:
    async with Upstream(elsewhere.url, [KEY.public], STORE_DIR, lambda: 0.0) as made:
        room.intake.pulls.upstreams.append(made)
        yield made


def ask(*built: str, sources: tuple[str, ...] = ()) -> IntakeQuery:
    names = tuple(map(base_name, built))
    return IntakeQuery(store_dir="/nix/store", derivations=(), sources=(*names, *map(base_name, sources)), built=names)


async def test_a_built_path_that_an_upstream_has_is_had_from_there_with_its_closure(
    room: IntakeHarness, elsewhere: Elsewhere, upstream: Upstream
) -> None:
    missing = await room.intake.missing(ask(BUILT, store_path("nowhere"), sources=(OTHER,)))
    assert missing.sources == (base_name(store_path("nowhere")), base_name(OTHER)), "other sources are sent"
    assert missing.trouble == ""
    assert await room.cache.missing([BUILT, BELOW]) == set()
    narinfo = await room.cache.narinfo(base_name(BUILT)[:32])
    assert narinfo is not None
    assert f"References: {' '.join(sorted([base_name(BELOW), base_name(BUILT)]))}" in narinfo.decode()
    assert b"Sig: drover-test-1:" in narinfo
    await room.intake.missing(ask(BUILT))
    assert elsewhere.nars_sent == 2, "what is here is not fetched again"


async def test_a_submission_takes_a_built_path_from_an_upstream_before_it_is_refused(
    room: IntakeHarness, make: Maker, upstream: Upstream
) -> None:
    user = make.plain("user", sources=[BUILT])
    await room.send([user])
    assert needs(await room.submit(user)) == {"user": [[]]}
    assert await room.cache.missing([BUILT, BELOW]) == set()


async def test_nothing_is_fetched_of_a_closure_that_is_not_whole_or_not_signed_by_a_trusted_key(
    room: IntakeHarness, elsewhere: Elsewhere, upstream: Upstream
) -> None:
    torn = store_path("torn")
    await publish(elsewhere.cache, torn, references=[BELOW, OTHER])
    lost = elsewhere.cache.objects.local_path(await narinfo_url(elsewhere.cache, OTHER))
    assert lost is not None
    lost.unlink()
    missing = await room.intake.missing(ask(torn))
    assert missing.sources == (base_name(torn),)
    assert elsewhere.nars_sent == 0
    async with Upstream(elsewhere.url, [secret_key("stranger-1", 3).public], STORE_DIR, lambda: 0.0) as stranger:
        room.intake.pulls.upstreams[:] = [stranger]
        assert (await room.intake.missing(ask(BUILT))).sources == (base_name(BUILT),)
    assert elsewhere.nars_sent == 0


async def narinfo_url(cache: Cache, path: str) -> str:
    text = await cache.narinfo(base_name(path)[:32])
    assert text is not None
    return text.decode().split("URL: ")[1].splitlines()[0]


async def test_an_upstream_that_does_not_answer_is_named_in_the_refusal(
    room: IntakeHarness, make: Maker, elsewhere: Elsewhere, upstream: Upstream
) -> None:
    elsewhere.status = 503
    user = make.plain("user", sources=[BUILT])
    await room.send([user])
    with pytest.raises(MissingMemberError, match=rf"{BUILT}.*the upstream {upstream.url} does not answer"):
        await room.submit(user)
    assert upstream.url in (await room.intake.missing(ask(BUILT))).trouble


@pytest.mark.parametrize("bound", ["MAX_PULLED_PATHS", "MAX_PULLED_BYTES"])
async def test_a_pull_is_bounded(
    room: IntakeHarness, elsewhere: Elsewhere, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(closure_pulls, bound, 1)
    missing = await room.intake.missing(ask(BUILT))
    assert missing.sources == (base_name(BUILT),)
    assert "more than" in missing.trouble
    assert elsewhere.nars_sent == 0


async def test_a_farm_builds_on_a_path_that_its_configured_upstream_has(
    settings: Settings, make: Maker, elsewhere: Elsewhere
) -> None:
    worker = ScriptedWorker()
    trusted = UpstreamSettings(url=elsewhere.url, public_keys=(str(KEY.public),))
    settings = settings.model_copy(update={"cache": CacheSettings(upstreams=(trusted,))})
    async with (
        open_coordinator(settings, worker.start) as coordinator,
        ApiClient(coordinator.ready.url, coordinator.ready.token_file.read_text().strip()) as client,
    ):
        farm = OpenedFarm(coordinator, client, settings.state_dir, settings)
        await worker.hello()
        user = make.plain("user", sources=[BUILT])
        await client.send_derivations(in_thread(encode_derivations([(user.name, user.data)])))
        assert (await farm.client.missing(ask(BUILT))).sources == ()
        submitted = await farm.client.submit(SubmitRequest(roots=(RootRequest(attr="user", drv=user.drv),)))
        order = await started(farm, worker, 1)
        assert order.inputs == (BUILT,)
        await worker.speak(report(order, Succeeded(outputs=(await worker.upload(output_path(farm, order), b"made"),))))
        assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED
