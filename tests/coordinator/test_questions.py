"""The questions of people: why a step waits, what the farm does, what a name is completed to, a log by any name."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.capacity_routes import CapacityView
from coordinator.api.estimates import RunningView, ThroughputBar, ThroughputView
from coordinator.api.models import EtaView
from coordinator.api.questions import (
    ActivityView,
    CandidateView,
    CostView,
    PlacingView,
    QueueView,
    SlotView,
    WorkerActivityView,
)
from coordinator.cli import exit_status
from coordinator.cli.capacity import capacity_lines
from coordinator.cli.lines import plain
from coordinator.cli.live import Window
from coordinator.cli.log import AROUND_CHARS, LINE_BYTES, LineSearch, Printer
from coordinator.cli.reasons import placing_lines, why_lines
from coordinator.cli.rendering import duration
from coordinator.cli.top import farm_lines
from coordinator.client.errors import RefusedError
from coordinator.readmodel.estimate import Expected
from coordinator.readmodel.usual_times import WAITING, UsualTimes
from coordinator.stores.timings import AttemptTiming, TimingsError, TimingStore
from infra.clock import SystemClock
from tests.coordinator.conftest import OpenFarm
from tests.coordinator.test_cli import drover
from tests.support.patience import PATIENCE_S
from tests.support.screens import NOW

CHAIN = """
rec {
  low = run "low" "echo low; echo > $out";
  middle = run "middle" "read x < ${low}; echo > $out";
  top = run "top" "read x < ${middle}; echo > $out";
  two = derivation {
    name = "two"; system = "x86_64-linux"; builder = "/bin/sh"; outputs = [ "out" "dev" ];
    args = [ "-c" "echo two is built; echo > $out; echo > $dev" ];
  };
}
"""


async def test_a_step_that_waits_is_explained_down_to_what_holds_it_and_up_to_who_wants_it(open_farm: OpenFarm) -> None:
    async with open_farm() as farm:
        submitted = await farm.submit(CHAIN, "top", label="mine")
        reasons = await farm.client.why("top")
        assert [step.name for step in reasons.below] == ["low"]
        assert reasons.wanted_by[0].path == ("top",)
        low = await farm.client.why("low")
        assert (low.wanted_by[0].attr, low.wanted_by[0].path) == ("top", ("top", "middle", "low"))
        lines = why_lines(low, low.step.started_at)
        assert lines[0] == "waiting: low (x86_64-linux)" or lines[0] == "ready: low (x86_64-linux)"
        assert any(line.startswith("  why        no worker") for line in lines)
        assert lines[-1] == f"  wanted by  submission {submitted.id} (mine), top: top \u2192 middle \u2192 low"
        # No worker has joined: its rank and what it should take are known all the same.
        assert low.placing is not None
        assert (low.placing.source, low.placing.candidates) == ("nothing", ())
        assert low.placing.rank_s == 3 * low.placing.takes_s > 0
        takes = duration(low.placing.takes_s)
        assert f"  takes      {takes} on a usual worker: a guess, because nothing like it was built yet" in lines
        # What would take it: one slot, and two steps come after it.
        (wanted,) = (await farm.client.capacity()).classes
        assert (wanted.system, wanted.ready, wanted.waiting, wanted.slots) == ("x86_64-linux", 1, 2, 1)
        assert wanted.hours == pytest.approx(low.placing.rank_s / 3600)
        assert wanted.slots_present == 0
        # Steps that wait for what is known already make nothing ready; they are work all the same.
        await farm.submit(CHAIN.replace('"top"', '"other"'), "top")
        (more,) = (await farm.client.capacity()).classes
        assert (more.ready, more.waiting) == (1, 3)
        assert capacity_lines(CapacityView(at=NOW, classes=(wanted,)))[1].split()[:6] == [
            "x86_64-linux", "-", "-", "1", "0", "1",
        ]  # fmt: skip
        with pytest.raises(RefusedError):
            await farm.client.why("no-such-step")


def test_the_workers_that_were_looked_at_for_a_step_are_said_with_what_each_would_make_of_it() -> None:
    def candidate(worker: str, **values: Any) -> CandidateView:
        usual: dict[str, Any] = {"state": "free", "speed": 1.0, "leases": 0, "capacity": 4, "room_at": NOW}
        return CandidateView(**usual | {"worker": worker, "ends_at": NOW + 3600} | values)

    candidates = (
        candidate("fast", state="full", speed=2.0, leases=4, room_at=NOW + 1200, ends_at=NOW + 2100),
        candidate("slow", speed=0.5, here_bytes=1 << 30),
        candidate("far", here_bytes=1 << 20, missing_bytes=1 << 30, fetch_s=21.5),
        candidate("off", state="draining", leases=1, capacity=0, room_at=0.0, ends_at=0.0),
    )
    placing = PlacingView(
        rank_s=7500, takes_s=1800, source="package", builds=7, candidates=candidates, count=12, waits_for="fast",
        memory_bytes=3 << 30,
        costs=(
            CostView(cost="fetch_s", value=20.0, spread=1.0, source="package", builds=7),
            CostView(cost="cpu_s", value=3600.0, spread=9.0, source="package", builds=7),
            CostView(cost="cores", value=2.0, spread=0.1, source="package", builds=7),
            CostView(cost="output_bytes", value=float(5 << 20), spread=0.0, source="features"),
        ),
    )  # fmt: skip
    alike = "as others that ask for the same features"
    far = "has 1.0 MiB of its inputs and fetches 1.0 GiB in 21s"
    room, built = duration(1200), f"{duration(2100)}, speed 2"
    assert list(placing_lines(placing, NOW)) == [
        "  rank       2h05m from its start to the end of what stands on it",
        "  takes      30m00s on a usual worker: by 7 builds of its package",
        "  expects    3.0 GiB of memory: what it asks for",
        "             inputs in 20s, 1h00m of processors, 2.0 at one time: by 7 builds of its package",
        f"             5.0 MiB of outputs: {alike}, because none of its package is known",
        f"  workers    fast: full (4 of 4 taken), room in {room}, would have built it in {built}, for which it waits",
        "             slow: free (0 of 4 taken), would have built it in 1h00m, speed 0.5, has 1.0 GiB of its inputs",
        f"             far: free (0 of 4 taken), would have built it in 1h00m, {far}",
        "             off: draining (1 of 0 taken)",
        "             and 8 more",
    ]


async def test_a_log_is_found_by_attribute_by_derivation_and_by_each_output(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        submitted = await farm.submit(CHAIN, "two")
        view = await farm.ended(submitted.id)
        root = view.roots[0]
        names = ["two", root.drv, f"{root.drv}!out", f"{root.drv}^out,dev", *root.outputs.values(), root.step[:20]]
        logs = [b"".join([chunk async for chunk in farm.client.log(name)]) for name in names]
        assert logs == [b"two is built\n"] * len(names)
        assert [chunk async for chunk in farm.client.log("two", attempt=1)] == [b"two is built\n"]
        with pytest.raises(RefusedError, match="no attempt 7"):
            [_ async for _ in farm.client.log("two", attempt=7)]


async def test_a_whole_name_means_the_newest_step_of_that_name(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        for number in (1, 2):
            await farm.ended((await farm.submit(f'{{ it = run "tool-1.0" "echo {number}; echo > $out"; }}', "it")).id)
        assert b"".join([chunk async for chunk in farm.client.log("tool-1.0")]) == b"2\n"
        with pytest.raises(RefusedError, match="2 steps match 'tool-1'"):
            await farm.client.why("tool-1")


FAILING = """
rec {
  below = run "below-1.0" "sleep 1; echo > $out";
  broken = run "broken-2.0" "read x < ${below}; echo number %s; exit 3";
  above = run "above" "echo ${broken} > $out";
}
"""


async def test_what_has_no_log_leads_on_and_a_name_without_its_version_is_enough(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        await farm.ended((await farm.submit(FAILING % 1, "above")).id)
        broken = farm.key_of("broken-2.0")
        with pytest.raises(RefusedError, match=f"cannot be built.*: `drover log {broken}` shows why"):
            _ = [chunk async for chunk in farm.client.log("above")]
        with pytest.raises(RefusedError, match="had 1 attempt; there is no attempt 2"):
            _ = [chunk async for chunk in farm.client.log("broken", attempt=2)]
        # The name without its version is enough where there is one version, and means the newest.
        await farm.ended((await farm.submit(FAILING % 2, "above")).id)
        assert b"".join([chunk async for chunk in farm.client.log("broken")]) == b"number 2\n"
        with pytest.raises(RefusedError, match=r"2 steps match 'broken-' \([^\u2026]*\); give more of the name"):
            await farm.client.why("broken-")


REFUSED = [
    (["status", "nosuch"], "there is no submission 'nosuch'; `drover status` lists them"),
    (["watch", "nosuch"], "there is no submission 'nosuch'; `drover status` lists them"),
    (["cancel", "nosuch"], "there is no submission 'nosuch'; `drover status` lists them"),
    (["trace", "nosuch"], "there is no submission 'nosuch'; `drover status` lists them"),
    (["retry", "nosuch"], "there is no step 'nosuch'; `drover status ID` lists those"),
    (["why", "nosuch"], "there is no step 'nosuch'; `drover status ID` lists those"),
    (["story", "nosuch"], "there is no step 'nosuch'; `drover status ID` lists those"),
    (["history", "nosuch"], "its name is that of the derivation"),
    (["drain", "nosuch"], "there is no worker 'nosuch'; `drover workers` lists them"),
    (["log", "tool"], "2 steps match 'tool'"),
    (["log", "tool-1.0"], "not been started yet, so there is no log; `drover why` says"),
    (["status", "--token-file", "wrong"], "did not accept the API token; name its file with --token-file"),
    (["status", "--token-file", "missing"], "cannot read the token file missing: No such file"),
]


async def test_each_refusal_is_one_sentence_with_a_way_on(
    open_farm: OpenFarm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with open_farm() as farm:
        text = '{ a = run "tool-1.0" "exit 1"; b = runOn "riscv64-linux" {} "tool-2.0" "exit 1"; }'
        submitted = await farm.submit(text, "a", "b")
        # What both wait for is said once.
        assert (await farm.client.submission(submitted.id)).stuck == ("2 steps wait: no worker has joined",)
        (tmp_path / "wrong").write_text("no-token")
        monkeypatch.chdir(tmp_path)
        environment = {
            "DROVER_URL": farm.coordinator.ready.url,
            "DROVER_TOKEN_FILE": str(farm.coordinator.ready.token_file),
        }
        for words, sentence in REFUSED:
            done = await asyncio.to_thread(drover, *words, env=environment)
            assert (done.returncode, done.stdout) == (exit_status.USAGE, ""), words
            assert len(done.stderr.splitlines()) == 1, words
            assert done.stderr.startswith("drover: ")
            assert sentence in done.stderr


async def test_names_are_completed_and_a_farm_says_what_it_does(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        submitted = await farm.submit(CHAIN, "top", "two", label="mine")
        await farm.ended(submitted.id)

        async def completed(of: str, beginning: str) -> list[str]:
            return [item.value for item in (await farm.client.completions([of], beginning)).items]

        assert await completed("steps", "t") == ["top", "two"]
        key = (await farm.client.step("middle")).key
        assert await completed("steps", key[:10]) == [key]
        assert await completed("steps", "<b>&\"'\x1b") == []
        assert await completed("submissions", submitted.id[:3]) == [submitted.id]
        assert await completed("workers", "o") == ["one"]
        with pytest.raises(RefusedError):
            await completed("secrets", "")
        activity = await farm.client.activity()
        assert [(worker.name, worker.state) for worker in activity.workers] == [("one", "online")]
        assert activity.steps["done"] == 4
        assert activity.queues == ()


async def known(usual: UsualTimes, name: str) -> float | None:
    """Ask, and return the answer of the next question after the store has been read."""
    usual.of(name, "x86_64-linux")
    reading = asyncio.create_task(usual.run())
    async with asyncio.timeout(PATIENCE_S):
        while usual.unanswered:  # noqa: ASYNC110 - what is waited for is a database's answer
            await asyncio.sleep(0.01)
    reading.cancel()
    return usual.of(name, "x86_64-linux")


async def test_the_builds_of_a_package_tell_how_long_the_next_one_usually_takes(open_farm: OpenFarm) -> None:
    async with open_farm("one") as farm:
        await farm.ended((await farm.submit('{ it = run "tool-1.0" "echo > $out"; }', "it")).id)
        [system] = (await farm.client.history("tool")).systems
        store = TimingStore.open(farm.settings.database_url("timings"))
        try:
            assert await known(UsualTimes(store.usual_builds, SystemClock()), "tool-1.1") == system.usual_s
        finally:
            await store.close()


async def test_a_store_of_times_that_fails_or_is_slow_costs_nothing_but_the_answer() -> None:
    asked: list[tuple[str, str]] = []
    fails = False

    async def builds(packages: Sequence[tuple[str, str]], _most: int) -> dict[tuple[str, str], list[float]]:
        asked.extend(packages)
        if fails:
            raise TimingsError("the database of timings failed: locked.")
        return {key: [3.0, 1.0, 2.0] for key in packages if key[0] == "tool"}

    usual = UsualTimes(builds, SystemClock())
    names = ["tool-1.0", "tool-1.1", "new-1"]
    assert [usual.of(name, "x86_64-linux") for name in names] == [None] * 3
    assert await known(usual, "new-1") is None
    assert [usual.of(name, "x86_64-linux") for name in names] == [2.0, 2.0, None]
    assert usual.expected("tool-2", "x86_64-linux") == Expected(1.5, 2.5)
    assert (len(asked), usual.answers) == (2, 1)
    fails = True
    assert await known(usual, "broken-2") is None
    assert usual.of("tool-1.0", "x86_64-linux") == 2.0
    for number in range(WAITING + 50):
        usual.of(f"p{number}x", "x86_64-linux")
    assert usual.unanswered == WAITING


def test_completion_is_silent_where_no_farm_answers_and_imports_nothing_slow() -> None:
    program = (
        "import sys\n"
        "from coordinator.cli.commands import run\n"
        "try:\n    run([])\nexcept SystemExit:\n    pass\n"
        "slow = {'ray', 'aiohttp', 'sqlalchemy', 'rich', 'pydantic'} & set(sys.modules)\n"
        # Records of other questions' answers.
        "slow |= {f'coordinator.api.{name}_models' for name in ('timeline', 'rebuild', 'cache')} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)\n"
    )
    environment = {
        **os.environ,
        "_DROVER_COMPLETE": "bash_complete",
        "COMP_WORDS": "drover log --coordinator http://127.0.0.1:1 x",
        "COMP_CWORD": "4",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str) -> None:
    program = [sys.executable, "-c", "from coordinator.cli import main; main()", "completion", shell]
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert f"{shell}_complete" in done.stdout


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def searched(text: str, data: bytes, size: int = 7) -> list[bytes]:
    search = LineSearch(text)
    return [line for piece in pieces(data, size) for line in search.feed(piece)] + list(search.finish())


@given(st.binary(max_size=200), st.integers(1, 50))
def test_a_search_finds_the_same_lines_however_the_log_is_cut(data: bytes, size: int) -> None:
    assert searched("a", data, size) == searched("a", data, 1000)


def test_a_search_numbers_lines_and_holds_no_more_than_its_bound_of_a_long_one() -> None:
    log = b"one\nERROR: \xff\xfe two\n" + b"x" * (10 * LINE_BYTES) + b" error far away\nthe last Error"
    far = b"3: " + "\u2026".encode() + b"x" * AROUND_CHARS + b"ERROR far away\n"
    log = log.replace(b" error far", b"ERROR far")
    for size in (7, 4096, 10**9):
        found = searched("error", log, size)
        assert found == [b"2: ERROR: \xff\xfe two\n", far, b"4: the last Error\n"]
    search = LineSearch("error")
    for piece in pieces(b"y" * (3 * LINE_BYTES), 4096):
        assert list(search.feed(piece)) == []
    assert search.held_bytes == LINE_BYTES


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_log_that_a_runner_reads_holds_no_command_and_in_a_pipe_it_is_the_very_bytes(size: int) -> None:
    log = b"\x00\xff one\n  ::set-output name=a::b\n::endgroup::\n##[group]x\n"
    log += b"\x1b]0;STOLEN\x07\x1b[31mred\n::warning::no end"

    def printed(environment: dict[str, str]) -> bytes:
        printer = Printer(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), environment)
        return b"".join([printer.feed(piece) for piece in pieces(log, size)]) + printer.finish()

    assert printed({}) == log
    text = printed({"GITHUB_ACTIONS": "true"}).decode()
    assert not re.search(r"^\s*::|##\[|STOLEN|\x00", text, re.MULTILINE)
    assert text.split("\n")[-1] == ": :warning::no end"
    assert "\x1b[31mred\x1b[0m" in text


def activity(workers: int, leases: int) -> ActivityView:
    def worker(number: int) -> WorkerActivityView:
        steps = tuple(
            SlotView(step=f"k{n}", name=f"step-{n}\x1b[2J", stage="building", phase="check\nPhase", started_at=NOW - n)
            for n in range(leases)
        )
        return WorkerActivityView(name=f"w{number}", state="online", slots=4, leases=steps, lease_count=leases)

    queue = QueueView(system="x86_64-linux", features=("kvm",), count=7, reason="all 2 workers that could are full")
    return ActivityView(
        troubles=("the disk\nis full",),
        steps={"running": workers * leases, "ready": 7},
        submissions={"running": 1},
        workers=tuple(worker(number) for number in range(workers)),
        worker_count=workers,
        queues=(queue,),
        running=(
            RunningView(
                id="abc", label="my\x1b[2Jlabel", done=3, total=9, created_at=NOW, eta=EtaView(
                    at=NOW, sooner_at=NOW + 60, later_at=NOW + 90, bound="path", because="the way\nof a", steps=6
                )
            ),
        ),
        throughput=ThroughputView(until=NOW, every_s=60.0, bars=(ThroughputBar(finished=7, failed=3),) * 60),
    )  # fmt: skip


def test_top_shows_each_worker_with_its_steps_and_each_queue_with_its_reason() -> None:
    totals = "2 workers, 4 of 8 slots busy, 1 submission running, 4 steps running, 7 ready, 0 waiting"
    assert [plain(line) for line in farm_lines(activity(2, 2), NOW, Window(100, 24))] == [
        totals,
        "! the disk is full",
        "10.0 builds/min; last hour 420 finished, 180 failed, 0 reused",
        "abc mylabel                        3/9  ends in 1m00s to 1m30s: bounded by the way of a",
        "w0    2/4   \u23f5 step-1      1s  check Phase",
        "            \u23f5 step-0      0s  check Phase",
        "w1    2/4   \u23f5 step-1      1s  check Phase",
        "            \u23f5 step-0      0s  check Phase",
        "7 ready for x86_64-linux with kvm: all 2 workers that could are full",
    ]


@given(st.integers(0, 60), st.integers(0, 12), st.integers(5, 60), st.integers(3, 40))
def test_top_never_outgrows_its_window(workers: int, leases: int, width: int, height: int) -> None:
    lines = farm_lines(activity(workers, leases), NOW, Window(width, height))
    assert len(lines) < height
    assert all(len(plain(line)) <= width for line in lines)


async def test_an_answer_that_nothing_is_known_counts_for_nothing_where_a_build_ended_meanwhile() -> None:
    """It was stored after the store was read: five minutes of "unknown" would follow."""
    asked, answered = asyncio.Event(), asyncio.Event()
    answers: list[dict[tuple[str, str], list[float]]] = [{}, {("tool", "sys"): [7.0]}]

    async def builds(_keys: Sequence[tuple[str, str]], _limit: int) -> dict[tuple[str, str], list[float]]:
        asked.set()
        await answered.wait()
        return answers.pop(0)

    usual = UsualTimes(builds, SystemClock())
    reading = asyncio.create_task(usual.run())
    try:
        assert usual.expected("tool-1.1", "sys") is None
        await asked.wait()
        done = AttemptTiming(step="s", attempt=1, package="tool", system="sys", outcome="done")
        usual.were_built([done])
        answered.set()
        for _ in range(100):
            if usual.expected("tool-1.1", "sys") is None:
                await asyncio.sleep(0)
        assert usual.expected("tool-1.1", "sys") == Expected(7.0, 7.0)
    finally:
        reading.cancel()
