"""Arithmetic of coverage, pure: how much of an environment can be fetched on each system, and what is missing.

A package counts as fetched only with its whole runtime closure; which way a package comes is not found here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

DAY_S: Final = 86_400.0
_DAYS_OF_WEEK: Final = 7


class Way(StrEnum):
    """Ways in which the user of a system has a package now."""

    #: Its whole runtime closure is fetched from this farm's cache.
    HERE = "here"
    #: Its whole runtime closure is fetched, a part of it from upstream caches.
    UPSTREAM = "upstream"
    #: Nix builds it on the user's machine.
    LOCAL = "local"
    #: It is not had at all.
    IMPOSSIBLE = "impossible"

    @property
    def is_fetched(self) -> bool:
        """True where no build is needed."""
        return self in {Way.HERE, Way.UPSTREAM}


@dataclass(frozen=True, slots=True)
class PackageStanding:
    """One package of a revision on one system."""

    system: str
    package: str
    way: Way
    #: One word for why it is not fetched, "" where it is.
    reason: str = ""
    #: The same as a sentence, with the root cause of a failure.
    detail: str = ""


@dataclass(frozen=True, slots=True)
class CoverageGap:
    """A package that cannot be fetched on a system."""

    system: str
    package: str
    way: Way
    reason: str
    detail: str
    #: Since when it could not be fetched, whatever the reasons and revisions were.
    since: float


@dataclass(frozen=True, slots=True)
class SystemCoverage:
    """Packages of one revision on one system, by the way in which they come."""

    system: str
    here: int = 0
    upstream: int = 0
    local: int = 0
    impossible: int = 0

    @property
    def total(self) -> int:
        """All packages."""
        return self.here + self.upstream + self.local + self.impossible

    @property
    def fetched(self) -> int:
        """Those that are fetched."""
        return self.here + self.upstream

    @property
    def is_whole(self) -> bool:
        """True where every package is fetched, and there is one."""
        return 0 < self.total == self.fetched

    def percent(self, count: int) -> float:
        """Return a part in percent with one digit, rounded down: 100 is all, and nothing less."""
        return count * 1000 // self.total / 10 if self.total else 0.0


@dataclass(frozen=True, slots=True)
class TrendDay:
    """Coverage of a system as it was last looked at on one day (days since 1970-01-01, UTC)."""

    day: int
    coverage: SystemCoverage


def covered(standings: Iterable[PackageStanding]) -> dict[str, SystemCoverage]:
    """Return the coverage of each system, by name."""
    counts = Counter((each.system, each.way) for each in standings)
    systems = sorted({system for system, _ in counts})
    return {system: SystemCoverage(system, **{way.value: counts[system, way] for way in Way}) for system in systems}


def gaps(standings: Iterable[PackageStanding], before: Iterable[CoverageGap], now: float) -> tuple[CoverageGap, ...]:
    """Return what is missing, the oldest gap first; one that was there before keeps its age."""
    since = {(each.system, each.package): each.since for each in before}
    found = [
        CoverageGap(
            each.system,
            each.package,
            each.way,
            each.reason,
            each.detail,
            since.get((each.system, each.package), now),
        )
        for each in standings
        if not each.way.is_fetched
    ]
    return tuple(sorted(found, key=lambda gap: (gap.since, gap.system, gap.package)))


def oldest(found: Iterable[CoverageGap]) -> dict[str, float]:
    """Return since when each system has had its oldest gap."""
    ages: dict[str, float] = {}
    for gap in found:
        ages[gap.system] = min(gap.since, ages.get(gap.system, gap.since))
    return ages


def by_reason(found: Iterable[CoverageGap]) -> Mapping[str, int]:
    """Return how many gaps have each reason, the most frequent one first."""
    return dict(sorted(Counter(gap.reason for gap in found).items(), key=lambda each: (-each[1], each[0])))


def day_of(instant: float) -> int:
    """Return the day of Unix seconds, in UTC."""
    return int(instant // DAY_S)


def weekly(days: Sequence[TrendDay], today: int) -> tuple[TrendDay, ...]:
    """Return the last day that is known of each week, the oldest first; weeks are counted back from `today`."""
    weeks: dict[int, TrendDay] = {}
    for each in sorted(days, key=lambda each: each.day):
        if each.day <= today:
            weeks[(today - each.day) // _DAYS_OF_WEEK] = each
    return tuple(weeks[week] for week in sorted(weeks, reverse=True))
