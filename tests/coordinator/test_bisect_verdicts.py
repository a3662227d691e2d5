"""Meanings of builds for a bisection."""

from __future__ import annotations

import pytest

from coordinator.bisect.search import Judgement
from coordinator.bisect.verdicts import Criterion, Origin, Outcome, Until
from scheduler.model import FailureKind


def built(seconds: float | None = None, **likeness: str) -> Outcome:
    return Outcome(Origin.BUILT, "step", seconds=seconds, likeness=likeness)


def failed(kind: str) -> Outcome:
    return Outcome(Origin.BUILT, "step", "", kind, "it said no", "zlib-1.0", "other")


def answer(until: Until, outcome: Outcome, good: Outcome | None = None, factor: float = 1.5) -> Judgement:
    return Criterion(until, factor).judge(outcome, good)[0]


#: Failures that are the build's own, of which a bisection that looks for failures takes each for bad.
OWN = {"permanent", "output_rejected", "hash_mismatch", "timeout", "silence", "log_limit", "output_size", "killed"}


@pytest.mark.parametrize("kind", [each.value for each in FailureKind])
def test_only_a_build_s_own_failure_is_bad_and_only_a_timeout_where_that_is_looked_for(kind: str) -> None:
    own = kind in OWN | {"not_deterministic"}
    assert answer(Until.FAILED, failed(kind)) is (Judgement.BAD if own else Judgement.UNTESTABLE)
    timed_out = kind in {"timeout", "silence"}
    assert answer(Until.TIMED_OUT, failed(kind)) is (Judgement.BAD if timed_out else Judgement.UNTESTABLE)
    assert answer(Until.DIFFERS, failed(kind), built()) is Judgement.UNTESTABLE
    assert answer(Until.SLOWER, failed(kind), built(3.0)) is Judgement.UNTESTABLE
    assert failed(kind).lasts == own


def test_a_failure_is_told_with_the_step_whose_it_is() -> None:
    assert Criterion(Until.FAILED).judge(failed("permanent"), None)[1] == "zlib-1.0 failed: it said no"
    why = Criterion(Until.FAILED).judge(failed("disk_low"), None)[1]
    assert why == "the farm could not build it: zlib-1.0 failed: it said no"


def test_outputs_are_compared_one_by_one() -> None:
    good = built()
    assert answer(Until.DIFFERS, built(out="same", dev="no-op"), good) is Judgement.GOOD
    assert answer(Until.DIFFERS, built(out="too large", dev="different"), good) is Judgement.BAD
    assert answer(Until.DIFFERS, built(out="absent", dev="same"), good) is Judgement.UNTESTABLE
    why = Criterion(Until.DIFFERS).judge(built(out="different", dev="same"), good)[1]
    assert why == "output out differs from that of good"


def test_slower_is_more_than_the_factor_and_what_was_not_measured_says_nothing() -> None:
    good = built(2.0)
    assert answer(Until.SLOWER, built(3.0), good) is Judgement.GOOD
    assert answer(Until.SLOWER, built(3.1), good) is Judgement.BAD
    assert answer(Until.SLOWER, built(3.1), good, factor=2.0) is Judgement.GOOD
    assert answer(Until.SLOWER, built(), good) is Judgement.UNTESTABLE
    # Good itself has nothing to be compared with, but must have been measured.
    assert answer(Until.SLOWER, built(9.0)) is Judgement.GOOD
    assert answer(Until.SLOWER, built()) is Judgement.UNTESTABLE
