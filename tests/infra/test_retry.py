"""Retries: how long, how far apart, and what people see of an outage."""

from __future__ import annotations

import logging

import pytest

from infra.retry import SPREAD, Backoff, Outage, retrying

log = logging.getLogger(__name__)


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.left = failures
        self.error = error
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


def outage() -> Outage:
    return Outage(log, "what needs it waits", "it is back")


def test_pauses_double_up_to_the_longest_and_are_spread() -> None:
    many = [Backoff(1.0, 4.0) for _ in range(50)]
    for whole in (1.0, 2.0, 4.0, 4.0):
        pauses = [each.next_s() for each in many]
        assert all(whole * (1 - SPREAD) <= pause <= whole for pause in pauses)
        assert len(set(pauses)) > 1
    many[0].reset()
    assert many[0].next_s() <= 1.0


async def test_a_failure_that_may_pass_is_tried_again_and_its_outage_is_logged_once_and_so_is_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    call, away = Flaky(2, OSError("no route")), outage()
    shown: list[str] = []

    def trouble_of(error: Exception) -> str:
        shown.append(away.trouble)
        return f"it is away ({error})"

    assert await retrying(call, 60, away, trouble_of) == "answer"
    assert call.calls == 3
    assert shown == ["", "it is away (no route)"]
    assert not away.trouble
    assert [record.message for record in caplog.records] == [
        "it is away (no route); what needs it waits",
        "it is back",
    ]


async def test_a_failure_that_does_not_pass_is_raised_at_once_and_is_no_outage(
    caplog: pytest.LogCaptureFixture,
) -> None:
    call, away = Flaky(1, ValueError("wrong")), outage()
    with pytest.raises(ValueError, match="wrong"):
        await retrying(call, 60, away, lambda error: str(error) * isinstance(error, OSError))
    assert (call.calls, away.trouble, caplog.records) == (1, "", [])


async def test_the_last_failure_is_raised_after_the_time_and_the_outage_goes_on() -> None:
    call, away = Flaky(100, OSError("no route")), outage()
    with pytest.raises(OSError, match="no route"):
        await retrying(call, 0, away, str)
    assert call.calls == 1
    assert away.trouble == "no route"
