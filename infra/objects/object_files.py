"""Files of a local object store, written under a passing name and then named; directories are made when they lack."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

#: Data up to this size is handled without a change of threads, which would cost more than the work (about 0.2 ms).
INLINE_BYTES: Final = 64 * 1024


def put_file(staged: Path, final: Path, data: bytes) -> None:
    """Write a file as a whole, replacing what was there. Raises `OSError`; nothing is left then."""
    try:
        descriptor = create(staged)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)
        rename(staged, final)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise


def create(path: Path) -> int:
    """Return the descriptor of a new file, which the caller closes. Raises `OSError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o644)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes. Raises `OSError`."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def rename(source: Path, target: Path) -> None:
    """Name a file, replacing what was there. Raises `OSError`."""
    try:
        source.replace(target)
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
