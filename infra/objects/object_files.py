"""Files of a local object store, written under a passing name and then named; directories are made when they lack."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

#: Data up to this size is handled without a change of threads, which would cost more than the work (about 0.2 ms).
INLINE_BYTES: Final = 64 * 1024


def put_file(staged: str, final: str, data: bytes) -> None:
    """Write a file as a whole, replacing what was there. Raises `OSError`; nothing is left then.

    Hot: a push of small paths writes thousands, and a `Path` takes as long as the file.
    """
    try:
        descriptor = create(staged)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)
        rename(staged, final)
    except BaseException:
        with suppress(OSError):
            os.unlink(staged)  # noqa: PTH108 - no path object: see above
        raise


def create(path: Path | str) -> int:
    """Return the descriptor of a new file, which the caller closes. Raises `OSError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o644)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes. Raises `OSError`."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def rename(source: Path | str, target: Path | str) -> None:
    """Name a file, replacing what was there. Raises `OSError`."""
    try:
        os.replace(source, target)  # noqa: PTH105 - as in `put_file`
    except FileNotFoundError:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)  # noqa: PTH105 - as in `put_file`
