"""Readings of a machine's load, pressure, memory and disks, for the farm's metrics and pages.

A figure that the machine does not give is None, never 0: macOS has no pressure stall information.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from workers.wire.messages import Vitals

_PROC: Final = Path("/proc")


def read_vitals(free_bytes: Iterable[int], proc: Path = _PROC) -> Vitals:
    """Read the machine's figures. `free_bytes`: room of each disk that builds use. Raises nothing."""
    return Vitals(
        load=_load(),
        cpu_pressure=_pressure(proc / "pressure" / "cpu"),
        memory_pressure=_pressure(proc / "pressure" / "memory"),
        io_pressure=_pressure(proc / "pressure" / "io"),
        memory_available_bytes=_available(proc / "meminfo"),
        disk_free_bytes=min(free_bytes, default=None),
    )


def _load() -> float | None:
    with suppress(OSError):
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    return None


def _pressure(file: Path) -> float | None:
    """Read `some avg10=1.23 avg60=… avg300=… total=…` (Documentation/accounting/psi.rst of Linux) as a part of 1."""
    with suppress(OSError, ValueError, IndexError):
        fields = file.read_text().split("\n", 1)[0].split()
        name, _, percent = fields[1].partition("=")
        if fields[0] == "some" and name == "avg10":
            return float(percent) / 100
    return None


def _available(file: Path) -> int | None:
    """Read `MemAvailable:   123456 kB` (proc_meminfo(5)) in bytes."""
    with suppress(OSError, ValueError, IndexError):
        for line in file.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
