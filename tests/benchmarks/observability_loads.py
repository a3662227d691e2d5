"""The loads of `bench observability`, each on farms of its own; what they return is what was measured."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.nix.store_path import package_of
from tests.benchmarks.observability_farm import Place
from tests.benchmarks.processes import Repeated, memory_mb, processor_of_all_s, processor_s
from tests.benchmarks.report import progress
from tests.benchmarks.restart_farm import Plan
from tests.benchmarks.trivial import EXPRESSION
from tests.support.farm import Farm, WorkerSpec, processes_naming
from tests.support.loop import LoopStalls
from tests.support.otlp import receiving

#: Only ends a benchmark that hangs.
PATIENCE_S: Final = 900.0
#: The house's bound on what holds the event loop.
SLICE_S: Final = 0.05
BUSYBOX: Final = "/bin/sh=/bin/busybox /bin/busybox"
#: A line of the noisy builder, its end left out.
LINE: Final = "make[2]: Entering directory '/build/source/lib'"
NOISY: Final = """
derivation {{
  name = "noisy"; system = builtins.currentSystem; builder = "/bin/sh"; salt = "{salt}";
  args = [ "-c" "/bin/busybox yes \\"{line}\\" | /bin/busybox head -n {lines}; echo > $out" ];
}}
"""
#: Lines of the log whose page is measured.
LOGGED: Final = 1_000_000
#: A builder that only computes for so many seconds: what any other build costs the one beside it.
SILENT: Final = """
derivation {{
  name = "silent"; system = builtins.currentSystem; builder = "/bin/sh"; salt = "{salt}";
  args = [ "-c" "/bin/busybox timeout {seconds} /bin/busybox yes > /dev/null; echo > $out" ];
}}
"""
SILENT_S: Final = 12
#: Trivial builds that are measured on the idle farm.
ALONE: Final = 5


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of processor and of wall for one run on each of the two farms."""

    seen_s: float
    unseen_s: float
    seen_coordinator_s: float
    unseen_coordinator_s: float
    seen_wall_s: float
    unseen_wall_s: float


@dataclass(frozen=True, slots=True)
class Page:
    """A page's cost: processor time of the coordinator, medians, and its size."""

    path: str
    processor_s: float
    wall_s: float
    bytes: int


