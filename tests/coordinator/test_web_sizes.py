"""No page of a farm with 100,000 steps is large, or holds the event loop for long.

Busy is counted in lines of Python that ran, as in `test_pauses`. The farm is real core and read model, filled by events
without a build: a third of its steps are doomed by one failure, a third wait, a fifth are ready, some run.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from coordinator.api.estimates import ThroughputBar, ThroughputView
from coordinator.api.models import FarmView, Snapshot, StepStatus
from coordinator.http.answers import json_of
from coordinator.http.web.assets import Assets
from coordinator.http.web.farm import FarmPage, WorkerLine
from coordinator.http.web.graph import DrawnStep, drawing
from coordinator.http.web.guards import Visitor
from coordinator.http.web.lines import submission_line
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.submission import SubmissionPage
from coordinator.http.web.submission_lists import SubmissionLists
from coordinator.http.web.timeline import (
    BOXES,
    BUCKET_WIDTH,
    MOST_WIDTH,
    STAGED,
    WORKERS_DRAWN,
    Subject,
    TimelineData,
    TimelinePage,
)
from coordinator.http.web.waterfall import TimeWindow
from coordinator.journal.codec import RootNote
from coordinator.readmodel.critical_path import submission_eta
from coordinator.readmodel.differences import known_before
from coordinator.readmodel.estimate import Expected
from coordinator.readmodel.etas import Etas
from coordinator.readmodel.explain import FarmExplainer
from coordinator.readmodel.surroundings import surrounding, way_down
from coordinator.readmodel.views import ROOTS_SHOWN, Views
from coordinator.stores.derivations import StepInfo
from coordinator.stores.log_archive import LogArchive
from coordinator.stores.logs import LogStore
from coordinator.stores.timing_windows import Edges
from coordinator.stores.timings import AttemptTiming, Measured
from infra.clock import SystemClock
from infra.objects.store import LocalObjectStore
from scheduler import events as e
from scheduler.farm import Farm
from scheduler.model import (
    BuilderId,
    BuilderSpec,
    Failure,
    FailureKind,
    Instant,
    LeaseId,
    Recipe,
    Requirements,
    StepKey,
    StepSpec,
    SubmissionId,
)
from tests.coordinator.test_pauses import LINES, lines_of_pieces
from tests.support.screens import NOW
from workers.wire.grades import IsolationGrade
from workers.wire.messages import HeldLease, Hello, Stage

#: Bytes of any page.
PAGE_BYTES = 1_000_000
STEPS = 100_000
#: Steps of each kind whose names are known: no page shows more.
NAMED = 2_000
WORKERS, SLOTS = 60, 16
NEEDS = Requirements("sys")
T = TypeVar("T")


def key_of(name: str) -> StepKey:
    return StepKey(f"{'0' * 32}-{name}")


BAD, SLOW, FINE = (key_of(name) for name in ("bad", "slow", "fine"))
DOOMED = tuple(key_of(f"doomed-{number}-{'x' * 60}") for number in range(STEPS // 3))
WAITING = tuple(key_of(f"waiting-{number}-{'x' * 60}") for number in range(STEPS // 3))
READY = tuple(key_of(f"ready-{number}-{'x' * 60}") for number in range(STEPS // 5))


class Filled:
    """A farm with one submission of all steps."""

    def __init__(self, logs: Path) -> None:
        self.core = Farm()
        self.logs = LogStore(logs, 1 << 20, LogArchive(LocalObjectStore(logs / "objects"), 1 << 20))
        self.explainer = FarmExplainer(self.core, self.logs, SystemClock())
        self.views = Views(self.explainer)
        self.renderer = PageRenderer(Assets(), SystemClock())
        self.streams = LiveStreams(1)
        builders = [BuilderId(f"worker-{number}") for number in range(WORKERS)]
        self._tell(e.SubmissionReceived(SubmissionId("s"), (*DOOMED, *WAITING, *READY), tuple(_specs())))
        self._tell(*(e.BuilderJoined(BuilderSpec(name, "1", frozenset({"sys"})), SLOTS) for name in builders))
        for each in (BAD, FINE):
            (lease, builder) = self._lease_of(each)
            failure = Failure(FailureKind.PERMANENT, "exit status 1")
            self._tell(e.BuildFailed(lease, builder, failure) if each == BAD else e.BuildSucceeded(lease, builder, b""))
        self._tell(e.OutputsPublished(self._lease_of(FINE)[0]))
        infos = [_info(key) for many in ((BAD, SLOW, FINE), DOOMED, WAITING, READY) for key in many[:NAMED]]
        self.views.add_details({info.key: info for info in infos})
        for name in builders:
            held = list(self.core.state.builders[name].leases)
            self.views.workforce.connected(_hello(name, held), 1.0)
        self.row = self.views.submission("s")

    def _tell(self, *events: e.Event) -> None:
        facts, _ = self.core.handle_many(events, Instant(1.0))
        self.views.fold(facts)

    def _lease_of(self, key: StepKey) -> tuple[LeaseId, BuilderId]:
        step = self.core.state.steps[key]
        return LeaseId(key, step.attempt), step.builder

    def farm_view(self) -> FarmView:
        return FarmView(version="1", cache_url="", public_keys=(), store_dir="/nix/store")


def _specs() -> Iterable[StepSpec]:
    for each in (BAD, SLOW, FINE):
        yield StepSpec(each, (Recipe(NEEDS, ()),))
    for many, need in ((DOOMED, BAD), (WAITING, SLOW), (READY, FINE)):
        yield from (StepSpec(key, (Recipe(NEEDS, (need,)),)) for key in many)


def _info(key: StepKey) -> StepInfo:
    path = f"/nix/store/{key}"
    return StepInfo(key, key[33:], "sys", (), f"{path}.drv", (("out", path),))


def _hello(name: str, held: list[StepKey]) -> Hello:
    leases = tuple(HeldLease(step=key, attempt=1, stage=Stage.BUILDING) for key in held)
    return Hello(
        protocol=1, worker=name, incarnation="1", systems=("sys",), emulated=(), features=(), mandatory_features=(),
        slots=SLOTS, capacity=SLOTS, nix_version="2.8", leases=leases, isolation=IsolationGrade(level="A"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    farm = Filled(tmp_path_factory.mktemp("logs"))
    counts = farm.views.step_counts()
    assert counts["doomed"] == len(DOOMED)
    assert counts["waiting"] == len(WAITING)
    assert counts["running"] > 500
    assert sum(counts.values()) > STEPS * 0.85
    return farm


def metered(work: Generator[object, None, T]) -> T:
    """Do work and hold each piece of it to the bound."""
    result: list[T] = []

    def kept() -> Generator[object, None, None]:
        result.append((yield from work))

    pieces = list(lines_of_pieces(kept()))
    assert max(pieces) < LINES
    return result[0]


def rendered(farm: Filled, name: str, page: Any) -> str:
    html = metered(farm.renderer.rendering(name, visitor=Visitor("csrf"), page=page))
    assert len(html.encode()) < PAGE_BYTES
    return html


def test_the_farm_s_page(filled: Filled) -> None:
    none: Any = None
    page = FarmPage(filled.views, filled.farm_view, filled.explainer.queues, none, filled.renderer, filled.streams)
    many = (ThroughputBar(finished=10**6, failed=10**6, reused=10**6),) * 60
    done = ThroughputView(until=NOW, every_s=60.0, bars=many)
    html = rendered(filled, "farm.html", metered(page.gathering(done, done)))
    assert "Last hour: 60,000,000 finished, 60,000,000 failed, 60,000,000 reused." in html
    assert html.count('class="slot on-building"') == filled.views.step_counts()["running"]
    assert f"all {WORKERS} workers that could are full" in html


@pytest.mark.parametrize(("free", "cells"), [(0, []), (4, ["free"] * 4), (5, ["5 free"]), (1_000, ["1,000 free"])])
def test_many_free_slots_of_a_worker_share_a_cell(filled: Filled, free: int, cells: list[str]) -> None:
    line = WorkerLine(filled.views.workforce.views()[0], (), free, 0)
    assert list(line.free_cells) == cells


def test_the_page_of_a_submission(filled: Filled) -> None:
    none: Any = None
    etas = Etas(filled.views, filled.core, Durations(), SystemClock())
    etas.of(filled.row)
    metered(etas.working_out([filled.row]))
    page = SubmissionPage(
        filled.views, none, filled.farm_view, filled.explainer.queues, filled.core, etas, filled.renderer,
        filled.streams,
    )  # fmt: skip
    data = metered(page.gathering(filled.row))
    assert [(cause.step.name, cause.doomed) for cause in data.causes] == [("bad", len(DOOMED))]
    html = rendered(filled, "submission.html", data)
    assert f"One failure, {len(DOOMED):,} steps cannot run because of it" in html


def test_the_pages_of_its_steps(filled: Filled) -> None:
    lists = SubmissionLists(filled.views, filled.renderer)
    rendered(filled, "steps.html", metered(lists.gathering(filled.row, None, 0)))
    # What is looked for stands behind 80,000 others.
    rare = metered(lists.gathering(filled.row, StepStatus.FAILED, 0))
    assert [step.name for step in rare.steps] == ["bad"]
    last = metered(lists.gathering(filled.row, StepStatus.WAITING, STEPS - STEPS // 3))
    rendered(filled, "steps.html", last)


def test_what_a_stream_of_events_begins_with_where_hundreds_of_steps_run(filled: Filled) -> None:
    def whole(parts: Iterator[object]) -> Generator[None, None, list[object]]:
        found = []
        for part in parts:
            found.append(part)
            yield
        return found

    with filled.views.watch(filled.row, lambda: None) as watcher:
        (snapshot,) = [each for each in metered(whole(watcher.events())) if isinstance(each, Snapshot)]
        assert len(snapshot.steps) == len(filled.row.active) + len(filled.row.failed) > 500
        again = metered(watcher.snapshot())
        assert [step.key for step in again.steps] == [step.key for step in snapshot.steps]


def test_the_view_of_a_submission_with_very_many_roots(filled: Filled) -> None:
    """It is rendered in one piece."""
    named = [(key, f"/nix/store/{key}") for key in (*DOOMED, *WAITING)]
    roots = tuple([RootNote(f"attr-{key}", f"{path}.drv", key, (("out", path),)) for key, path in named])
    note = filled.views.note(filled.row.id)
    filled.views.add_details({}, {filled.row.id: replace(note, roots=roots)})

    def viewing() -> Generator[None, None, bytes]:
        yield
        return json_of(filled.views.submission_view(filled.row))

    shown = json.loads(metered(viewing()))
    filled.views.add_details({}, {filled.row.id: note})
    assert shown["root_count"] == len(roots)
    assert len(shown["roots"]) == ROOTS_SHOWN
    assert shown["roots"][0]["failure"]["name"] == "bad"


class Durations:
    """A history of every other package."""

    answers = 0

    def expected(self, name: str, system: str) -> Expected | None:  # noqa: ARG002 - the port's
        return Expected(60.0, 90.0) if len(name) % 2 else None


def test_the_foreseen_end_of_a_submission(filled: Filled) -> None:
    etas = Etas(filled.views, filled.core, Durations(), SystemClock())
    assert etas.of(filled.row) is None
    metered(etas.working_out([filled.row]))
    eta = etas.of(filled.row)
    assert eta is not None
    assert (eta.bound, eta.steps) == ("capacity", len(WAITING) + len(READY) + 1)
    assert eta.because == f"{WORKERS * SLOTS} slots for sys and {eta.steps} steps for them"
    assert 0 < eta.unknown < eta.steps
    assert eta.at < eta.sooner_at < eta.later_at
    found = metered(submission_eta(filled.views, filled.core, etas, filled.row))
    assert found.to_come.count == 2
    assert found.to_come.steps[0].step == SLOW


@pytest.mark.parametrize("key", [BAD, SLOW, FINE, DOOMED[0], READY[-1]])
def test_the_surroundings_of_a_step(filled: Filled, key: StepKey) -> None:
    around = metered(surrounding(filled.core, key))
    if key == BAD:
        assert (around.dependents.total, around.waiting.total) == (len(DOOMED), 0)
    if key == SLOW:
        assert (around.dependents.total, around.waiting.total) == (len(WAITING), len(WAITING))
    if key == DOOMED[0]:
        assert around.needs.steps == (BAD,)
    svg = drawing(around, lambda each: DrawnStep(each, StepStatus.WAITING))
    assert len(svg) < PAGE_BYTES / 20


def test_the_way_down_to_a_step_and_the_step_of_its_name_before_it(filled: Filled) -> None:
    roots = filled.row.roots
    assert metered(way_down(filled.core, roots, BAD, 3 * STEPS))[1:] == (BAD,)
    assert metered(way_down(filled.core, roots, key_of("nowhere"), 3 * STEPS)) == ()
    assert metered(way_down(filled.core, roots, BAD, 0)) == ()
    assert metered(known_before(filled.views, _info(READY[-1]))) == READY[NAMED - 1]
    assert metered(known_before(filled.views, _info(BAD))) is None


def page_and_data(filled: Filled, total: int) -> tuple[TimelinePage, TimelineData]:
    store: Any = None
    page = TimelinePage(filled.views, store, filled.renderer, filled.streams, SystemClock())
    subject = Subject(filled.row, submission_line(filled.views, filled.row), 0.0, 40_000.0, moves=True)
    window = TimeWindow(0.0, 40_000.0, MOST_WIDTH)
    return page, TimelineData(subject, window, True, None, total, 0, (), ())


def test_a_timeline_of_100_000_attempts_shows_all_of_them(filled: Filled) -> None:
    page, data = page_and_data(filled, STEPS)
    buckets = MOST_WIDTH // BUCKET_WIDTH
    width_s = data.window.span_s / buckets
    counted: dict[tuple[str, int, str, str], list[float]] = {}
    for number in range(STEPS):
        worker, begin, took_s = f"worker-{number % (2 * WORKERS)}", number * 0.39, number % 600
        kind = "failed" if number % 7 == 0 else "other" if number % 3 else "done"
        for side, at in (("begin", begin), ("end", begin + took_s)):
            entry = counted.setdefault((side, int(at / width_s), worker, kind), [0, 0.0])
            entry[0] += 1
            entry[1] += at
    edges: dict[str, list[Edges]] = {"begin": [], "end": []}
    for (side, bucket, worker, kind), (count, sum_s) in counted.items():
        edges[side].append(Edges(bucket, worker, kind, int(count), sum_s))
    shown = metered(page.counted(data, [], edges["begin"], edges["end"]))
    assert sum(each.attempts for each in shown.workers) == shown.total == STEPS
    ran_s = sum(number % 600 for number in range(STEPS))
    assert sum(each.busy_s for each in shown.workers) == pytest.approx(ran_s, rel=0.01)
    html = rendered(filled, "timeline.html", shown)
    assert f"{2 * WORKERS - WORKERS_DRAWN} more workers" in html
    assert html.count('class="area is-failed"') == WORKERS_DRAWN + 1
    assert f"{STEPS:,} attempts ran" in html


def test_a_timeline_of_single_attempts(filled: Filled) -> None:
    page, data = page_and_data(filled, BOXES)
    attempts = []
    for number in range(BOXES):
        at = number * 60.0
        name = f"attempt-{number}-{'x' * 60}"
        timing = AttemptTiming(key_of(name), 1, name=name, worker=f"w-{number % 4}", leased_at=at, outcome="done")
        timing.ended_at = at + 3_000
        phases = [(f"phase-{each}", at + each * 100, 90.0) for each in range(20)]
        timing.measured = Measured([("build", at, 3_000.0)], phases)
        attempts.append(timing)
    placed = metered(page.single(data, attempts))
    assert len(placed.boxes) == BOXES
    details = {(each.step, each.attempt): each for each in attempts[:STAGED]}
    shown = metered(page.detailed(placed, details))
    html = rendered(filled, "timeline.html", shown)
    assert html.count('class="run is-other wide"') == BOXES
    assert html.count('class="span-build"') == STAGED
