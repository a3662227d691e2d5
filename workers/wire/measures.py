"""Measurements of one attempt, as an agent takes them and a report carries them.

Times are the agent's: Unix seconds of its clock, which may be off by any amount, and durations, which are right because
that clock only adds monotonic time. What a machine does not measure is None. The lists are bounded; what is beyond the
bound is counted and summed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

#: Fetches that a report names, the largest; and phases, the first. The others are counted and summed.
MAX_FETCHES = 32
MAX_PHASES = 64

#: Where an input came from: the object store, or the coordinator's cache over HTTP.
FetchSource = Literal["objects", "cache"]
#: What a lease is doing, apart from its phases.
SpanName = Literal["inputs", "build", "pack", "upload"]


class _Measure(BaseModel):
    """Base of all measures: immutable. Fields of a later agent are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Span(_Measure):
    """One stretch of an attempt. Between two of them it waited: for a slot, or for its turn."""

    name: SpanName
    at: float
    took_s: float


class BuildPhase(_Measure):
    """One phase that the builder announced (`@nix` setPhase), until the next one or the end of the build."""

    name: Annotated[str, Field(max_length=100)]
    at: float
    took_s: float
    #: Number of the line of the log that it begins with, from 1; 0 behind a log's limit, and from an older worker.
    line: int = 0


class InputFetch(_Measure):
    """One input that was fetched while the attempt waited for it; the bytes are those of its NAR, unpacked."""

    #: Full store path.
    path: Annotated[str, Field(max_length=1024)]
    source: FetchSource
    nar_bytes: int
    at: float
    took_s: float
    #: Another attempt on this worker had begun to fetch it.
    shared: bool = False


class Measures(_Measure):
    """All of one attempt. `pack` is reading, hashing and compressing outputs; while it overlaps `upload` it is `pack`.

    `more_…` count and sum what is beyond the bounds.
    """

    spans: Annotated[tuple[Span, ...], Field(max_length=8)] = ()
    phases: Annotated[tuple[BuildPhase, ...], Field(max_length=MAX_PHASES)] = ()
    more_phases: int = 0
    more_phases_s: float = 0.0
    #: By size, the largest first.
    fetches: Annotated[tuple[InputFetch, ...], Field(max_length=MAX_FETCHES)] = ()
    more_fetches: int = 0
    more_fetches_bytes: int = 0
    #: Bytes of the NARs of inputs that had come before the lease, because the worker was let fetch them ahead.
    ahead_bytes: int = 0
    #: Of the builders and all their processes: seconds of processor time, most memory (of their own at one look; where
    #: a control group counts it, at any time, with pages of files), bytes from and to disks (their Nix daemon's too).
    cpu_s: float | None = None
    peak_memory_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    #: As in the order: by it an attempt's span leads to the worker's log, in whatever trace it ends.
    traceparent: Annotated[str, Field(max_length=256)] = ""
