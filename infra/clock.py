"""The time of day, as a collaborator that is passed in.

Pure code takes `now` as an argument; shells that need the time take a `Clock`, so a test can decide what time it is.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Clock of Unix seconds; no reading is smaller than an earlier one of the same clock."""

    def now(self) -> float:
        """Return the time in seconds since 1970-01-01 UTC."""
        ...


class SystemClock:
    """The machine's clock, read once: later readings add monotonic time, so a step of the wall clock is not seen.

    The price is that a correction of the wall clock (NTP, an operator) reaches the process at its next start only.
    """

    __slots__ = ("_offset_s",)

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def now(self) -> float:
        """Return the time in seconds since 1970-01-01 UTC, never going back within this object's life."""
        return self._offset_s + time.monotonic()
