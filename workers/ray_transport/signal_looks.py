"""Pauses between Ray's looks for signals in the process of an actor, for as long as no call comes through Ray.

Ray looks 100 times a second, without a setting, in the thread that hands out its calls; that was two thirds of what a
node takes at rest. With pauses a call through Ray waits for at most `PAUSE_S` more, where none came for `QUIET_S`.
Calls over a line (`line`) pass other threads, and signals that Python handles are handled at once. A Ray that looks in
another way goes on as it is.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

#: Longest pause between two looks, seconds.
PAUSE_S: Final = 0.25
#: Seconds without a call through Ray after which looks have pauses. Longer than a poll, which may take this way.
QUIET_S: Final = 20.0


class SignalLooks:
    """Ray's looks for signals in this process. Calls are counted by one thread, looks are made by the main thread."""

    def __init__(self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._now = now
        self._sleep = sleep
        self._calls = 0
        self._last_at = now()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count a call through Ray, from its arrival to its answer."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._last_at = self._now()

    def look(self) -> bool:
        """Stand for `sys.is_finalizing`, which Ray asks at each of its looks."""
        finalizing = sys.is_finalizing()
        if (
            not (finalizing or self._calls)
            and threading.current_thread() is threading.main_thread()
            and self._now() - self._last_at > QUIET_S
        ):
            self._sleep(PAUSE_S)
        return finalizing

    def take_over(self, raylet: Any) -> None:
        """Have Ray's module for its workers look through this."""
        if getattr(raylet, "sys", None) is sys:
            raylet.sys = _Sys(self.look)


class _Sys:
    """The module `sys` but for one function."""

    def __init__(self, is_finalizing: Callable[[], bool]) -> None:
        self.is_finalizing = is_finalizing

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)
