"""Rendering for people, as golden text; a check that a build's log cannot take a terminal over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.flakes import RecipeRecordView, WorkerRecordView, worker_sentence
from coordinator.api.models import (
    Counts,
    CountsChanged,
    Ended,
    EtaView,
    FailureView,
    RootFailureView,
    RootView,
    Snapshot,
    StepChanged,
    StepStatus,
    SubmissionState,
    SubmissionView,
    WaitingView,
    WorkerView,
)
from coordinator.cli.printing import size
from coordinator.cli.progress import News, Progress
from coordinator.cli.rendering import (
    doing,
    duration,
    failure_lines,
    heartbeat_line,
    news_lines,
    sanitise,
    status_lines,
    submission_rows,
    summary_lines,
    table_lines,
)
from coordinator.cli.worker_text import worker_lines
from tests.support.screens import NOW, moving, step


def submission(state: SubmissionState = SubmissionState.RUNNING, **more: Any) -> SubmissionView:
    root = RootView(
        attr="hello",
        drv=f"/nix/store/{'1' * 32}-hello.drv",
        step=f"{'0' * 32}-hello",
        state=StepStatus.DONE,
        outputs={"out": "/nix/store/hello", "dev": "/nix/store/hello-dev"},
    )
    given: dict[str, Any] = {
        "id": "abc123",
        "label": "",
        "state": state,
        "created_at": NOW - 100,
        "roots": (root,),
        "counts": Counts(
            total=40, held=3, joined=2, done=9, running=2, publishing=1, ready=4, waiting=19, failed=1, doomed=1
        ),
        "derivations": 44,
        "uploaded_bytes": 1536 * 1024,
    }
    return SubmissionView(**{**given, **more})


FAILED = step(
    "broken",
    StepStatus.FAILED,
    ended_at=NOW,
    failure=FailureView(kind="permanent", message="builder failed with exit code 7; last 2 log lines:\n> one"),
    log_tail="one\n\x1b[31mred\x1b[0m\n10%\r20%\rdone\n",
)


def test_a_failure_is_one_block_with_the_command_that_shows_the_rest() -> None:
    assert failure_lines(FAILED) == [
        "✘ broken failed on native after 1m02s: builder failed with exit code 7",
        "  │ one",
        "  │ red",
        "  │ done",
        f"  the whole log: drover log {'0' * 32}-broken",
    ]
    record = RecipeRecordView(attempts=5, succeeded=3, flaky=True)
    assert failure_lines(replace(FAILED, record=record))[-2] == (
        "  failed here, succeeded 3 of 5 times with the same recipe: flaky, 40 % fail"
    )
    odd = step("c++-1.0?z=1", StepStatus.FAILED)
    assert failure_lines(replace(FAILED, failed_in="checkPhase"))[0] == (
        "✘ broken failed on native after 1m02s in checkPhase: builder failed with exit code 7"
    )
    # What no worker ever took has no log.
    assert failure_lines(replace(odd, attempt=0))[-1] == f"  more: drover why '{odd.key}'"
    assert failure_lines(odd)[-1] == f"  the whole log: drover log '{'0' * 32}-c++-1.0?z=1'"


def test_plain_lines_say_each_thing_once_even_when_the_stream_begins_again() -> None:
    progress = Progress()
    running = step("a")
    told = [
        line
        for event in (
            Snapshot(submission=submission(), steps=(running, FAILED)),
            StepChanged(step=replace(running, stage="uploading")),
            Snapshot(submission=submission(), steps=(running, FAILED)),
            StepChanged(step=step("a", attempt=9, worker="other")),
            StepChanged(step=step("a", StepStatus.DONE, attempt=9, worker="other", ended_at=NOW)),
            StepChanged(step=step("held", StepStatus.DONE, attempt=0)),
            Ended(submission=submission(SubmissionState.FAILED)),
        )
        for news, each in progress.apply(event)
        for line in (news_lines(news, each) if news is not News.FAILED else ["failed"])
    ]
    assert told == ["started a on native", "failed", "started a again on other", "built a on other in 1m02s"]
    assert progress.ended
    assert not progress.running


def test_what_follows_a_build_is_started_once_it_begins() -> None:
    progress = Progress()
    follower = step("b", stage="queued", waiting=WaitingView(kind="follows", count=1, steps=("a",)))
    assert progress.apply(Snapshot(submission=submission(), steps=(follower,))) == []
    assert not progress.running
    begun = replace(follower, stage="building", waiting=None)
    assert progress.apply(StepChanged(step=begun)) == [(News.STARTED, begun)]
    assert list(progress.running) == [begun.key]


def test_the_heartbeat_names_what_runs_longest() -> None:
    progress = Progress()
    rows = tuple(step(f"s{n}", started_at=NOW - n, phase="checkPhase" if n == 6 else "") for n in range(7))
    progress.apply(Snapshot(submission=submission(), steps=rows))
    assert heartbeat_line(progress, NOW) == (
        "12 done, 3 cached, 3 running, 4 ready, 19 waiting, 1 failed, 1 doomed of 40; running: s6 (6s, checkPhase), "
        "s5 (5s, building), s4 (4s, building), s3 (3s, building), s2 (2s, building) and 2 more"
    )


def test_what_is_fetched_or_uploaded_is_said_with_its_bytes_and_injects_nothing() -> None:
    progress = Progress()
    progress.apply(Snapshot(submission=submission(), steps=(step("a", stage="fetching"), step("b", stage="uploading"))))
    progress.apply(moving("a", "fetch", "gcc-14\x1b]0;title\x07\n::error::", 3 << 20, 12 << 20))
    progress.apply(moving("b", "upload", "b", 1536, None))
    progress.apply(moving("gone", "fetch", "gcc", 1, 2))
    assert [doing(each) for each in progress.running.values()] == [
        "fetching 3.0 MiB of 12.0 MiB, gcc-14 ::error::",
        "uploading 1.5 KiB, b",
    ]
    progress.apply(StepChanged(step=step("a", phase="buildPhase")))
    assert doing(progress.running[f"{'0' * 32}-a"]) == "buildPhase", "what has arrived moves no more"


def test_the_heartbeat_says_each_time_what_waits_and_why() -> None:
    progress = Progress()
    waiting = CountsChanged(
        counts=Counts(total=304, done=303, ready=1),
        uploaded_bytes=0,
        stuck=("1 step waits: no worker offers riscv64-linux",),
        queued=("3 steps wait for x86_64-linux: all 2 workers that could are full",),
    )
    progress.apply(waiting)
    said = (
        "303 done, 1 ready of 304; 1 step waits: no worker offers riscv64-linux; "
        "3 steps wait for x86_64-linux: all 2 workers that could are full"
    )
    assert [heartbeat_line(progress, NOW + 30 * n) for n in range(2)] == [said, said]
    because = "no worker offers riscv64-linux"
    endless = EtaView(at=NOW, sooner_at=0.0, later_at=0.0, bound="no_worker", because=because, steps=1)
    progress.eta = endless
    assert heartbeat_line(progress, NOW) == f"{said}; no end in sight"
    progress.eta = replace(endless, because="no worker has joined")
    assert heartbeat_line(progress, NOW) == f"{said}; no end in sight: no worker has joined"


def test_the_summary_tells_what_was_built_shared_and_uploaded() -> None:
    ended = submission(SubmissionState.FAILED, ended_at=NOW)
    assert summary_lines(ended, [FAILED], NOW) == [
        "failed: submission abc123 after 1m40s",
        (
            "  steps         9 built, 3 already in the cache, 2 shared with other submissions, 1 failed, 1 doomed; "
            "40 in all"
        ),
        "  deduplicated  4 of 44 derivations make what another one makes",
        "  uploaded      1.5 MiB",
        "  hello.dev  /nix/store/hello-dev",
        "  hello  /nix/store/hello",
        f"  ✘ broken: drover log {'0' * 32}-broken",
    ]
    many = submission(SubmissionState.SUCCEEDED, roots=submission().roots * 30)
    assert summary_lines(many, [], NOW)[-1] == "  and 40 more; `--json` lists all"


def test_an_ended_submission_names_every_root_that_is_not_built_and_why() -> None:
    failure = RootFailureView(
        step="0-broken", name="broken\x1b[2J", kind="permanent", message="exit code 7; last 1 log line:\nx"
    )
    states = {
        "own": StepStatus.FAILED,
        "above": StepStatus.DOOMED,
        "left": StepStatus.ABANDONED,
        "good": StepStatus.DONE,
    }
    roots = tuple(
        RootView(
            attr=attr,
            drv="/nix/store/x.drv",
            step="0-broken" if attr == "own" else attr,
            state=state,
            outputs={},
            failure=failure if attr in {"own", "above"} else None,
        )
        for attr, state in states.items()
    )
    ended = submission(SubmissionState.FAILED, ended_at=NOW, roots=roots)
    told = [
        "  ✘ own  failed: exit code 7; the log: drover log 0-broken",
        "  ✘ above  not built because broken failed: exit code 7; the log: drover log 0-broken",
        "  ✘ left  not built: abandoned",
    ]
    never = replace(roots[0], failure=replace(failure, has_log=False))
    assert summary_lines(replace(ended, roots=(never,)), [], NOW)[-1].endswith("exit code 7; more: drover why 0-broken")
    failed = replace(FAILED, key="0-broken")
    assert summary_lines(ended, [failed], NOW)[-3:] == told
    assert status_lines(ended, [failed], NOW)[-3:] == told
    running = submission(roots=roots)
    assert status_lines(running, [], NOW)[-2:] == told[:2]
    cancelled = submission(SubmissionState.CANCELLED, ended_at=NOW, roots=roots)
    assert summary_lines(cancelled, [], NOW)[-1] == "  ✘ left  not built: the submission was cancelled"


def test_status_says_why_nothing_happens() -> None:
    waiting = submission(stuck=("1 step waits: no worker offers riscv64-linux",), counts=Counts(total=2, waiting=2))
    assert status_lines(waiting, [], NOW) == [
        "running: submission abc123 since 1m40s",
        "  0 done, 2 waiting of 2",
        "  ! 1 step waits: no worker offers riscv64-linux",
    ]


def test_tables_are_aligned_and_emulation_is_labelled() -> None:
    worker = WorkerView(
        name="mac",
        state="online",
        systems=("x86_64-linux", "aarch64-darwin"),
        emulated=("aarch64-darwin",),
        features=(),
        slots=2,
        leases=(("k", "building"),),
        nix_version="2.8.0",
        isolation="A",
        built=3,
        last_seen=NOW - 2,
    )
    record = WorkerRecordView(attempts=90, failed_attempts=15, failed=12, failures=14, expected=3.14, stands_out=True)
    worker = replace(worker, speeds={"x86_64-linux": 0.512, "aarch64-darwin": 0.512})
    weak = replace(
        worker,
        name="weak",
        speeds={"x86_64-linux": 2.0, "aarch64-darwin": 0.2},
        isolation="C",
        isolation_reasons=("one", "another"),
        record=record,
    )
    speeds = "aarch64-darwin 0.2, x86_64-linux 2"
    resting = replace(worker, name="full", speeds={}, state="quarantined", reason="its disk is full", until=NOW + 9)
    systems = "x86_64-linux, aarch64-darwin (emulated)"
    assert worker_lines([worker, resting, weak], NOW) == [
        f"WORKER  STATE        CLASS  BUSY  BUILT  FAILED  {'SPEED':34}  SEEN    NIX    {'SYSTEMS':39}  FEATURES",
        f"mac     online       A      1/2   3      -       {'0.51':34}  2s ago  2.8.0  {systems}  -",
        f"full    quarantined  A      1/2   3      -       {'-':34}  2s ago  2.8.0  {systems}  -",
        f"weak    online       C      1/2   3      15/90   {speeds}  2s ago  2.8.0  {systems}  -",
        "",
        "full is quarantined for 9s: its disk is full",
        f"weak: {worker_sentence(record)}",
        "weak is of isolation class C: one; another",
    ]
    assert len(worker_lines([worker], NOW)) == 2
    assert table_lines(submission_rows([submission()], NOW)) == [
        "SUBMISSION  STATE    AGE    DONE   FAILED  WANTED",
        "abc123      running  1m40s  12/40  2       hello",
    ]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bP1;2q#payload\x1b\\after", "after"),
        ("a\x9b31mb", "ab"),
        ("10%\r50%\r100%\r\nnext", "100%\nnext"),
        ("tab\there", "tab     here"),
        ("\u202eright to left", "right to left"),
        ("x" * 600, "x" * 500),
    ],
)
def test_logs_are_sanitised(raw: str, shown: str) -> None:
    assert sanitise(raw) == shown


@given(st.text())
def test_no_control_character_survives(text: str) -> None:
    assert all(char == "\n" or (char.isprintable() or char.isspace() or ord(char) > 0x9F) for char in sanitise(text))
    assert "\x1b" not in sanitise(text)
    assert "\r" not in sanitise(text)


def test_lengths_of_time_and_sizes() -> None:
    assert [duration(s) for s in (-1, 0, 59.9, 62, 3600, 7500)] == ["0s", "0s", "59s", "1m02s", "1h00m", "2h05m"]
    assert [size(n) for n in (0, 1023, 1024, 5 << 20, 3 << 40)] == ["0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3.0 TiB"]
