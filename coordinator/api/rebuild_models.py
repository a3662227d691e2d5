"""Answers about builds that were not submitted yet, and about two builds of the same: sizes, likeness, causes.

Plain records, as those of `coordinator.api.models`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from coordinator.api.difference_models import ChangeView
from infra.records import record

#: `cached`: all of its outputs are in the cache. `failed`: its last build failed, or one that it stands on.
#: `running`: a submission has it built now, or will. `unknown`: it was not built, or that is forgotten.
ForecastState: TypeAlias = Literal["cached", "failed", "running", "unknown"]
#: As `infra.cache.likeness`.
LikenessName: TypeAlias = Literal["same", "no-op", "different", "absent", "too large", "unread"]


@record(frozen=True, slots=True, kw_only=True)
class RootForecast:
    """A derivation of the question: its step, and what is known of that."""

    step: str
    state: ForecastState
    #: Of one that failed: the step whose own failure is the root cause, which may be itself.
    cause: str = ""


@record(frozen=True, slots=True, kw_only=True)
class SystemForecast:
    """Steps that would be built for one system."""

    system: str
    steps: int
    #: Those without history.
    unknown: int
    #: Seconds of builds, as far as they are known.
    build_s: float
    #: Builds that workers do at one time for the system now.
    slots: int


@record(frozen=True, slots=True, kw_only=True)
class ForecastView:
    """Size of a submission of some derivations, before anything is built."""

    #: In the order of the question.
    roots: tuple[RootForecast, ...]
    #: Derivations of the closure, and steps that would be built.
    derivations: int
    steps: int
    #: Steps in the cache at which the graph ends.
    cached: int
    #: Of the steps that would be built: those that are known to fail, and those that other submissions want already.
    failed: int
    running: int
    systems: tuple[SystemForecast, ...]
    #: Outputs in the cache that these steps begin from, and bytes of their objects.
    inputs: int
    input_bytes: int
    #: Seconds of builds and of processors that the newest builds of the same packages took, as far as they are known,
    #: and the steps of which they are not.
    build_s: float
    unknown: int
    cpu_s: float
    cpu_unknown: int
    #: Seconds from now, if the farm did nothing else: no earlier than `sooner_s`; `later_s` is None where no end can be
    #: foreseen. `bound` and `because` as of `EtaView`.
    sooner_s: float
    later_s: float | None
    bound: Literal["", "path", "capacity", "no_worker", "unknown"]
    bound_system: str = ""


@record(frozen=True, slots=True, kw_only=True)
class ComparedOutputView:
    """Two outputs: their likeness, and bytes of their NARs and closures; null where that is not known."""

    likeness: LikenessName
    nar_before: int | None
    nar_after: int | None
    closure_before: int | None
    closure_after: int | None


@record(frozen=True, slots=True, kw_only=True)
class ComparedOutputsView:
    """Likeness of each pair of the question, in its order. `unread` ones are to be asked for again."""

    outputs: tuple[ComparedOutputView, ...]


@record(frozen=True, slots=True, kw_only=True)
class RebuildCauseView:
    """One thing that changed, or could not be compared, in `count` derivations."""

    #: The first of their names.
    names: tuple[str, ...]
    count: int
    #: Changed derivations of the question that follow from it.
    reach: int
    #: The first of `change_count`.
    changes: tuple[ChangeView, ...]
    change_count: int
    #: Base names of the first pair.
    drv: str
    previous_drv: str
    uncompared: Literal["", "unknown", "too large"] = ""


@record(frozen=True, slots=True, kw_only=True)
class RebuildCausesView:
    """All that many changed derivations follow from, what reaches most first."""

    causes: tuple[RebuildCauseView, ...] = ()
    #: More than are told apart: the last of `causes` then stands for the rest.
    cause_count: int = 0
    #: For each pair of the question the places of its causes.
    reasons: tuple[tuple[int, ...], ...] = ()
    compared: int = 0
    unfollowed: int = 0
