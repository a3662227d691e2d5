"""Disks of a few megabytes, to be filled."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(place: Path, mib: int) -> Iterator[Path]:
    """Mount a file system of so many MiB at a directory, which is made; needs root, as the sandbox does."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0755", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        # Lazily: a process of the test that still ends must not fail the test.
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(file: Path, leave_mib: int = 0) -> None:
    """Write a file until so much is left on its disk."""
    with file.open("wb") as out:
        # A page: nothing else shall fit in either.
        block = b"\0" * 4096
        try:
            while _free(file) - len(block) >= leave_mib << 20:
                out.write(block)
                out.flush()
        except OSError:
            pass


def _free(file: Path) -> int:
    from os import statvfs  # noqa: PLC0415 - one use

    told = statvfs(file)
    return told.f_bavail * told.f_frsize
