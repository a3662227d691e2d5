"""Bytes of a fetch on their way reach a watcher and the pages while they move, over a real worker, and no journal."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

import pytest

from coordinator.api.models import Ended, StepChanged, TransfersChanged, TransferView
from coordinator.cli.lines import plain
from coordinator.cli.live import Window
from coordinator.cli.top import farm_lines
from infra.nix.narinfo import NarInfo
from tests.coordinator.conftest import OpenFarm
from tests.coordinator.test_web import browser_of
from tests.support.patience import PATIENCE_S
from workers.agent import outbox
from workers.agent.farm_sources import FarmSources

HALF = re.compile(r"-large\">[\d.]+ KB of [\d.]+ KB</span>")
READS = """rec {
  large = run "large" "i=0; while [ $i -lt 3000 ]; do echo a line of some length, number $i; i=$((i+1)); done > $out";
  it = run "it" "read x < ${large}; echo > $out";
}"""


async def test_a_watcher_and_the_pages_see_the_bytes_of_an_input_while_it_comes(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "TRANSFERS_EVERY_S", 0.05)
    let_go = asyncio.Event()
    whole = FarmSources.nar

    async def halfway(sources: FarmSources, info: NarInfo) -> AsyncGenerator[bytes, None]:
        data = b"".join([chunk async for chunk in whole(sources, info)])
        yield data[: len(data) // 2]
        await let_go.wait()
        yield data[len(data) // 2 :]

    monkeypatch.setattr(FarmSources, "nar", halfway)
    async with open_farm("one") as farm:
        await farm.ended((await farm.submit(READS, "large")).id)
    # Another worker must fetch what the first one built.
    async with open_farm("two") as farm, browser_of(farm) as browser:
        submission = await farm.submit(READS, "it")
        seen: list[TransferView] = []
        async with asyncio.timeout(PATIENCE_S):
            async for event in farm.client.watch(submission.id):
                if isinstance(event, TransfersChanged):
                    seen += [each.transfer for each in event.transfers]
                elif isinstance(event, StepChanged) and event.step.transfer is not None:
                    seen.append(event.step.transfer)
                if seen and not let_go.is_set():
                    await browser.log_in()
                    for page in ("/", f"/steps/{farm.key_of('it')}", f"/submissions/{submission.id}"):
                        assert HALF.search((await browser.get(page))[1]), page
                    top = "\n".join(map(plain, farm_lines(await farm.client.activity(), 0.0, Window(200, 50))))
                    assert re.search(r"↓ it .* 50 % of [\d.]+ KiB", top), top
                    let_go.set()
                assert not isinstance(event, Ended) or event.submission.state == "succeeded"
        first = seen[0]
        assert (first.direction, first.source, first.path[44:]) == ("fetch", "objects", "large")
        assert first.size_bytes is not None
        assert first.done_bytes == first.size_bytes // 2
        assert (await farm.client.step(farm.key_of("it"))).transfer is None
