"""Watchdog of the event loop: measures how long callbacks hold it, counts the stalls, logs the stack of each kind once.

A tick runs in the loop every TICK_S. The processor time that the loop's thread spent between two ticks is the *slice*:
what the tick, and so every other task, had to wait for because of our own code. Processor time and not wall time,
because on a busy machine the wall clock also counts what other programs took. A callback that sleeps or waits for a
disk is therefore not seen; neither is time in other threads of this process.

A thread looks at the loop's thread from outside while a slice lasts, because afterwards the stack is gone. It sleeps by
the clock of what the loop's thread spends, so a loop at rest leaves it asleep. The ticks rest too: the thread calls for
them once WAKE_S were spent without one. On systems without such a clock they never rest, and stalls are counted without
their stack.

How tests use it: in one process `with LoopWatch() as watch: …` inside a running loop, then `watch.longest_s`; over HTTP
`tests.support.loop.LoopStalls`, which compares the histogram `drover_loop_stall_seconds` before and after.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

#: Seconds between two ticks, and after how many of them that found next to nothing spent they rest.
TICK_S: Final = 0.01
QUIET_S: Final = 0.001
QUIET_TICKS: Final = 5
#: Processor time between two looks from outside. A slice that begins at rest counts as longer by at most this.
WAKE_S: Final = 0.01
#: Slices below this are no stall and are not recorded.
RECORDED_S: Final = 0.025
#: The house's bound on one slice; what is longer is counted and logged.
STALL_S: Final = 0.05
#: Places whose stalls were logged; further places are counted only.
MAX_KINDS: Final = 64
#: The flag of clock_nanosleep(2) for a time instead of a duration (time.h).
TIMER_ABSTIME: Final = 1
#: Frames of a stack in the log, the innermost ones.
LOGGED_FRAMES: Final = 12

_OWN: Final = str(Path(__file__).resolve().parent.parent)
_log = logging.getLogger(__name__)


class LoopWatch:
    """Watches the running loop for as long as the block does."""

    def __init__(self) -> None:
        #: Called with each slice over RECORDED_S, in seconds.
        self.on_slice: Callable[[float], object] = lambda _: None
        #: Slices over STALL_S, and the longest slice in seconds.
        self.stalls = 0
        self.longest_s = 0.0
        self._tick_cpu_s = 0.0
        self._quiet_ticks = 0
        self._timer: asyncio.TimerHandle | None = None
        #: No tick is under way; the observer calls for the next one.
        self._resting = False
        self._is_observed = False
        self._ended = False
        self._kinds: set[str] = set()

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._tick_cpu_s = time.thread_time()
        self._timer = self._loop.call_later(TICK_S, self._tick)
        spend_sleep = _spend_sleep()
        if spend_sleep is not None:
            self._is_observed = True
            ident = threading.get_ident()
            clock = time.pthread_getcpuclockid(ident)
            watch = threading.Thread(
                target=self._observe, args=(ident, clock, spend_sleep), name="loop-watch", daemon=True
            )
            watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        # The observer sees this once our thread has spent some more; nothing waits for it.
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        # The last slice may be under way.
        self._account()

    def _tick(self) -> None:
        if self._ended:
            return
        quiet = self._account() < QUIET_S
        self._quiet_ticks = self._quiet_ticks + 1 if quiet else 0
        if self._is_observed and self._quiet_ticks >= QUIET_TICKS:
            self._timer, self._resting = None, True
        else:
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def _account(self) -> float:
        now_s = time.thread_time()
        slice_s = now_s - self._tick_cpu_s
        self._tick_cpu_s = now_s
        self.longest_s = max(self.longest_s, slice_s)
        if slice_s >= STALL_S:
            self.stalls += 1
        if slice_s >= RECORDED_S:
            self.on_slice(slice_s)
        return slice_s

    def _observe(self, ident: int, clock: int, spend_sleep: Callable[[int, float], bool]) -> None:
        """Call for ticks, and log who holds the loop, once for each place; runs in a thread of its own."""
        seen_s = -1.0
        # A thread or a loop that is no more ends this too.
        with suppress(OSError, RuntimeError):
            while spend_sleep(clock, time.clock_gettime(clock) + WAKE_S) and not self._ended:
                if self._resting:
                    self._resting, self._quiet_ticks = False, 0
                    self._loop.call_soon_threadsafe(self._tick)
                began_s = self._tick_cpu_s
                held_s = time.clock_gettime(clock) - began_s
                if held_s < STALL_S or began_s == seen_s:
                    continue
                seen_s = began_s
                self._tell(ident, held_s)

    def _tell(self, ident: int, held_s: float) -> None:
        # Known here alone: the frame keeps all that its callers know, until this thread looks at another one.
        frame = sys._current_frames().get(ident)  # noqa: SLF001 - documented, the only way to another stack
        if frame is None:
            return
        stack = traceback.extract_stack(frame)
        own = [each for each in stack if each.filename.startswith(_OWN) and each.filename != __file__]
        where = own[-1] if own else stack[-1]
        kind = f"{where.filename.removeprefix(_OWN)}:{where.name}"
        if kind in self._kinds or len(self._kinds) >= MAX_KINDS:
            return
        self._kinds.add(kind)
        text = "".join(traceback.format_list(stack[-LOGGED_FRAMES:]))
        _log.warning("the event loop is held for over %.0f ms in %s:\n%s", held_s * 1000, kind, text)


class _TimeSpec(ctypes.Structure):
    """`struct timespec`."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _spend_sleep() -> Callable[[int, float], bool] | None:
    """Return what sleeps until a clock, of another thread's processor time, has reached some seconds; None without it.

    It returns whether the time was reached (clock_nanosleep(2)). Python has no such call.
    """
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "clock_nanosleep", None)
    if call is None:
        return None

    def sleep(clock: int, until_s: float) -> bool:
        seconds = int(until_s)
        until = _TimeSpec(seconds, int((until_s - seconds) * 1e9))
        while (failed := call(clock, TIMER_ABSTIME, ctypes.byref(until), None)) == errno.EINTR:
            pass
        return bool(failed == 0)

    return sleep
