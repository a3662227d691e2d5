"""Turns of Python's threads: for how long one that computes keeps the others, the event loop among them, from running.

A thread that wants to run waits until the one that runs gives way, 5 ms by default. The event loop waits so whenever it
has waited for a socket, several times for one request: where a thread verifies a mass rebuild, an answer that costs 2
ms came after 20.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Seconds for which a thread runs on while another one waits. A switch costs some 10 us.
SWITCH_S: Final = 0.0005


@contextmanager
def switching_often() -> Iterator[None]:
    """Have threads give way after `SWITCH_S` for as long as the block runs."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)
