"""Turns of Python's threads: for how long one that computes keeps the others, the event loop among them, from running.

A thread that wants to run waits until the one that runs gives way, 5 ms by default. The event loop waits so whenever it
has waited for a socket, several times for one request: where a thread verifies a mass rebuild, an answer that costs 2
ms came after 20.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Seconds for which a thread runs on while another one waits. A switch costs some 10 us.
SWITCH_S: Final = 0.0005


class _Switching:
    """Blocks that want threads to give way soon, and what was so before the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before_s = 0.0

    def begin(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._before_s = sys.getswitchinterval()
                sys.setswitchinterval(SWITCH_S)
            self._blocks += 1

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                sys.setswitchinterval(self._before_s)


_SWITCHING: Final = _Switching()


@contextmanager
def switching_often() -> Iterator[None]:
    """Have threads give way after `SWITCH_S` for as long as a block runs, in whatever order several of them end."""
    _SWITCHING.begin()
    try:
        yield
    finally:
        _SWITCHING.end()
