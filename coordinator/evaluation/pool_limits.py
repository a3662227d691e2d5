"""Share of a machine that an evaluation may take, and the program that evaluates where it is there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from infra.records import record

#: It is used if it is on PATH.
PROGRAM: Final = "nix-eval-jobs"
#: Seconds that one attribute may take.
TIMEOUT_S: Final = 1800.0
#: Most evaluators that are chosen by themselves, and the memory that one is thought to want at least.
MAX_EVALUATORS: Final = 8
EVALUATOR_BYTES: Final = 512 * 1024 * 1024
#: Part of the machine's free memory that an evaluation takes where no limit is given.
MEMORY_PART: Final = 0.6
DEFAULT_MEMORY_BYTES: Final = 4 * 1024 * 1024 * 1024


@record(frozen=True, slots=True)
class PoolLimits:
    """Share of a machine that an evaluation may take."""

    #: Evaluators side by side.
    evaluators: int
    #: Bytes of memory of all evaluators together.
    memory_bytes: int
    #: Seconds of one attribute; None: forever.
    timeout_s: float | None = TIMEOUT_S

    @classmethod
    def of_machine(
        cls, evaluators: int | None = None, memory_bytes: int | None = None, timeout_s: float | None = TIMEOUT_S
    ) -> PoolLimits:
        """Return limits; what is None comes from what this machine has."""
        memory = memory_bytes or int(_free_bytes() * MEMORY_PART)
        side_by_side = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
                           MAX_EVALUATORS, max(1, memory // EVALUATOR_BYTES))  # fmt: skip
        return cls(evaluators or side_by_side, memory, timeout_s)


def _free_bytes() -> int:
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return int(DEFAULT_MEMORY_BYTES / MEMORY_PART)
