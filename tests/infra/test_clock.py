"""The clock of the process."""

import time

import pytest

from infra.clock import SystemClock


def test_the_system_clock_reads_unix_seconds_and_does_not_follow_the_wall_clock_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SystemClock()
    first = clock.now()
    assert abs(first - time.time()) < 60
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert clock.now() >= first
