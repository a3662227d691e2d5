"""Metrics: a farm exposes what the table documents, a real Prometheus reads it, alerts go off when they should."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml  # type: ignore[import-untyped]
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from coordinator.api.requests import ClientStage
from coordinator.observability.metric_table import LOOP_STALL, METRICS
from tests.coordinator.conftest import OpenFarm
from tests.coordinator.test_farm import DIAMOND
from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port
from workers.agent.vitals import read_vitals

DEPLOY = Path(__file__).resolve().parents[2] / "infra" / "deploy"
RULES = DEPLOY / "prometheus" / "drover.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "drover.json"
PHASED = """{ it = run "it" ''
  echo '@nix {"action":"setPhase","phase":"buildPhase"}' >&2
  echo '@nix {"action":"setPhase","phase":"of my own"}' >&2
  echo > $out
''; }"""
EVALUATED = (ClientStage(name="evaluate", begin=1000.0, end=1042.0),)
FOR_A_MAC = '{ mac = runOn "aarch64-darwin" {} "mac" "echo > $out"; }'
#: A name of ours in an expression, with the endings that histograms add.
NAME = re.compile(r"\bdrover_\w+")


async def test_a_farm_exposes_the_table_and_nothing_else(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm, aiohttp.ClientSession() as web:
        await farm.ended((await farm.submit(DIAMOND, "top")).id)
        await farm.ended((await farm.submit(PHASED, "it", stages=EVALUATED)).id)
        await farm.submit(FOR_A_MAC, "mac")
        await farm.until(lambda: any(seen.load is not None for seen in farm.coordinator.views.workforce.views()))
        await farm.client.collect("default", dry_run=False)
        shown = await scrape(web, farm.coordinator.ready.url)
    unknown = {name for name in shown if name.startswith("drover_")} - {each.exposed for each in METRICS}
    assert not unknown, "a metric that the table lacks"
    # The histogram of stalls appears with the first of them.
    for metric in (each for each in METRICS if each is not LOOP_STALL):
        family = shown[metric.exposed]
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        assert labels <= set(metric.labels), metric.name
    assert value(shown, "drover_steps", state="done") == 5
    assert value(shown, "drover_steps", state="running") == 0, "a count of nothing is 0, not absent"
    assert value(shown, "drover_ready_steps", system="aarch64-darwin", features="", reason="no_system") == 1
    assert value(shown, "drover_ended_steps_total", result="done") >= 1
    assert value(shown, "drover_failed_attempts_total", kind="worker_lost", course="retry") == 0
    assert value(shown, "drover_workers", state="online") == 1
    assert value(shown, "drover_worker_built_total", worker="one") >= 1
    assert value(shown, "drover_cache_dangling_references", cache="default") == 0
    assert value(shown, "drover_cache_published_paths_total", cache="default") >= 4
    assert value(shown, "drover_engine_events_total") >= 4
    for phase in ("wait", "build", "pack", "upload", "verify", "publish"):
        assert part(shown, "drover_attempt_seconds", "count", phase=phase) == 5, phase
    assert part(shown, "drover_builder_phase_seconds", "count", phase="buildPhase") == 1
    assert part(shown, "drover_builder_phase_seconds", "count", phase="other") == 1, "builds name as many as they like"
    assert part(shown, "drover_client_stage_seconds", "count", stage="evaluate") == 1
    assert part(shown, "drover_client_stage_seconds", "sum", stage="evaluate") == 42.0
    assert value(shown, "drover_submitted_derivations_total") == 6
    turns = {sample.labels["part"] for sample in shown["drover_engine_turn_seconds"].samples}
    assert turns == {"core", "journal", "views"}
    assert value(shown, "drover_worker_disk_free_bytes", worker="one") > 0
    async with open_farm() as farm, aiohttp.ClientSession() as web:
        again = await scrape(web, farm.coordinator.ready.url)
    assert value(again, "drover_steps", state="done") == 5
    assert part(again, "drover_attempt_seconds", "count", phase="wait") == 0, "a replay counts no history"


def test_a_measure_that_a_machine_does_not_give_is_absent_and_not_0(tmp_path: Path) -> None:
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "cpu").write_text("some avg10=12.50 avg60=1.00 avg300=0.00 total=5\n")
    (tmp_path / "pressure" / "io").write_text("not what Linux writes")
    vitals = read_vitals([], tmp_path)
    assert (vitals.cpu_pressure, vitals.io_pressure, vitals.memory_pressure) == (0.125, None, None)
    assert (vitals.memory_available_bytes, vitals.disk_free_bytes) == (None, None)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    vitals = read_vitals([9, 7], tmp_path)
    assert (vitals.memory_available_bytes, vitals.disk_free_bytes) == (2048 * 1024, 7)


async def test_prometheus_reads_a_farm_and_every_panel_of_the_dashboard(open_farm: OpenFarm, tmp_path: Path) -> None:
    async with (
        open_farm("one") as farm,
        aiohttp.ClientSession() as web,
        prometheus(web, tmp_path, farm.coordinator.ready.url) as address,
    ):
        await farm.ended((await farm.submit(DIAMOND, "top")).id)
        await poll(lambda: query(web, address, 'drover_steps{state="done"} == 4'))
        assert [sample["value"][1] for sample in await query(web, address, 'up{job="drover"}')] == ["1"]
        for expression in dashboard_expressions():
            await query(web, address, expression.replace("$instance", ".*"))


def test_each_alert_goes_off_when_it_should_and_only_then() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", "drover.rules.test.yml"],
        cwd=RULES.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_and_dashboard_use_metrics_that_exist_and_say_what_to_do() -> None:
    known = {name for metric in METRICS for name in names_of(metric.exposed, metric.kind)}
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]:
        assert set(NAME.findall(rule["expr"])) <= known, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "action"}
    tested = {each["alertname"] for case in rule_tests() for each in case["alert_rule_test"]}
    assert tested == {rule["alert"] for rule in group["rules"]}, "each alert is also shown not to go off"
    for expression in dashboard_expressions():
        assert set(NAME.findall(expression)) <= known, expression


def rule_tests() -> list[dict[str, Any]]:
    tests: list[dict[str, Any]] = yaml.safe_load((RULES.parent / "drover.rules.test.yml").read_text())["tests"]
    return tests


def dashboard_expressions() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def names_of(exposed: str, kind: str) -> tuple[str, ...]:
    return tuple(exposed + end for end in ("_bucket", "_count", "_sum")) if kind == "histogram" else (exposed,)


def value(shown: dict[str, Family], name: str, **labels: str) -> float:
    [found] = [sample.value for sample in shown[name].samples if sample.labels == labels]
    return found


def part(shown: dict[str, Family], histogram: str, ending: str, **labels: str) -> float:
    """The count or the sum of a histogram."""
    series = f"{histogram}_{ending}"
    [found] = [each.value for each in shown[histogram].samples if each.name == series and each.labels == labels]
    return found


async def scrape(web: aiohttp.ClientSession, url: str) -> dict[str, Family]:
    """All families by the name that the table has, which for counters is that of their samples."""
    async with web.get(f"{url}/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(await answer.text())
        return {each.name + ("_total" if each.type == "counter" else ""): each for each in families}


@asynccontextmanager
async def prometheus(web: aiohttp.ClientSession, directory: Path, farm_url: str) -> AsyncIterator[str]:
    """A Prometheus that scrapes the farm five times a second; gives its address."""
    target = {"job_name": "drover", "static_configs": [{"targets": [farm_url.removeprefix("http://")]}]}
    config = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}, "scrape_configs": [target]}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config | {"rule_files": [str(RULES)]}))
    listen = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address={listen}",
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await poll(lambda: answers(web, f"http://{listen}/-/ready"))
        yield f"http://{listen}"
    finally:
        process.kill()
        await process.wait()


async def poll(question: Callable[[], Awaitable[object]]) -> None:
    """Ask again and again, for a minute, until the answer is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not await question():  # noqa: ASYNC110 - what is waited for is another program's doing
            await asyncio.sleep(0.05)


async def answers(web: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with web.get(url) as answer:
            return answer.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def query(web: aiohttp.ClientSession, address: str, expression: str) -> list[dict[str, Any]]:
    async with web.get(f"{address}/api/v1/query", params={"query": expression}) as answer:
        said = await answer.json()
        assert said["status"] == "success", (expression, said)
        result: list[dict[str, Any]] = said["data"]["result"]
        return result
