"""Life of a process that runs one command: few collections, and an end without taking all modules apart.

A command makes some hundred thousand objects by its imports, all of which stay: the cycle collector looked at them 150
times (a tenth of a start). When it has ended, the interpreter would free them one by one (as much again), which the
system does at once. Commands that stay, as `drover up`, are as any Python program.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from typing import Final, NoReturn

#: Objects that are made before the collector looks for cycles among them; the interpreter's own is 700.
YOUNG_OBJECTS: Final = 50_000


class _Life:
    def __init__(self) -> None:
        self.thresholds = gc.get_threshold()
        self.is_short = False


_life: Final = _Life()


def begin() -> None:
    """Let the collector look rarely."""
    _life.is_short = True
    gc.set_threshold(YOUNG_OBJECTS)


def stay() -> None:
    """Be a process that runs for long: the command is one that stays."""
    if _life.is_short:
        _life.is_short = False
        gc.set_threshold(*_life.thresholds)


def end(status: int) -> NoReturn:
    """End the process. What was to happen at its end happens; a thread that is waited for ends first."""
    waited_for = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    if not _life.is_short or waited_for:
        sys.exit(status)
    atexit._run_exitfuncs()  # noqa: SLF001 - the interpreter's own end calls it too
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        # The interpreter's own end says what is wrong with an output.
        sys.exit(status)
    os._exit(status)
