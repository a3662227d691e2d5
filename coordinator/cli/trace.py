"""`drover trace`: a submission's attempts as a trace file for Perfetto or `chrome://tracing`, one track a worker slot.

Format: Trace Event Format of Chromium, JSON object form: complete events (`ph` X, microseconds) and metadata (`ph` M).
A worker is a process, each of its slots a thread. Which slot an attempt had is not kept, so attempts are put on the
first track of their worker that is free when they begin, which takes as many tracks as attempts overlapped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import orjson

from coordinator.api.timeline_models import AttemptView
from coordinator.cli import exit_status
from coordinator.client.api_client import ApiClient
from coordinator.errors import CoordinatorError

#: Seconds by which a track is taken for free before its attempt ends: two programs' clocks agree no better.
_OVERLAP_S = 0.001


class TraceFileError(CoordinatorError):
    """A trace file that cannot be written."""

    code = "trace_file"


async def trace(client: ApiClient, submission: str, file: Path) -> int:
    """Write the trace of a submission. Raises `TraceFileError`."""
    view = await client.submission(submission)
    attempts = await client.submission_timeline(submission)
    try:
        await asyncio.to_thread(file.write_bytes, orjson.dumps(chrome_trace(view.label or view.id, attempts)))
    except OSError as error:
        raise TraceFileError(f"cannot write {file}: {error.strerror}.") from None
    click.echo(f"{len(attempts)} attempts are in {file}; open it at https://ui.perfetto.dev")
    return exit_status.OK


def chrome_trace(title: str, attempts: Sequence[AttemptView]) -> dict[str, Any]:
    """Return the trace as JSON's values; attempts that no worker had are left out."""
    placed = [each for each in attempts if each.worker and each.leased_at is not None]
    workers = {worker: number for number, worker in enumerate(sorted({each.worker for each in placed}), 1)}
    events: list[dict[str, Any]] = [_meta("process_name", number, 0, worker) for worker, number in workers.items()]
    for worker, number in workers.items():
        own = [each for each in placed if each.worker == worker]
        tracks = _tracks(own)
        events += [_meta("thread_name", number, track, f"slot {track}") for track in sorted({*tracks.values()})]
        for each in own:
            events += _events(each, number, tracks[each.step, each.attempt])
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"submission": title}}


def _tracks(attempts: Iterable[AttemptView]) -> dict[tuple[str, int], int]:
    """Give each attempt the first track, from 1, that is free when it begins."""
    free_at: list[float] = []
    tracks: dict[tuple[str, int], int] = {}
    for each in sorted(attempts, key=lambda each: each.leased_at or 0.0):
        begin = each.leased_at or 0.0
        track = next((index for index, free in enumerate(free_at) if free <= begin + _OVERLAP_S), len(free_at))
        if track == len(free_at):
            free_at.append(0.0)
        free_at[track] = _end(each)
        tracks[each.step, each.attempt] = track + 1
    return tracks


def _end(attempt: AttemptView) -> float:
    """Return when an attempt ended, or the last that is known of one that runs."""
    begin = attempt.leased_at or 0.0
    if attempt.ended_at is not None:
        return max(begin, attempt.ended_at)
    return max((begin, *(span.at + span.took_s for span in (*attempt.spans, *attempt.phases))))


def _events(attempt: AttemptView, process: int, track: int) -> Iterator[dict[str, Any]]:
    begin = attempt.leased_at or 0.0
    about = {
        "step": attempt.step,
        "attempt": attempt.attempt,
        "system": attempt.system,
        "outcome": attempt.outcome,
        "reason": attempt.reason,
        "message": attempt.message,
        "cpu_s": attempt.cpu_s,
        "peak_memory_bytes": attempt.peak_memory_bytes,
        "fetched_bytes": attempt.fetched_bytes,
        "uploaded_bytes": attempt.uploaded_bytes,
        "waited_s": None if attempt.ready_at is None else begin - attempt.ready_at,
    }
    known = {name: value for name, value in about.items() if value not in {None, ""}}
    yield _complete(attempt.name or attempt.step, "attempt", process, track, begin, _end(attempt) - begin, known)
    for span in attempt.spans:
        yield _complete(span.name, "stage", process, track, span.at, span.took_s, {})
    for phase in attempt.phases:
        yield _complete(phase.name, "phase", process, track, phase.at, phase.took_s, {})


def _complete(  # noqa: PLR0917 - the fields of the format
    name: str, category: str, process: int, track: int, at: float, took_s: float, about: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": process,
        "tid": track,
        "ts": round(at * 1e6),
        "dur": round(took_s * 1e6),
        "args": about,
    }


def _meta(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}
