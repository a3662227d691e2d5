"""The life of the coordinator's process: which error it ends with, and what signals ask of it."""

from __future__ import annotations

import signal

from coordinator.errors import CoordinatorError, StoppedError, UnavailableError
from coordinator.journal.errors import JournalError
from coordinator.run import first_cause
from coordinator.stop_signals import StopSignals
from infra.objects.errors import ObjectStoreError


def group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("parts failed", errors)


def test_the_error_shown_is_that_of_the_part_that_failed_and_not_of_those_that_lost_the_engine() -> None:
    full = JournalError("the disk is full.")
    lost = UnavailableError("the engine has stopped.")
    assert first_cause(group(lost, group(full, lost), OSError("unrelated"))) is full
    assert first_cause(group(full, lost)) is full


def test_an_error_of_a_lower_layer_is_shown_as_the_reason_for_the_stop() -> None:
    found = first_cause(group(OSError("unrelated"), group(ObjectStoreError("the bucket is gone"))))
    assert isinstance(found, StoppedError)
    assert "the bucket is gone" in str(found)


def test_an_error_of_the_program_is_shown_as_it_is() -> None:
    fault = KeyError("no such step")
    assert first_cause(group(group(fault))) is fault
    assert not isinstance(fault, CoordinatorError)


async def test_the_first_signal_asks_for_a_stop_and_the_second_for_one_at_once() -> None:
    signals = StopSignals.install()
    signal.raise_signal(signal.SIGTERM)
    await signals.stop.wait()
    assert not signals.at_once.is_set()
    signal.raise_signal(signal.SIGINT)
    await signals.at_once.wait()
