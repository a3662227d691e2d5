"""Hints: inputs that come while the slots build, and what they must not cost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from infra.nix.narinfo import NarInfo
from tests.support.patience import PATIENCE_S
from workers.agent import fetching_ahead
from workers.agent.farm_sources import FarmSources
from workers.wire.messages import InputHint, Output, Succeeded

from .conftest import AgentHarness, ReportReader, drv, hash_part, order

STORE = "/nix/store"


async def made(bench: AgentHarness, *scripts: str) -> list[Output]:
    """Publish an output of each script, made by a worker of its own."""
    maker = await bench.agent("maker")
    reports = await maker.build(*(order(drv(f"input-{number}", script)) for number, script in enumerate(scripts)))
    return [output for report in reports for output in bench.publish(report)]


def physical(bench: AgentHarness, worker: str, path: str) -> Path:
    return bench.root / worker / "store" / path.lstrip("/")


async def hint(worker: ReportReader, step: str, *paths: str) -> None:
    await worker.agent.fetch_ahead(InputHint(step=step, inputs=paths).dump())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - of files, which nothing announces
            await asyncio.sleep(0.005)


class Gated:
    """Lets each NAR begin only once it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[str] = []
        self.go: dict[str, asyncio.Event] = {}
        whole = FarmSources.nar

        async def nar(sources: FarmSources, info: NarInfo) -> AsyncGenerator[bytes, None]:
            self.began.append(info.store_path)
            await self.go.setdefault(info.store_path, asyncio.Event()).wait()
            async for chunk in whole(sources, info):
                yield chunk

        monkeypatch.setattr(FarmSources, "nar", nar)

    def let(self, path: str) -> None:
        self.go.setdefault(path, asyncio.Event()).set()


async def test_inputs_come_while_the_slot_builds_and_the_lease_finds_them(bench: AgentHarness) -> None:
    leaf, top = await made(bench, "head -c 3000000 /dev/zero > $out", "echo other > $out")
    worker = await bench.agent("worker", slots=1)
    build = order(drv("long", "echo started; while :; do sleep 1; done"))
    next_one = order(drv("next", f"cat {leaf.path} {top.path} > $out"), [leaf.path, top.path])
    await worker.agent.start_many([build.dump()])
    await worker.until(lambda: any(stage.stage == "building" for stage in worker.stages))
    await hint(worker, next_one.step, leaf.path, top.path)
    await until(lambda: physical(bench, "worker", leaf.path).exists() and not worker.agent._ahead.busy)  # noqa: SLF001
    assert physical(bench, "worker", top.path).exists()
    questions = len(bench.cache.questions)
    assert build.step not in worker.reports
    await worker.agent.start_many([next_one.dump()])
    await worker.agent.cancel([{"step": build.step, "attempt": build.attempt}])
    [report] = await worker.finish(next_one)
    assert isinstance(report.result, Succeeded), report.result
    measures = report.measures
    assert measures is not None
    assert not measures.fetches
    assert measures.ahead_bytes == leaf.nar_size + top.nar_size
    assert len(bench.cache.questions) == questions


async def test_a_lease_joins_what_is_under_way_and_nothing_is_fetched_twice(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await made(bench, "echo first > $out", "echo second > $out")
    monkeypatch.setattr(fetching_ahead, "TOGETHER_BYTES", 1)
    gates = Gated(monkeypatch)
    worker = await bench.agent("worker")
    await hint(worker, "user", first.path, second.path)
    await until(lambda: gates.began)
    [under_way] = gates.began
    use = order(drv("user", f"cat {first.path} {second.path} > $out"), [first.path, second.path])
    await worker.agent.start_many([use.model_copy(update={"step": "user"}).dump()])
    # The rest it fetches itself.
    await until(lambda: len(bench.cache.questions) == 2)
    [other] = {first.path, second.path} - {under_way}
    gates.let(other)
    gates.let(under_way)
    async with asyncio.timeout(PATIENCE_S):
        while "user" not in worker.reports:
            await worker.hear()
    report = worker.reports["user"]
    assert isinstance(report.result, Succeeded), report.result
    assert sorted(gates.began) == sorted((first.path, second.path))
    assert report.measures is not None
    assert {fetch.path: fetch.shared for fetch in report.measures.fetches} == {under_way: True, other: False}


async def test_the_newest_hint_goes_next_and_what_fails_is_no_failure(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = await made(bench, *(f"echo {name} > $out" for name in ("first", "second", "third")))
    caplog.set_level(logging.DEBUG, "workers.agent.fetching_ahead")
    worker = await bench.agent("worker")
    lost = f"{STORE}/{hash_part('lost')}-lost"
    await hint(worker, "of a lost one", lost)
    await until(lambda: "inputs of of a lost one do not come" in caplog.text)
    gates = Gated(monkeypatch)
    for step, path in (("one", first.path), ("two", second.path), ("three", third.path)):
        await hint(worker, step, path)
        await until(lambda: gates.began)
    gates.let(first.path)
    gates.let(third.path)
    await until(lambda: physical(bench, "worker", third.path).exists())
    assert gates.began == [first.path, third.path]
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert not worker.reports


@pytest.mark.parametrize("why", ["drains", "no room"])
async def test_nothing_is_fetched_ahead_where_it_would_do_harm(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    first, second = await made(bench, "echo first > $out", "echo second > $out")
    gates = Gated(monkeypatch)
    gates.let(first.path)
    gates.let(second.path)
    worker = await bench.agent("worker", min_free_mb=0 if why == "drains" else 1 << 40)
    if why == "drains":
        await worker.agent.drain(True)
    await hint(worker, "one", first.path)
    await worker.agent.drain(False)
    if why == "drains":
        await hint(worker, "two", second.path)
        await until(lambda: physical(bench, "worker", second.path).exists())
        assert gates.began == [second.path]
    else:
        await until(lambda: len(bench.cache.questions) == 1)
        await worker.agent.close()
        assert gates.began == []


async def test_what_comes_ahead_is_kept_from_collection_for_a_while(
    bench: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    [made_one] = await made(bench, "echo made > $out")
    worker = await bench.agent("worker")
    monkeypatch.setattr(fetching_ahead, "KEPT_S", 0.0)
    ahead = worker.agent._ahead  # noqa: SLF001 - nothing else shows that its connection has ended
    await hint(worker, "one", made_one.path)
    await until(lambda: physical(bench, "worker", made_one.path).exists() and ahead.keeps is False)
