"""Answers about tracked environments and their coverage, as plain records."""

from __future__ import annotations

from collections.abc import Mapping

from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class RevisionView:
    """One content that an environment had."""

    number: int
    created_at: float
    #: The commit that it was read from, or what else its source calls it.
    mark: str
    #: How it came, where that is worth a sentence.
    note: str
    #: System -> packages there.
    packages: Mapping[str, int]


@record(frozen=True, slots=True, kw_only=True)
class PointerView:
    """Release pointer `stable` of one system."""

    system: str
    #: 0: no revision has been whole there yet.
    revision: int
    moved_at: float
    #: It was rolled back: revisions up to this one do not move it. 0: it was not.
    held_through: int
    #: Revisions where it was before, the last one first.
    before: tuple[int, ...]


@record(frozen=True, slots=True, kw_only=True)
class EnvironmentView:
    """A tracked environment."""

    name: str
    #: `push`, `file` or `git`.
    kind: str
    path: str
    url: str
    ref: str
    #: Whose tokens may change it, beside the operator's.
    owners: tuple[str, ...]
    created_at: float
    #: When its source was looked at last, and when that worked last; 0: never.
    looked_at: float
    seen_at: float
    mark: str
    #: Why the last look failed, and since when looks do; "" where it did not.
    trouble: str
    trouble_since: float
    #: The newest first; a list of environments has the newest one of each alone.
    revisions: tuple[RevisionView, ...]
    stable: tuple[PointerView, ...]


@record(frozen=True, slots=True, kw_only=True)
class GapView:
    """A package that cannot be fetched on a system."""

    system: str
    package: str
    #: What a user's Nix does now: `local` (it builds it) or `impossible`.
    way: str
    #: A word, and a sentence.
    reason: str
    detail: str
    #: Since when it could not be fetched.
    since: float


@record(frozen=True, slots=True, kw_only=True)
class TrendView:
    """Coverage of a system at the end of a week, the present one last."""

    #: Unix seconds of the day's begin.
    day_at: float
    packages: int
    #: Percent that was fetched, from here or from upstream, rounded down.
    fetched: float


@record(frozen=True, slots=True, kw_only=True)
class SystemCoverageView:
    """Coverage of the newest revision on one system. A package counts as fetched with its whole runtime closure alone.

    Percentages are rounded down: 100 is all.
    """

    system: str
    packages: int
    here: int
    upstream: int
    local: int
    impossible: int
    here_percent: float
    upstream_percent: float
    local_percent: float
    impossible_percent: float
    whole: bool
    #: Revision that `stable` is at; 0: none yet.
    stable: int
    #: Reason of gaps -> how many.
    reasons: Mapping[str, int]
    #: Since when there is the oldest gap; 0: there is none.
    oldest_gap_at: float
    trend: tuple[TrendView, ...]


@record(frozen=True, slots=True, kw_only=True)
class CoverageView:
    """Coverage of an environment."""

    environment: str
    #: The revision that it is of, and when it was looked at; 0: not yet.
    revision: int
    assessed_at: float
    systems: tuple[SystemCoverageView, ...]
    #: The oldest first, at most 1,000; a list of environments has the first few of each.
    gaps: tuple[GapView, ...]
    gap_count: int
