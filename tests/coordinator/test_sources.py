"""Fixed outputs come from what is here, from upstreams and from mirrors, before a worker goes to the network."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from coordinator.api.models import StepStatus, SubmissionState
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.api.source_routes import SourceTrouble
from coordinator.cli.question_commands import TROUBLES
from coordinator.cli.sources import source_lines
from coordinator.client.api_client import ApiClient
from coordinator.config import CacheSettings, Settings, UpstreamSettings
from coordinator.main import open_coordinator
from coordinator.source_settings import SourceSettings
from coordinator.sources.listing import urls_of
from infra.cache.cache import Cache
from infra.nix.content import FixedContent
from infra.nix.hashing import sha256_text
from infra.nix.store_path import hash_part_of
from tests.coordinator.conftest import OpenedFarm, OpenFarm
from tests.coordinator.test_demand import wish
from tests.coordinator.test_engine import ScriptedWorker, report, started
from tests.infra.cache.test_content_offers import put
from tests.infra.nix.test_content import plain_file
from tests.support.cache import open_cache, secret_key
from tests.support.graphs import Made, Maker
from workers.wire.messages import Failed, Succeeded

KEY = secret_key("elsewhere-1", 9)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Elsewhere:
    """A mirror of sources, and another farm's cache, in one server."""

    #: What is sent for the hash of a content; a number is a status, a text an address that has it.
    files: dict[str, bytes | int | str] = field(default_factory=dict)
    cache: Cache | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""
    #: Set while it answers.
    answers: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.asked.append(name)
        await self.answers.wait()
        if name.startswith("mirror/sha256/"):
            found = self.files.get(name.rpartition("/")[2], 404)
            if isinstance(found, str):
                raise web.HTTPFound(found)
            return web.Response(status=found) if isinstance(found, int) else web.Response(body=found)
        if self.cache is not None and name.endswith(".narinfo"):
            text = await self.cache.narinfo(name.removesuffix(".narinfo"))
            return web.Response(status=404) if text is None else web.Response(body=text)
        return web.Response(body=await self.cache.objects.get_bytes(name)) if self.cache else web.Response(status=404)


@pytest.fixture
async def elsewhere() -> AsyncIterator[Elsewhere]:
    made, app = Elsewhere(), web.Application()
    app.router.add_get("/{name:.*}", made.answer)
    async with TestServer(app) as server:
        made.url = str(server.make_url("")).rstrip("/")
        made.answers.set()
        yield made


@asynccontextmanager
async def farm_with(
    tmp_path: Path, worker: ScriptedWorker, sources: SourceSettings, cache: CacheSettings | None = None
) -> AsyncIterator[OpenedFarm]:
    settings = Settings(state_dir=tmp_path / "farm", port=0, sources=sources, cache=cache or CacheSettings())
    async with (
        open_coordinator(settings, worker.start) as coordinator,
        ApiClient(coordinator.ready.url, coordinator.ready.token_file.read_text().strip()) as client,
    ):
        yield OpenedFarm(coordinator, client, tmp_path, settings)


async def submit(farm: OpenedFarm, *members: Made, roots: int = 1) -> str:
    await farm.client.send_derivations(in_thread(encode_derivations([(each.name, each.data) for each in members])))
    return (await farm.client.submit(wish(*members[-roots:]))).id


