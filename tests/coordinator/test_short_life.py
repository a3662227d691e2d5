"""The end of a process that runs one command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.patience import PATIENCE_S

BEGIN = "import atexit, gc, sys, threading, time\nfrom coordinator.cli import short_life\nshort_life.begin()\n"


def ended(program: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("stays", ["", "short_life.stay()\n"])
def test_what_was_printed_and_what_was_to_happen_at_the_end_is_not_lost(stays: str) -> None:
    program = stays + "atexit.register(print, 'last')\nprint('first')\nsys.stderr.write('said')\nshort_life.end(3)"
    assert ended(program) == (3, "first\nlast\n", "said")


def test_a_thread_that_is_waited_for_ends_first() -> None:
    program = "threading.Timer(0.1, print, ['late']).start()\nshort_life.end(0)"
    assert ended(program) == (0, "late\n", "")


def test_a_command_that_stays_has_the_collector_of_any_program() -> None:
    program = "short_life.stay()\nprint(gc.get_threshold()[0] < short_life.YOUNG_OBJECTS)\nshort_life.end(0)"
    assert ended(program) == (0, "True\n", "")