def get(farm_url: str, token: str, path: str) -> bytes:
    request = urllib.request.Request(farm_url + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        data: bytes = answer.read()
    return data


def _wait(condition: Callable[[], bool], pause_s: float = 0.05) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the benchmark hangs")
        time.sleep(pause_s)


def _token(farm: Farm) -> str:
    return (farm.secrets / "api-token").read_text().strip()


def _submitted(farm: Farm, file: Path) -> str:
    done = farm.build(file, "-A", "all", "--detach", "--json", timeout_s=PATIENCE_S)
    if done.returncode:
        raise SystemExit(done.stderr)
    return str(json.loads(done.stdout.splitlines()[-1])["id"])


# trivial


#: Ways in which the farm of `trivial` can be looked at.
WAYS: Final = ("traces", "metrics", "events", "pages")


def trivial(root: Path, pairs: int, count: int, ways: Collection[str]) -> list[Run]:
    with ExitStack() as stack:
        receiver = stack.enter_context(receiving())
        farms = []
        exports = f'otlp_endpoint = "{receiver.url}"' if "traces" in ways else ""
        for name, settings in (("seen", exports), ("unseen", "")):
            (root / name).mkdir()
            farm = Farm(root / name, [WorkerSpec("bench", slots=2)], settings=settings)
            stack.callback(farm.stop)
            farm.start().wait_for_workers(1)
            _built(farm, root / "warm.nix", f"warm-{name}", 20)
            farms.append(farm)
        done = []
        for run in range(pairs):
            salt = f"{os.getpid()}-{run}"
            # The other one first in every second run: what a machine does besides falls on both.
            order = farms if run % 2 == 0 else farms[::-1]
            costs = {
                farm.root.name: _built(farm, root / "run.nix", salt, count, ways if farm is farms[0] else ())
                for farm in order
            }
            (seen, seen_own, seen_wall), (unseen, unseen_own, unseen_wall) = costs["seen"], costs["unseen"]
            done.append(Run(seen, unseen, seen_own, unseen_own, seen_wall, unseen_wall))
            progress(f"run {run + 1}: {done[-1]}")
        return done


def _built(farm: Farm, file: Path, salt: str, count: int, ways: Collection[str] = ()) -> tuple[float, float, float]:
    """Build; returns seconds of processor of the whole farm and of its coordinator alone, and of wall."""
    file.write_text(EXPRESSION.format(salt=salt, count=count))
    programs = list(processes_naming(str(farm.root)))
    all_s, own_s, began = processor_of_all_s(programs), processor_s(farm.pid), time.monotonic()
    submission = _submitted(farm, file)
    with ExitStack() as stack:
        _watch(stack, farm, submission, ways)
        path = f"submissions/{submission}"
        _wait(lambda: farm.api(path)["counts"]["done"] == count, 0.25)
    return processor_of_all_s(programs) - all_s, processor_s(farm.pid) - own_s, time.monotonic() - began


def _watch(stack: ExitStack, farm: Farm, submission: str, ways: Collection[str]) -> None:
    token = _token(farm)
    if "metrics" in ways:
        stack.enter_context(Repeated(1.0, lambda: get(farm.url, token, "/metrics")))
    events = (f"/api/v1/submissions/{submission}/events",) if "events" in ways else ()
    pages = (f"/live/submissions/{submission}", "/live/farm") if "pages" in ways else ()
    for path in (*events, *pages):
        request = urllib.request.Request(farm.url + path, headers={"Authorization": f"Bearer {token}"})
        answer = stack.enter_context(urllib.request.urlopen(request, timeout=60))
        stack.enter_context(Repeated(0.01, answer.read1))


# pages


@contextmanager
def coordinator(
    root: Path, steps: int, before: int, database_url: str = ""
) -> Iterator[tuple[Place, subprocess.Popen[str]]]:
    plan = Plan(
        state_dir=root / "state", steps=steps, before=before, after=0, held=64, database_url=database_url
    )  # fmt: skip
    with _place_of("build", plan) as started:
        yield started


@contextmanager
def seeded_coordinator(root: Path, steps: int) -> Iterator[tuple[Place, subprocess.Popen[str]]]:
    """Run a coordinator on a submission of which most is built; that these took place is in journal and timings."""
    plan = Plan(state_dir=root / "state", steps=steps, before=steps * 7 // 10, after=0, held=64)
    began = time.monotonic()
    subprocess.run([*_FARM, "seed", plan.model_dump_json()], check=True, stdout=subprocess.DEVNULL)
    progress(f"{steps} steps are in after {time.monotonic() - began:.0f} s")
    with _place_of("serve", plan) as started:
        yield started


_FARM: Final = (sys.executable, "-m", "tests.benchmarks.observability_farm")


@contextmanager
def _place_of(mode: str, plan: Plan) -> Iterator[tuple[Place, subprocess.Popen[str]]]:
    command = [*_FARM, mode, plan.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Place.model_validate_json(process.stdout.readline()), process
        finally:
            process.kill()


def pages(root: Path, steps: int, runs: int) -> tuple[list[Page], int]:
    """Measure each page; returns also the number of slices over the house's bound."""
    with seeded_coordinator(root, steps) as (place, _):
        token = place.token_file.read_text().strip()
        ask = f"/api/v1/submissions/{place.submission}/steps?state="

        def of_state(state: str) -> dict[str, str]:
            _wait(lambda: bool(json.loads(get(place.url, token, ask + state))))
            step: dict[str, str] = json.loads(get(place.url, token, ask + state))[0]
            return step

        done, running, waiting = map(of_state, ("done", "running", "waiting"))
        within = f"/submissions/{place.submission}"
        paths = ["/", "/submissions", within, f"{within}/steps", f"{within}/steps?state=waiting&after={steps // 2}"]
        paths += [f"{within}/timeline", "/timeline", "/workers", f"/packages/{package_of(done['name'])}"]
        paths += ["/caches/default"]
        _write_log(root, running["key"])
        paths += [f"/steps/{running['key']}/log", f"/steps/{running['key']}/log?line={LOGGED // 2}"]
        paths += [f"/steps/{step['key']}" for step in (done, running, waiting)]
        with LoopStalls(place.url) as stalls:
            measured = [_page(place, token, path, runs) for path in paths]
        return measured, stalls.over(SLICE_S)


def _write_log(root: Path, step: str) -> None:
    """Give an attempt a long log, as the coordinator keeps it."""
    file = root / "state" / "logs" / step[:2] / step / "1.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{LINE}\n" * LOGGED)


def _page(place: Place, token: str, path: str, runs: int) -> Page:
    processor, wall, size = [], [], 0
    for _ in range(max(runs, 2)):
        own_s, began = processor_s(place.pid), time.monotonic()
        size = len(get(place.url, token, path))
        wall.append(time.monotonic() - began)
        processor.append(processor_s(place.pid) - own_s)
    page = Page(path, statistics.median(processor), statistics.median(wall), size)
    progress(f"{page.processor_s:.3f} s of processor, {page.wall_s:.3f} s of wall, {page.bytes} bytes: {path}")
    return page


# logs


def logs(root: Path, lines: int) -> dict[str, object]:
    """Let one builder print so many lines; returns what came through and what it cost the others."""
    size = lines * (len(LINE) + 1)
    settings = f"[limits]\nlog_bytes = {2 * size}"
    farm = Farm(root, [WorkerSpec("bench", slots=2, nix_options={"sandbox-paths": BUSYBOX})])
    config = root / "farm.toml"
    config.write_text(config.read_text() + f"\n{settings}\n")
    try:
        farm.start().wait_for_workers(1)
        _built(farm, root / "warm.nix", "warm", 2)
        return _noisy(farm, root, lines, size)
    finally:
        farm.stop()


def _noisy(farm: Farm, root: Path, lines: int, size: int) -> dict[str, object]:
    token = _token(farm)
    agents = [pid for pid, line in processes_naming(str(root)).items() if "ray::" in line]
    peaks = {"coordinator": 0.0, "agent": 0.0}
    status: list[float] = []
    trivials: list[float] = []
    numbers = itertools.count()

    def look() -> None:
        peaks["coordinator"] = max(peaks["coordinator"], memory_mb(farm.pid))
        peaks["agent"] = max(peaks["agent"], *(memory_mb(pid) for pid in agents))

    def ask() -> None:
        began = time.monotonic()
        get(farm.url, token, "/api/v1/workers")
        status.append(time.monotonic() - began)

    def build() -> None:
        # Each its own: one that is in the cache already is never counted as done.
        trivials.append(_built(farm, root / "small.nix", f"small-{next(numbers)}", 1)[2])

    for _ in range(ALONE):
        build()
    alone_s = statistics.median(trivials)
    trivials.clear()
    beside_silent_s = _beside_silent(farm, root, build, trivials)
    look()
    before = dict(peaks)
    file = root / "noisy.nix"
    file.write_text(f"{{ all = {NOISY.format(line=LINE, lines=lines, salt=os.getpid())}; }}")
    own_s, agents_s = processor_s(farm.pid), sum(map(processor_s, agents))
    with LoopStalls(farm.url) as stalls:
        submission = _submitted(farm, file)
        _wait(lambda: bool(farm.api(f"submissions/{submission}/steps?state=running")))
        key = farm.api(f"submissions/{submission}/steps?state=running")[0]["key"]
        with Repeated(0.1, look), Repeated(0.2, ask), Repeated(0.5, build):
            began = time.monotonic()
            got = _follow(farm.url, token, key)
            took_s = time.monotonic() - began
    own_s, agents_s = processor_s(farm.pid) - own_s, sum(map(processor_s, agents)) - agents_s
    progress(f"{got} of {size} bytes in {took_s:.1f} s")
    return {
        "lines_a_second": round(lines / took_s),
        "mb_a_second": round(size / took_s / 1e6, 1),
        "bytes_lost": size - got,
        "processor_us_a_line": {
            "coordinator": round(own_s / lines * 1e6, 2),
            "agent": round(agents_s / lines * 1e6, 2),
        },
        "status_s": [round(statistics.median(status), 3), round(max(status), 3)],
        "trivial_build_s": {
            "alone": round(alone_s, 2),
            "beside_a_silent_build": round(beside_silent_s, 2),
            "beside_the_noisy_one": [round(statistics.median(trivials), 2), round(max(trivials), 2)],
        },
        "slices_over_50_ms": stalls.over(SLICE_S),
        "memory_mb_before_and_peak": {name: [round(before[name]), round(peaks[name])] for name in peaks},
    }


def _beside_silent(farm: Farm, root: Path, build: Callable[[], None], trivials: list[float]) -> float:
    """Return the seconds of a trivial build beside one that computes and prints nothing."""
    file = root / "silent.nix"
    file.write_text(f"{{ all = {SILENT.format(salt=os.getpid(), seconds=SILENT_S)}; }}")
    submission = f"submissions/{_submitted(farm, file)}"
    _wait(lambda: farm.api(submission)["counts"]["running"] == 1)
    while farm.api(submission)["counts"]["running"]:
        build()
    found = statistics.median(trivials[:-1] or trivials)
    trivials.clear()
    return found


def _follow(url: str, token: str, key: str) -> int:
    """Read a log while it grows, to its end; returns its bytes."""
    request = urllib.request.Request(
        f"{url}/api/v1/steps/{key}/log?follow=1", headers={"Authorization": f"Bearer {token}"}
    )
    got = 0
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        while data := answer.read1(1 << 20):
            got += len(data)
    return got