async def test_what_a_mirror_has_is_neither_fetched_nor_built_and_what_it_lies_about_is(
    tmp_path: Path, elsewhere: Elsewhere
) -> None:
    worker, make = ScriptedWorker(), Maker()
    good, bad = make.fixed("good", b"right"), make.fixed("bad", b"promised", url="https://example.org/bad")
    top = make.plain("top", [good, bad])
    elsewhere.files = {digest(b"right"): b"right", digest(b"promised"): b"a lie"}
    async with farm_with(tmp_path, worker, SourceSettings(mirrors=(f"{elsewhere.url}/mirror",))) as farm:
        await worker.hello()
        await submit(farm, good, bad, top)
        order = await started(farm, worker)
        assert order.drv_path == bad.drv, "the other one needs no worker"
        await farm.until(lambda: farm.coordinator.views.step(good.step).state is StepStatus.DONE)
        narinfo = await farm.coordinator.cache.narinfo(hash_part_of(good.outputs["out"]))
        assert narinfo is not None
        assert "CA: fixed:sha256:" in narinfo.decode()
        (source,) = await farm.client.sources()
        lie = f"{elsewhere.url}/mirror sent sha256 {digest(b'a lie')} for {digest(b'promised')}"
        assert (source.trouble, source.answers) == (SourceTrouble.NETWORK_ONLY, (lie,))
        # Its address is dead too: once more, then it is said so.
        gone = Failed(reason="source_gone", message="HTTP error 404")
        await worker.speak(report(order, gone))
        order = await started(farm, worker, 2)
        await worker.speak(report(order, gone))
        await farm.until(lambda: farm.coordinator.views.step(bad.step).state is StepStatus.FAILED)
        (source,) = await farm.client.sources(["gone"])
        assert source.urls == ("https://example.org/bad",)
        assert source.content == FixedContent("", "sha256", hashlib.sha256(b"promised").digest()).address
        assert source_lines(source)[0] == "bad  gone"
        assert await farm.client.sources(["mismatch"]) == []
        assert tuple(SourceTrouble) == TROUBLES


async def test_a_worker_without_network_gets_sources_from_the_farm_or_not_at_all(
    tmp_path: Path, elsewhere: Elsewhere
) -> None:
    worker, make = ScriptedWorker(), Maker()
    source, other = make.fixed("source", b"content"), make.fixed("other", b"nowhere")
    top = make.plain("top", [source])
    elsewhere.files = {digest(b"content"): 503}
    async with farm_with(tmp_path, worker, SourceSettings(mirrors=(f"{elsewhere.url}/mirror",))) as farm:
        await worker.hello(network=False)
        made = await submit(farm, source, other, top, roots=2)
        await farm.until(lambda: len(elsewhere.asked) >= 1)
        assert worker.orders == []
        reasons = await farm.client.why(other.step)
        assert "network" in str(reasons)
        # It comes with another submission, under another name, from a client's own store.
        content = FixedContent("", "sha256", hashlib.sha256(b"content").digest())
        await put(farm.coordinator.cache, content, "renamed", plain_file(b"content"))
        await submit(farm, source, roots=1)
        assert (await started(farm, worker)).drv_path == top.drv
        assert (await farm.client.submission(made)).state is SubmissionState.RUNNING


async def test_a_mirror_that_leads_to_what_is_no_host_counts_as_away(tmp_path: Path, elsewhere: Elsewhere) -> None:
    worker, source = ScriptedWorker(), Maker().fixed("source", b"content")
    elsewhere.files = {digest(b"content"): f"http://{'a' * 64}/content"}
    async with farm_with(tmp_path, worker, SourceSettings(mirrors=(f"{elsewhere.url}/mirror",))) as farm:
        await worker.hello()
        await submit(farm, source)
        assert (await started(farm, worker)).drv_path == source.drv
        (listed,) = await farm.client.sources()
        assert listed.answers[0].startswith(f"{elsewhere.url}/mirror does not answer: ")


@pytest.mark.parametrize(
    ("attrs", "urls"),
    [
        ('{"url": "https://one"}', ("https://one",)),
        ('{"urls": ["https://one", 2, "https://two"]}', ("https://one", "https://two")),
        ('{"url": 5, "urls": null}', ()),
        ('{"url": {"https://one": 1}}', ()),
        ("[]", ()),
        ("{", ()),
    ],
)
def test_the_addresses_of_a_derivation_are_found_in_whatever_its_attributes_hold(
    attrs: str, urls: tuple[str, ...]
) -> None:
    assert urls_of(Maker().fixed("source", b"content", __json=attrs).data) == urls


