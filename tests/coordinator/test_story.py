"""Timelines of a real farm, over HTTP and as `drover story` and `drover history` tell them, also across a restart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from coordinator.api.models import (
    SubmissionState,
)
from coordinator.api.timeline_models import AttemptView, StretchView
from coordinator.cli.history import history_lines, story_lines
from coordinator.client.errors import RefusedError
from coordinator.http.web.history import system_lines
from coordinator.readmodel.history import attempt_view, history_view
from coordinator.stores.timings import AttemptTiming, Measured
from infra.clock import SystemClock
from tests.support.local_fleet import InProcessFleet
from workers.agent.agent import Agent
from workers.agent.settings import WorkerSettings
from workers.wire.fleet import Fleet
from workers.wire.messages import FarmInfo

from .conftest import OpenedFarm, OpenFarm
from .test_cli import drover

#: Of the worker's clock against the coordinator's, seconds.
OFF_S = -600.0
STEPS = """rec {
  base = run "base-1.0" "echo base > $out";
  phased = run "phased-1.2" ''
    echo '@nix {"action":"setPhase","phase":"unpackPhase"}' >&2
    read line < ${BASE}
    echo '@nix {"action":"setPhase","phase":"buildPhase"}' >&2
    while [ ! -e /gate/open ]; do sleep 0.1; done
    echo "$line" > $out
  '';
}""".replace("${BASE}", "${base}")


class WrongClock:
    """A machine's clock that is off by OFF_S."""

    def __init__(self) -> None:
        self._right = SystemClock()

    def now(self) -> float:
        return self._right.now() + OFF_S


def told(farm: OpenedFarm, *words: str) -> str:
    """Return what a command prints about the farm."""
    url, token = farm.coordinator.ready.url, str(farm.coordinator.ready.token_file)
    done = drover(*words, "--coordinator", url, "--token-file", token)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


