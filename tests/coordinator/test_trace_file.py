"""`drover trace` writes what Perfetto reads: one track a slot, on which nothing overlaps but what nests."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.timeline_models import AttemptView, StretchView
from coordinator.cli.trace import chrome_trace

_DEFAULTS: dict[str, Any] = {
    field.name: None if "None" in str(field.type) else () if "tuple" in str(field.type) else ""
    for field in dataclasses.fields(AttemptView)
}


def attempt(number: int, begin: float, took_s: float | None, worker: str = "w") -> AttemptView:
    spans = () if took_s is None else (StretchView(name="build", at=begin, took_s=took_s / 2),)
    known = {
        "step": f"step-{number}",
        "attempt": 1,
        "name": f"name-{number}",
        "worker": worker,
        "leased_at": begin,
        "ended_at": None if took_s is None else begin + took_s,
        "spans": spans,
    }
    return AttemptView(**{**_DEFAULTS, **known})


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(1, 20), st.sampled_from(["linux", "mac"])), min_size=1, max_size=30
    )
)
def test_attempts_on_one_track_follow_each_other_and_every_one_is_there(runs: list[tuple[int, int, str]]) -> None:
    attempts = [attempt(number, begin, took, worker) for number, (begin, took, worker) in enumerate(runs)]
    trace = json.loads(json.dumps(chrome_trace("x", attempts)))
    events = [event for event in trace["traceEvents"] if event.get("cat") == "attempt"]
    assert sorted(event["args"]["step"] for event in events) == sorted(each.step for each in attempts)
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    for track in tracks.values():
        ordered = sorted(track, key=lambda event: event["ts"])
        assert all(before["ts"] + before["dur"] <= after["ts"] + 1000 for before, after in pairwise(ordered))


def test_a_worker_is_a_process_whose_slots_are_named_threads() -> None:
    trace = chrome_trace(
        "x", [attempt(1, 10.0, 5.0, "mac"), attempt(2, 12.0, 5.0, "mac"), attempt(3, 16.0, 1.0, "mac")]
    )
    names = [
        (event["name"], event["tid"], event["args"]["name"]) for event in trace["traceEvents"] if event["ph"] == "M"
    ]
    assert names == [("process_name", 0, "mac"), ("thread_name", 1, "slot 1"), ("thread_name", 2, "slot 2")]
    [first] = [event for event in trace["traceEvents"] if event["name"] == "name-1"]
    assert (first["ph"], first["ts"], first["dur"], first["args"]) == (
        "X",
        10_000_000,
        5_000_000,
        {"step": "step-1", "attempt": 1},
    )
    [build] = [event for event in trace["traceEvents"] if event["name"] == "build" and event["ts"] == 10_000_000]
    assert (build["cat"], build["dur"], build["tid"]) == ("stage", 2_500_000, 1)


def test_what_runs_ends_with_what_is_known_and_what_no_worker_had_is_left_out() -> None:
    trace = chrome_trace("x", [attempt(1, 10.0, None), attempt(2, 10.0, 1.0, worker="")])
    [event] = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert (event["name"], event["dur"]) == ("name-1", 0)