async def test_a_start_that_waits_for_a_mirror_is_dropped_with_its_lease(tmp_path: Path, elsewhere: Elsewhere) -> None:
    worker, source = ScriptedWorker(), Maker().fixed("source", b"content")
    elsewhere.answers.clear()
    async with farm_with(tmp_path, worker, SourceSettings(mirrors=(f"{elsewhere.url}/mirror",))) as farm:
        await worker.hello()
        made = await submit(farm, source)
        row = farm.coordinator.views.step(source.step)
        await farm.until(lambda: bool(elsewhere.asked) and row.state is StepStatus.RUNNING)
        # The agent began anew and knows nothing of it; then nothing is there.
        await worker.hello(incarnation="2")
        elsewhere.answers.set()
        order = await started(farm, worker)
        assert order.attempt == 2
        await farm.client.cancel(made)
        await farm.until(lambda: [each.attempt for each in worker.cancelled] == [2])


async def test_an_upstream_that_signs_a_fixed_output_is_believed_only_by_its_hash(
    tmp_path: Path, elsewhere: Elsewhere
) -> None:
    worker, make = ScriptedWorker(), Maker()
    good, bad = make.fixed("good", b"right"), make.fixed("bad", b"promised")
    (tmp_path / "elsewhere").mkdir()
    async with open_cache(tmp_path / "elsewhere", [KEY]) as cache:
        elsewhere.cache = cache
        for made, archive in ((good, b"right"), (bad, b"a lie")):
            content = FixedContent.of_derivation(made.data)
            assert content is not None
            await put(cache, content, made.name[33:].removesuffix(".drv"), plain_file(archive))
        upstreams = CacheSettings(upstreams=(UpstreamSettings(url=elsewhere.url, public_keys=(str(KEY.public),)),))
        async with farm_with(tmp_path, worker, SourceSettings(), upstreams) as farm:
            await worker.hello()
            await submit(farm, good, bad, roots=2)
            assert (await started(farm, worker)).drv_path == bad.drv
            await farm.until(lambda: farm.coordinator.views.step(good.step).state is StepStatus.DONE)
            assert len(worker.orders) == 1


async def test_what_one_build_fetched_is_at_once_there_for_others_that_call_it_differently(tmp_path: Path) -> None:
    worker, make = ScriptedWorker(), Maker()
    one, two = make.fixed("one", b"shared"), make.fixed("two", b"shared")
    async with farm_with(tmp_path, worker, SourceSettings()) as farm:
        await worker.hello()
        made = await submit(farm, one, two, roots=2)
        order = await started(farm, worker)
        fetched = one if order.drv_path == one.drv else two
        output = await worker.upload(fetched.outputs["out"], b"shared")
        output = output.model_copy(update={"ca": f"fixed:{sha256_text(hashlib.sha256(b'shared').digest())}"})
        await worker.speak(report(order, Succeeded(outputs=(output,))))
        assert (await farm.ended(made)).state is SubmissionState.SUCCEEDED
        assert len(worker.orders) == 1


async def test_real_nix_builds_a_content_once_whatever_it_is_called(open_farm: OpenFarm) -> None:
    fixed = """
    {{ name }}: derivation {{
      inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo -n shared > $out" ];
      outputHashMode = "{mode}"; outputHashAlgo = "sha256"; outputHash = "{hash}";
    }}"""
    flat = fixed.format(mode="flat", hash=digest(b"shared"))
    archive = fixed.format(mode="recursive", hash=digest(plain_file(b"shared")))
    text = f"""rec {{
      one = ({flat}) {{ name = "one"; }}; two = ({flat}) {{ name = "two"; }};
      three = ({archive}) {{ name = "three"; }};
      top = run "top" "read -r line < ${{two}} || [ $line = shared ] && read -r line < ${{three}} || echo $line > $out";
    }}"""
    async with open_farm("w") as farm:
        first = await farm.ended((await farm.submit(text, "one")).id)
        assert first.state is SubmissionState.SUCCEEDED
        second = await farm.ended((await farm.submit(text, "top")).id)
        assert second.state is SubmissionState.SUCCEEDED
        names = {
            farm.coordinator.views.name_of(row): len(await farm.client.timeline(row.key))
            for row in farm.coordinator.views.rows()
        }
        assert names == {"one": 1, "two": 0, "three": 0, "top": 1}
