"""Watchdog of the event loop: measures how long callbacks hold it, counts the stalls, logs the stack of each kind once.

A tick runs in the loop every TICK_S. The processor time that the loop's thread spent between two ticks is the *slice*:
what the tick, and so every other task, had to wait for because of our own code. Processor time and not wall time,
because on a busy machine the wall clock also counts what other programs took. A callback that sleeps or waits for a
disk is therefore not seen; neither is time in other threads of this process.

A thread looks at the loop's thread from outside while a slice lasts, because afterwards the stack is gone.

How tests use it: in one process `with LoopWatch() as watch: …` inside a running loop, then `watch.longest_s`; over HTTP
`tests.support.loop.LoopStalls`, which compares the histogram `drover_loop_stall_seconds` before and after.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final, Self

#: Seconds between two ticks: 100 wake-ups a second of some microseconds each.
TICK_S: Final = 0.01
#: Slices below this are no stall and are not recorded.
RECORDED_S: Final = 0.025
#: The house's bound on one slice; what is longer is counted and logged.
STALL_S: Final = 0.05
#: Places whose stalls were logged; further places are counted only.
MAX_KINDS: Final = 64
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
        self._timer: asyncio.TimerHandle | None = None
        self._ended = threading.Event()
        self._observer: threading.Thread | None = None
        self._kinds: set[str] = set()

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._tick_cpu_s = time.thread_time()
        self._timer = self._loop.call_later(TICK_S, self._tick)
        if hasattr(time, "pthread_getcpuclockid"):
            # Not on macOS: stalls are then counted without their stack.
            ident = threading.get_ident()
            clock = time.pthread_getcpuclockid(ident)
            self._observer = threading.Thread(target=self._observe, args=(ident, clock), name="loop-watch", daemon=True)
            self._observer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # The last slice may be under way.
        self._account()
        self._ended.set()
        if self._observer is not None:
            self._observer.join()

    def _tick(self) -> None:
        self._account()
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def _account(self) -> None:
        now_s = time.thread_time()
        slice_s = now_s - self._tick_cpu_s
        self._tick_cpu_s = now_s
        self.longest_s = max(self.longest_s, slice_s)
        if slice_s >= STALL_S:
            self.stalls += 1
        if slice_s >= RECORDED_S:
            self.on_slice(slice_s)

    def _observe(self, ident: int, clock: int) -> None:
        """Log who holds the loop, once for each place; runs in a thread of its own."""
        seen_s = -1.0
        while not self._ended.wait(STALL_S / 2):
            began_s = self._tick_cpu_s
            held_s = time.clock_gettime(clock) - began_s
            if held_s < STALL_S or began_s == seen_s:
                continue
            seen_s = began_s
            frame = sys._current_frames().get(ident)  # noqa: SLF001 - documented, the only way to another stack
            if frame is not None:
                self._tell(frame, held_s)

    def _tell(self, frame: FrameType, held_s: float) -> None:
        stack = traceback.extract_stack(frame)
        own = [each for each in stack if each.filename.startswith(_OWN) and each.filename != __file__]
        where = own[-1] if own else stack[-1]
        kind = f"{where.filename.removeprefix(_OWN)}:{where.name}"
        if kind in self._kinds or len(self._kinds) >= MAX_KINDS:
            return
        self._kinds.add(kind)
        text = "".join(traceback.format_list(stack[-LOGGED_FRAMES:]))
        _log.warning("the event loop is held for over %.0f ms in %s:\n%s", held_s * 1000, kind, text)