async def test_a_build_that_outlives_its_coordinator_has_one_whole_timeline_by_the_coordinators_clock(
    open_farm: OpenFarm, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    options = {"sandbox-paths": f"/bin/sh=/bin/busybox /gate={gate}"}
    settings = WorkerSettings(
        name="one",
        state_dir=tmp_path / "one" / "state",
        store=str(tmp_path / "one" / "store"),
        slots=1,
        nix_options=options,
    )
    async with Agent(settings, clock=WrongClock()) as agent:

        @asynccontextmanager
        async def fleet(info: FarmInfo) -> AsyncIterator[Fleet]:
            yield InProcessFleet(info, [agent], long_poll_s=0.5)

        async with open_farm(fleet=fleet) as farm:
            submitted = await farm.submit(STEPS, "phased")
            key = submitted.roots[0].step
            views = farm.coordinator.views
            await farm.until(lambda: views.step(key).life.phase == "buildPhase")
            [running] = await farm.client.timeline(key)
            assert (running.outcome, running.isolation) == ("running", "A")
            # A change that is out of date before it is sent is not sent.
            assert running.phases[-1].name == "buildPhase"
            story = await asyncio.to_thread(told, farm, "story", key)
            assert "it still runs" in story
            assert f"wanted by  submission {submitted.id}, phased: phased-1.2" in story
            assert "attempt 1: a submission wanted it, and the farm's cache lacked its outputs" in story

        async with open_farm(fleet=fleet) as farm:
            (gate / "open").touch()
            assert (await farm.ended(submitted.id)).state is SubmissionState.SUCCEEDED
            [attempt] = await farm.client.timeline("-phased-1.2")
            since = await farm.client.submission_timeline(submitted.id)
            assert {each.name for each in since} == {"base-1.0", "phased-1.2"}
            whole(attempt)
            assert (attempt.submitted_at, attempt.leased_at) == (running.submitted_at, running.leased_at)
            assert (attempt.worker, attempt.system, attempt.isolation) == ("one", "x86_64-linux", "A")
            assert [phase.name for phase in attempt.phases] == ["unpackPhase", "buildPhase"]
            assert attempt.phases[-1].at == pytest.approx(running.phases[-1].at, abs=5.0)

            story = await asyncio.to_thread(told, farm, "story", key)
            in_order = ["submitted", "ready", "leased to one (isolation A)", "the build began", "unpackPhase"]
            in_order += ["buildPhase", "the builder ended", "packed in", "uploaded in", "verified in", "published in"]
            places = [story.index(words) for words in [*in_order, "done; "]]
            assert places == sorted(places), story
            [answer] = json.loads(await asyncio.to_thread(told, farm, "story", key, "--json"))["attempts"]
            assert answer["step"] == key

            assert "1 built, 0 failed" in await asyncio.to_thread(told, farm, "history", "phased")
            [system] = json.loads(await asyncio.to_thread(told, farm, "history", "base-1.0", "--json"))["systems"]
            assert (system["done"], system["flaky"], system["recent"][0]["name"]) == (1, 0, "base-1.0")
            for nothing in (farm.client.timeline("no-such"), farm.client.history("no-such")):
                with pytest.raises(RefusedError) as refused:
                    await nothing
                assert refused.value.http_status == 404


def whole(attempt: AttemptView) -> None:
    """The attempt is done, and all of it lies in order between its lease and its end."""
    assert attempt.outcome == "done"
    times = [attempt.submitted_at, attempt.ready_at, attempt.leased_at, attempt.built_at, attempt.ended_at]
    known = [time for time in times if time is not None]
    assert len(known) == len(times)
    assert known == sorted(known)
    names = [span.name for span in attempt.spans]
    assert [name for name in names if name != "inputs"] == ["build", "pack", "upload", "verify", "publish"]
    stretches = [StretchView(name="", at=known[2], took_s=0.0), *attempt.spans]
    stretches.append(StretchView(name="", at=known[4], took_s=0.0))
    for before, after in pairwise(stretches):
        assert before.at + before.took_s <= after.at + 0.1, attempt.spans
    assert not attempt.cut
    assert attempt.cpu_s is not None
    assert attempt.output_bytes
    assert attempt.uploaded_bytes


def timing(step: str, attempt: int, outcome: str, at: float, **known: object) -> AttemptTiming:
    made = AttemptTiming(step, attempt, recipe=0, name="p-1", system="x", ended_at=at, outcome=outcome)  # type: ignore[arg-type]
    for name, value in known.items():
        setattr(made, name, value)
    return made


def test_a_recipe_that_failed_and_later_succeeded_is_flaky_and_one_that_only_failed_is_not() -> None:
    view = history_view(
        "p",
        [
            timing("bad", 1, "failed", 9.0, reason="permanent"),
            timing("a", 2, "done", 8.0, build_s=30.0, peak_memory_bytes=3 << 30),
            timing("b", 1, "done", 7.0, build_s=10.0, peak_memory_bytes=1 << 30),
            timing("c", 2, "done", 6.5, build_s=20.0),
            timing("c", 1, "lost", 6.0),
            timing("a", 1, "failed", 5.0, reason="permanent"),
        ],
    )
    [system] = view.systems
    assert (system.done, system.failed, system.lost, system.recipes, system.flaky) == (3, 2, 1, 4, 1)
    assert (system.usual_s, system.usual_memory_bytes) == (20.0, 2 << 30)
    text = "\n".join(history_lines(view))
    assert "usually 20.0s, 2.0 GiB of memory" in text
    assert "1 of 4 failed and later succeeded, 25 %: flaky" in text
    assert "  flaky: p-1, failed 1 of 2 times (50 %): a" in text
    assert "failed on" not in text, "with one worker, or none known, there is nothing to compare"


def test_a_history_shows_each_measure_over_time_and_the_workers_that_it_failed_on() -> None:
    attempts = [
        timing("a", 2, "done", 8.0, build_s=30.0, peak_memory_bytes=3 << 30, output_bytes=2000, worker="good"),
        timing("b", 1, "done", 7.0, build_s=10.0, peak_memory_bytes=1 << 30, output_bytes=1000, worker="bad"),
        timing("a", 1, "failed", 5.0, reason="permanent", build_s=2.0, worker="bad"),
        timing("a", 0, "returned", 4.0, reason="returned", worker="good"),
    ]
    [line] = system_lines("p", attempts)
    assert [(each.title, each.most, each.svg.count("<rect")) for each in line.drawings] == [
        ("Build time", "30 s", 3),
        ("Memory at most", "3.22 GB", 2),
        ("Outputs", "2 KB", 2),
    ]
    assert line.drawings[0].svg.index("is-failed") < line.drawings[0].svg.index("is-done"), "the newest on the right"
    assert [(each.worker, each.attempts, each.failed) for each in line.view.workers] == [("bad", 2, 1), ("good", 1, 0)]
    assert "  failed on bad 1/2, good 0/1" in history_lines(history_view("p", attempts))


def test_a_story_of_a_lost_worker_says_no_end_that_was_not_reported() -> None:
    cut = Measured(spans=[("build", 2.0, 5.0)], cut=True)
    lost = timing("s", 1, "lost", 9.0, reason="worker_lost", message="it went away", leased_at=1.0, measured=cut)
    lines = story_lines(None, [attempt_view(lost)])
    assert [line[len("2026-11-29 00:00:00") :].strip() for line in lines[-2:]] == [
        "it had built for 5.0s when the last was received of it",
        "the worker was lost (worker_lost): it went away; 8.0s after the lease",
    ]


def test_a_story_says_nothing_of_what_is_not_known_and_shows_no_control_characters() -> None:
    view = history_view(
        "p", [timing("s", 1, "failed", 9.0, reason="permanent", message="no\x1b]0;title\x07 way\nline")]
    )
    lines = story_lines(None, view.systems[0].recent)
    assert "\x1b" not in "".join(lines)
    assert lines[0] == "p-1  x"
    assert lines[-1].endswith("failed for good (permanent): no way line")
    assert not any(word in line for line in lines for word in ("memory", "processor", "packed", "None", "submitted"))
