"""When submissions end, on a real farm: what is foreseen, what bounds it, what has bounded it, what the farm does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Generator, Iterator
from html import unescape

import aiohttp
import pytest

from coordinator.api.estimates import ThroughputBar, ThroughputView
from coordinator.api.models import CountsChanged, EtaView, Snapshot, StepStatus
from coordinator.cli.eta import eta as print_eta
from coordinator.cli.eta import eta_lines, rate
from coordinator.cli.rendering import duration, eta_sentence
from coordinator.readmodel import etas as etas_module
from coordinator.readmodel.estimate import Expected
from coordinator.readmodel.etas import WANTED, Etas
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.throughput import HOUR, Throughput, counting
from coordinator.stores.timings import TimingsError
from infra.clock import SystemClock
from scheduler.events import BuildSucceeded
from scheduler.model import StepKey, StepState, SubmissionId
from scheduler.pauses import Pause, whole
from tests.coordinator.conftest import OpenedFarm, OpenFarm, waiting_for
from tests.coordinator.test_views import DrivenViews, evidence, spec, submission
from tests.support.patience import PATIENCE_S
from tests.support.screens import NOW

CHAIN = """
rec {{
  low = run "low-{0}" "{1}";
  side = run "side-{0}" "echo > $out";
  middle = run "middle-{0}" "read x < ${{low}}; read y < ${{side}}; echo > $out";
  top = run "top-{0}" "read x < ${{middle}}; echo > $out";
  mac = runOn "riscv64-linux" {{}} "mac-{0}" "read x < ${{low}}; echo > $out";
}}
"""
#: Work that ends after all that is beside it.
SLOW = f"{waiting_for('slow')}; echo 1 > $out"
ENDLESS = "while :; do :; done"


async def shown(farm: OpenedFarm, address: str) -> str:
    """Return a page as a browser gets it."""
    ready = farm.coordinator.ready
    headers = {"Authorization": f"Bearer {ready.token_file.read_text().strip()}"}
    async with aiohttp.ClientSession() as session, session.get(ready.url + address, headers=headers) as answer:
        assert answer.status == 200
        return unescape(await answer.text())


async def foreseen(farm: OpenedFarm, submission: str, bound: str, *, known: bool = False) -> EtaView:
    """Watch a submission until its end is bounded by that, and, where `known`, until all histories have been read."""
    async with asyncio.timeout(PATIENCE_S):
        async for event in farm.client.watch(submission):
            if isinstance(event, Snapshot | CountsChanged) and event.eta is not None and event.eta.bound == bound:
                if known and event.eta.unknown:
                    continue
                return event.eta
    raise AssertionError("the stream ended")


async def test_a_submission_says_what_bounds_its_end_and_in_the_end_what_has(
    open_farm: OpenFarm, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_farm("one") as farm:
        sub = await farm.submit(CHAIN.format(1, SLOW), "top")
        await farm.until(lambda: farm.states(sub.id)["side-1"] is StepStatus.DONE)
        farm.open_gate("slow")
        await farm.ended(sub.id)
        # What has bounded it: each step of the chain begins where the one before it ended.
        found = await farm.client.eta(sub.id)
        assert found.eta is None
        assert [step.name for step in found.so_far.steps] == ["low-1", "middle-1", "top-1"]
        assert sum(step.took_s + step.waited_s for step in found.so_far.steps) == pytest.approx(found.so_far.seconds)
        assert all(step.took_s > 0 for step in found.so_far.steps)
        lines = eta_lines(found, NOW)
        assert lines[1] == f"  critical path so far: 3 steps, {duration(found.so_far.seconds)}"
        page = await shown(farm, f"/submissions/{sub.id}")
        assert "Critical path: 3 steps so far, " in page
        assert [page.count(f'href="/steps/{step.step}"') for step in found.so_far.steps] == [1, 1, 2]
        # Histories are written by then, so that the throughput counts them.
        assert (await farm.client.history("top")).systems[0].done == 1
        activity = await farm.client.activity()
        assert activity.throughput is not None
        assert activity.throughput.total == ThroughputBar(finished=4)

        sub = await farm.submit(CHAIN.format(2, ENDLESS), "top", label="endless")
        eta = await foreseen(farm, sub.id, "path", known=True)
        assert eta.because == "the critical path of 3 steps through low-2"
        assert eta.at <= eta.sooner_at <= eta.later_at
        assert (eta.steps, eta.unknown) in {(4, 0), (3, 0)}
        found = await farm.client.eta(sub.id)
        assert [(step.name, step.state) for step in found.to_come.steps] == [
            # The second has its lease, and follows the first.
            ("low-2", "running"), ("middle-2", "running"), ("top-2", "waiting"),
        ]  # fmt: skip
        assert [load.slots for load in found.loads] == [2]
        sentence = "bounded by the critical path of 3 steps through low-2"
        assert sentence in await shown(farm, f"/submissions/{sub.id}")
        page = await shown(farm, "/")
        assert sentence in page
        # With that beside the endless one where it took longer than such an answer is kept.
        hour = re.search(r'aria-label="Last hour: ([45]) finished, 0 failed, 0 reused"', page)
        assert hour is not None
        assert re.search(rf'<td class="num">{hour[1]}</td>.*</table>', page, re.DOTALL)
        assert [run.label for run in (await farm.client.activity()).running] == ["endless"]

        # Another one stands on the same step, and on a system that nobody builds.
        other = await farm.submit(CHAIN.format(2, ENDLESS), "mac")
        eta = await foreseen(farm, other.id, "no_worker")
        assert (eta.because, eta.later_at, eta.unknown) == ("no worker offers the system riscv64-linux", 0.0, 1)
        assert await print_eta(farm.client, other.id, as_json=False) == 0
        told = capsys.readouterr().out
        assert told.startswith(
            f"submission {other.id}: no end in sight: no worker offers the system riscv64-linux (1 of 2 "
        )
        assert "  riscv64-linux: 1 step left, " in told
        assert "on 0 slots" in told
        assert "    mac-2: waiting, no history" in told
        for each in (sub, other):
            await farm.client.cancel(each.id)
        assert (await farm.client.eta(sub.id)).eta is None


@pytest.mark.parametrize(
    ("eta", "said"),
    [
        (
            EtaView(at=NOW, sooner_at=NOW + 720, later_at=NOW + 1080, bound="path", because="the way", steps=5),
            "ends in 12m00s to 18m00s: bounded by the way",
        ),
        (
            EtaView(at=NOW, sooner_at=NOW + 700, later_at=NOW + 720, bound="path", because="a\x1b[2J\nb", steps=5),
            "ends in about 12m00s: bounded by a b",
        ),
        (
            EtaView(at=NOW, sooner_at=NOW, later_at=NOW + 60, bound="capacity", because="x", steps=5, unknown=2),
            "ends within 1m00s: bounded by x (2 of 5 steps left without history)",
        ),
        (
            EtaView(at=NOW - 90, sooner_at=NOW - 80, later_at=NOW - 62, bound="path", because="x", steps=1, overdue=1),
            "ends later than foreseen: bounded by x (1 running longer than usual)",
        ),
        (
            EtaView(at=NOW, sooner_at=NOW + 60, bound="no_worker", because="no worker offers x", steps=1),
            "no end in sight: no worker offers x",
        ),
        (
            EtaView(at=NOW, sooner_at=NOW, bound="unknown", because="x", steps=1, unknown=1),
            "end unknown: none of 1 step left has a history, bounded by x",
        ),
    ],
)
def test_an_end_is_said_as_it_is_known(eta: EtaView, said: str) -> None:
    assert eta_sentence(eta, NOW) == said


def test_what_is_kept_of_foreseen_ends_is_bounded(driven: DrivenViews) -> None:
    etas = Etas(driven.views, driven.farm, Nothing(), SystemClock())
    for number in range(3 * WANTED):
        assert etas.of(SubmissionRow(SubmissionId(f"s{number}"), NOW, set(), [])) is None
    assert etas.wanted == WANTED


@pytest.mark.parametrize("pause", ["PAUSE_PER_STEP_S", "KNOWN_S"])
async def test_passes_rest_for_all_that_they_walk_unless_an_end_is_asked_for_that_none_has_worked_out(
    driven: DrivenViews, monkeypatch: pytest.MonkeyPatch, pause: str
) -> None:
    monkeypatch.setattr(etas_module, "PAUSE_S", 0.0)
    monkeypatch.setattr(etas_module, pause, 3600.0)
    monkeypatch.setattr(etas_module, "PAUSE_PART_OF_NEW", 0.0)
    driven.tell(submission("s", "a", spec("a", "b"), spec("b")), submission("t", "c", spec("c")))
    one, two = driven.views.submission("s"), driven.views.submission("t")
    passes: list[list[SubmissionRow]] = []

    class Counted(Etas):
        def working_out(self, rows: list[SubmissionRow]) -> Generator[Pause, None, None]:
            passes.append(rows)
            yield from super().working_out(rows)

    etas = Counted(driven.views, driven.farm, Nothing(), SystemClock())
    running = asyncio.create_task(etas.run())
    await etas.wait_for([one], PATIENCE_S)
    assert passes == [[one]]
    # All has moved, and still it rests.
    driven.join()
    etas.of(one)
    for _ in range(100):
        await asyncio.sleep(0)
    assert passes == [[one]]
    await etas.wait_for([two], PATIENCE_S)
    assert etas.of(two) is not None
    assert passes == [[one], [one, two]]
    running.cancel()


async def test_what_nobody_watches_is_not_worked_out_anew_before_somebody_asks(
    driven: DrivenViews, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PAUSE_S", "STALE_S"):
        monkeypatch.setattr(etas_module, name, 0.001)
    driven.tell(submission("s", "a", spec("a", "b"), spec("b")))
    row = driven.views.submission("s")
    passes = looks = 0

    class Counted(Etas):
        def working_out(self, rows: list[SubmissionRow]) -> Generator[Pause, None, None]:
            nonlocal passes
            passes += 1
            yield from super().working_out(rows)

        def _looked_at(self) -> list[SubmissionRow]:
            nonlocal looks
            looks += 1
            return super()._looked_at()

    async def look_until(enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not enough():  # noqa: ASYNC110 - a pass sends no event
                await asyncio.sleep(0)

    async def some_looks() -> int:
        before = looks
        await look_until(lambda: looks >= before + 5)
        return passes

    etas = Counted(driven.views, driven.farm, Nothing(), SystemClock())
    running = asyncio.create_task(etas.run())
    await etas.wait_for([row], PATIENCE_S)
    asked_for = await some_looks()
    driven.join()
    etas.wake()
    assert await some_looks() == asked_for
    etas.of(row)
    await look_until(lambda: passes == asked_for + 1)
    with driven.views.watch(row, lambda: None):
        await look_until(lambda: passes > asked_for + 5)
    running.cancel()


async def test_what_follows_a_build_is_foreseen_to_begin_after_it(driven: DrivenViews) -> None:
    class Hundred:
        answers = 0

        def expected(self, *_: str) -> Expected:
            return Expected(100.0, 100.0)

    driven.tell(submission("s", "top", spec("top", "low"), spec("low")))
    driven.join(takes_successors=True)
    clock = Moved()
    etas = Etas(driven.views, driven.farm, Hundred(), clock)
    row = driven.views.submission("s")
    low, top = (driven.farm.state.steps[StepKey(key)] for key in ("low", "top"))

    async def left_s(after_s: float) -> float:
        clock.at = driven.now + after_s
        whole(etas.working_out([row]))
        eta = etas.of(row)
        assert eta is not None
        return eta.sooner_at - clock.at

    assert (low.state, top.state) == (StepState.LEASED, StepState.LEASED)
    await etas.wait_for([row], 0)
    assert await left_s(60) == pytest.approx(140, abs=1)
    driven.now += 100
    driven.tell(BuildSucceeded(low.lease, low.builder, evidence("low")))
    assert await left_s(30) == pytest.approx(70, abs=1)


class Nothing:
    """A source of durations that knows none."""

    answers = 0

    def expected(self, name: str, system: str) -> None:
        """Know none."""


@pytest.fixture
def driven() -> DrivenViews:
    return DrivenViews()


async def test_throughput_is_counted_by_stretches_and_outlives_a_store_that_fails(driven: DrivenViews) -> None:
    answers: Iterator[list[tuple[int, str, int]] | None] = iter([[(0, "done", 9), (59, "failed", 2), (59, "lost", 5)]])
    asked: list[tuple[float, float, float]] = []

    async def ended(since: float, until: float, every_s: float) -> list[tuple[int, str, int]]:
        asked.append((since, until, every_s))
        found = next(answers, None)
        if found is None:
            raise TimingsError("the database of timings failed: locked.")
        return found

    clock = Moved()
    throughput = Throughput(driven.views, ended, clock)
    first = await throughput.of(HOUR)
    assert (first.bars[0], first.bars[59], first.total) == (
        ThroughputBar(finished=9), ThroughputBar(failed=2), ThroughputBar(finished=9, failed=2),
    )  # fmt: skip
    ((since, until, every_s),) = asked
    assert until - since == 60 * every_s == 3600
    assert until - 60 <= NOW < until
    clock.at += HOUR.kept_s - 1
    assert await throughput.of(HOUR) is first
    assert len(asked) == 1
    clock.at += 2
    assert await throughput.of(HOUR) is first
    assert len(asked) == 2


class Moved:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.at = NOW

    def now(self) -> float:
        return self.at


def test_what_submissions_found_in_the_cache_is_counted_when_they_came() -> None:
    rows = [SubmissionRow(SubmissionId(str(number)), NOW - 60 * number, set(), [], held=3) for number in range(3)]
    view: ThroughputView = whole(counting(HOUR, (NOW // 60 + 1) * 60, [(58, "done", 10)], rows))
    assert [bar.reused for bar in view.bars[-4:]] == [0, 3, 3, 3]
    assert rate(view) == "2.0 builds/min; last hour 10 finished, 0 failed, 9 reused"
