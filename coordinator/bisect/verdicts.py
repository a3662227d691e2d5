"""Verdicts of a bisection: what became of a build, and whether that is what is searched for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from coordinator.bisect.search import Judgement

#: Failures of a build itself, by any limit too. The others are the farm's, or pass.
OWN_FAILURES: Final = frozenset(
    {
        *("permanent", "output_rejected", "hash_mismatch", "timeout", "silence", "log_limit", "output_size"),
        *("not_deterministic", "killed"),
    }
)
TIMEOUTS: Final = frozenset({"timeout", "silence"})
#: Likenesses of outputs that are equal, but for the hashes of store paths.
EQUAL: Final = frozenset({"same", "no-op"})
#: What the farm takes nothing of: a derivation, or a graph, that it never builds.
REFUSED: Final = "refused"


class Until(StrEnum):
    """Kinds of badness that a bisection looks for the beginning of."""

    FAILED = "failed"
    TIMED_OUT = "timed-out"
    DIFFERS = "differs"
    SLOWER = "slower"


class Origin(StrEnum):
    """Places that an outcome is known from."""

    BUILT = "built"
    #: The farm's cache had the outputs.
    CACHED = "cached"
    #: The farm knew that it fails.
    KNOWN = "known"


@dataclass(frozen=True, slots=True)
class Outcome:
    """End of a build, by the farm's word."""

    origin: Origin
    #: Keys of the step, and of the submission that asked.
    step: str
    submission: str = ""
    #: Why it failed; empty where it is built.
    failure_kind: str = ""
    failure: str = ""
    #: Name and key of the step whose own failure it is.
    failed_name: str = ""
    failed_step: str = ""
    #: Seconds of its builder, where they were measured.
    seconds: float | None = None
    #: Full store path of each output.
    outputs: Mapping[str, str] = field(default_factory=dict)
    #: Likeness of each output to that of good, as `LikenessName`, where it was asked for.
    likeness: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_built(self) -> bool:
        """Its outputs are there."""
        return not self.failure_kind

    @property
    def lasts(self) -> bool:
        """It would be the same another time: no fault of the farm is in it."""
        return self.is_built or self.failure_kind in OWN_FAILURES or self.failure_kind == REFUSED


@dataclass(frozen=True, slots=True)
class Criterion:
    """Badness that is searched for. `factor` is how much slower than good is bad."""

    until: Until
    factor: float = 1.5

    def judge(self, outcome: Outcome, good: Outcome | None) -> tuple[Judgement, str]:
        """Return what an outcome means, and why in a clause; `good` is that of the good commit, None for itself."""
        if not outcome.is_built:
            return self._judge_failure(outcome)
        match self.until:
            case Until.FAILED | Until.TIMED_OUT:
                return Judgement.GOOD, "it is built"
            case Until.DIFFERS:
                return _compare_contents(outcome, good)
            case Until.SLOWER:
                return self._compare_seconds(outcome, good)

    def _judge_failure(self, outcome: Outcome) -> tuple[Judgement, str]:
        why = f"{outcome.failed_name} failed: {outcome.failure}" if outcome.failed_name else outcome.failure
        if not outcome.lasts:
            return Judgement.UNTESTABLE, f"the farm could not build it: {why}"
        if outcome.failure_kind == REFUSED:
            return Judgement.UNTESTABLE, why
        if self.until is Until.FAILED:
            return Judgement.BAD, why
        if self.until is Until.TIMED_OUT and outcome.failure_kind in TIMEOUTS:
            return Judgement.BAD, why
        return Judgement.UNTESTABLE, why

    def _compare_seconds(self, outcome: Outcome, good: Outcome | None) -> tuple[Judgement, str]:
        if outcome.seconds is None:
            return Judgement.UNTESTABLE, "it is in the cache, and how long it took to build is not known"
        took = f"it took {outcome.seconds:.1f} s"
        if good is None or good.seconds is None:
            return Judgement.GOOD, took
        compared = f"{took}, good took {good.seconds:.1f} s"
        return (Judgement.BAD if outcome.seconds > self.factor * good.seconds else Judgement.GOOD), compared


def _compare_contents(outcome: Outcome, good: Outcome | None) -> tuple[Judgement, str]:
    if good is None:
        return Judgement.GOOD, "it is built"
    differing = sorted(name for name, likeness in outcome.likeness.items() if likeness == "different")
    if differing:
        return Judgement.BAD, f"output {', '.join(differing)} differs from that of good"
    for name, likeness in sorted(outcome.likeness.items()):
        if likeness not in EQUAL:
            return Judgement.UNTESTABLE, f"its output {name} cannot be compared: {likeness}"
    return Judgement.GOOD, "its outputs are those of good"
