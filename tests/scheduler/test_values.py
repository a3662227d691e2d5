"""Quick values are what a frozen dataclass is, but for the checks against assignment."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, fields, replace

import pytest

from scheduler.facts import StepLeased
from scheduler.model import BuilderId, Instant, LeaseId, StepKey
from scheduler.values import quick


@dataclass(frozen=True, slots=True, order=True)
class _Plain:
    step: str
    attempt: int = 1


@quick
@dataclass(frozen=True, slots=True, order=True)
class _Quick:
    step: str
    attempt: int = 1


def test_a_quick_value_is_made_compared_hashed_copied_and_printed_as_a_plain_one() -> None:
    assert _Quick("a") == _Quick("a", 1) != _Quick("a", attempt=2)
    assert sorted([_Quick("b"), _Quick("a", 2), _Quick("a")]) == [_Quick("a"), _Quick("a", 2), _Quick("b")]
    assert hash(_Quick("a", 2)) == hash(_Plain("a", 2))
    assert replace(_Quick("a"), attempt=3) == _Quick("a", 3)
    assert repr(_Quick("a")) == repr(_Plain("a")).replace("_Plain", "_Quick")
    assert [each.name for each in fields(_Quick)] == ["step", "attempt"]
    assert not hasattr(_Quick("a"), "__dict__")
    leased = StepLeased(LeaseId(StepKey("a"), 1), BuilderId("b"), 0, Instant(1.0))
    assert pickle.loads(pickle.dumps(leased)) == leased  # noqa: S301  made here
    with pytest.raises(TypeError):
        _Quick()  # type: ignore[call-arg]


def test_a_factory_is_refused() -> None:
    @dataclass(frozen=True)
    class Listed:
        names: list[str] = field(default_factory=list)

    with pytest.raises(TypeError, match=r"Listed\.names has a factory"):
        quick(Listed)
