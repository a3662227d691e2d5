"""Checks of a running fleet from outside, as a person would look: builds, a plain Nix client, Prometheus, pages."""

from __future__ import annotations

import http.cookiejar
import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fleet.parts import Fleet, answers
from tests.fleet.place import FleetError
from tests.support.patience import PATIENCE_S

#: Seconds for Prometheus to have scraped all its targets since the last change.
SCRAPED_WITHIN_S = PATIENCE_S
BUILT_WITHIN_S = PATIENCE_S
GRAPH = Path(__file__).resolve().parents[1] / "demo" / "graph.nix"
ROOTS = ("linux", "darwin")


def build(fleet: Fleet) -> dict[str, Any]:
    """Build the demo's graph for both systems with the terminal attached; return the result. Raises `FleetError`."""
    wanted = [word for root in ROOTS for word in ("-A", root)]
    done = subprocess.run(
        fleet.farm.build_command(GRAPH, *wanted, "--json"),
        env=fleet.farm.environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=BUILT_WITHIN_S,
        check=False,
    )
    if done.returncode != 0:
        raise FleetError(f"drover build ended with status {done.returncode}; the log is {fleet.farm.log_path}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def judge(fleet: Fleet, result: dict[str, Any], scratch: Path) -> Iterator[str]:
    """Yield a sentence for each thing that holds of a fleet that has built `result`. Raises `FleetError`.

    `scratch` is a directory that the plain Nix client may fill.
    """
    yield _built(fleet, result)
    yield _fetched(fleet, result, scratch)
    yield _kept_elsewhere(fleet)
    yield _scraped(fleet, result)
    yield from _pages(fleet, result)


def _built(fleet: Fleet, result: dict[str, Any]) -> str:
    steps = fleet.farm.api(f"submissions/{result['id']}/steps?limit=500")
    systems = {step["system"]: step["worker"] for step in steps}
    _require({step["state"] for step in steps} == {"done"}, "a step of the graph is not done")
    _require(len(systems) == len(ROOTS), f"builds ran for {', '.join(systems)} only")
    _require(systems["aarch64-darwin"] == "mac", "builds for the Mac ran elsewhere")
    return f"{len(steps)} steps are built, for {' and '.join(sorted(systems))}"


def _fetched(fleet: Fleet, result: dict[str, Any], scratch: Path) -> str:
    paths = sorted(path for root in result["roots"] for path in root["outputs"].values())
    _require(len(paths) == len(ROOTS), f"{len(paths)} results instead of {len(ROOTS)}")
    fetched = fleet.farm.fetch(scratch, *paths)
    _require(fetched.returncode == 0, f"a plain Nix client cannot fetch: {fetched.stderr}")
    return "a plain Nix client has fetched both results, signatures checked"


def _kept_elsewhere(fleet: Fleet) -> str:
    here = [path.name for path in fleet.farm.state.rglob("*") if path.suffix == ".sqlite3" or path.name == "objects"]
    _require(not here, f"the coordinator keeps {', '.join(here)} in its own directory")
    return "the coordinator keeps its data in PostgreSQL and S3"


def _scraped(fleet: Fleet, result: dict[str, Any]) -> str:
    """Wait until Prometheus has seen what was built."""
    done = f'sum(drover_steps{{state="done"}}) >= {result["counts"]["total"]}'
    deadline = time.monotonic() + SCRAPED_WITHIN_S
    while True:
        targets = _prometheus(fleet, "targets")["activeTargets"]
        down = [target["labels"]["job"] for target in targets if target["health"] != "up"]
        # Of the last evaluation, which may have been while parts of the fleet were starting.
        alerts = [alert["labels"]["alertname"] for alert in _prometheus(fleet, "alerts")["alerts"]]
        seen = targets and not down and _prometheus(fleet, f"query?query={urllib.parse.quote(done)}")["result"]
        if seen and not alerts:
            break
        wrong = f"targets that are not up: {', '.join(down) or 'none'}; alerts: {', '.join(alerts) or 'none'}"
        _require(time.monotonic() < deadline, f"of Prometheus: {wrong}")
        time.sleep(0.1)
    rules = sum(len(group["rules"]) for group in _prometheus(fleet, "rules")["groups"])
    _require(answers(fleet.targets_page), "Prometheus has no page of its targets")
    names = ", ".join(sorted(target["labels"]["job"] for target in targets))
    return f"Prometheus finds all targets up ({names}), and none of {rules} alerts goes off"


def _prometheus(fleet: Fleet, question: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{fleet.prometheus}/api/v1/{question}", timeout=PATIENCE_S) as answer:
        data: dict[str, Any] = json.load(answer)["data"]
        return data


def _pages(fleet: Fleet, result: dict[str, Any]) -> Iterator[str]:
    """Log in with the token as a browser does, and look at pages."""
    farm = fleet.farm
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    form = urllib.parse.urlencode({"token": farm.token, "next": "/"}).encode()
    logging_in = urllib.request.Request(f"{farm.url}/login", form, {"Origin": farm.url})
    workers = [str(worker["name"]) for worker in fleet.workers]
    shown: dict[str | urllib.request.Request, list[str]] = {
        logging_in: workers,
        "/workers": workers,
        f"/submissions/{result['id']}": [*ROOTS, "succeeded"],
        f"/submissions/{result['id']}/timeline": workers,
        "/packages/hello-1.0": workers[-1:],
        "/caches/default": farm.public_keys.split(),
    }
    for page, texts in shown.items():
        request = urllib.request.Request(farm.url + page) if isinstance(page, str) else page
        with browser.open(request, timeout=PATIENCE_S) as answer:
            text = answer.read().decode()
        missing = [each for each in texts if each not in text]
        _require(not missing, f"the page {answer.url} does not show {', '.join(missing)}")
    yield f"{len(shown)} pages show what they should"


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FleetError(f"{otherwise}.".replace("..", "."))
