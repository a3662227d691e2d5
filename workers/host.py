"""Facts about the machine that the farm shows to people; nothing is decided by them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostFacts:
    """A reading of the machine. Sizes are bytes; 0 is unknown."""

    cores: int
    memory_bytes: int
    #: Free room where the worker's store and spool lie.
    disk_free_bytes: int
    #: Average number of runnable processes of the last minute.
    load: float


def read_host(place: Path) -> HostFacts:
    """Read the facts now; `place` lies on the file system whose free room counts."""
    try:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        memory_bytes = 0
    try:
        disk_free_bytes = shutil.disk_usage(place).free
    except OSError:
        disk_free_bytes = 0
    return HostFacts(
        cores=os.cpu_count() or 1,
        memory_bytes=max(0, memory_bytes),
        disk_free_bytes=disk_free_bytes,
        load=os.getloadavg()[0],
    )
