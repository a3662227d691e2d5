"""Exclusive `flock` on STATE_DIR/lock; the kernel releases it when the process exits."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from coordinator.errors import CoordinatorError


class StateDirError(CoordinatorError):
    """The state directory cannot be used."""

    code: ClassVar[str] = "state_dir"


class StateDirBusyError(StateDirError):
    """Another coordinator owns the state directory."""

    code: ClassVar[str] = "state_dir_busy"


class StateLock:
    """An exclusive lock on `STATE_DIR/lock`, which names its holder."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "lock"
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Take the lock. Raises `StateDirBusyError` that names the holder's process id."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateDirError(f"cannot use the state directory {self._path.parent}: {error.strerror}.") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise StateDirBusyError(
                f"{self._path.parent} is in use by another drover (process {holder}); "
                "stop that one or choose another --state-dir."
            ) from None
        try:
            # In this order: a disk that is full lets a file be overwritten.
            written = os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
            os.ftruncate(descriptor, written)
        except OSError as error:
            os.close(descriptor)
            raise StateDirError(f"cannot use the state directory {self._path.parent}: {error.strerror}.") from None
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back. The file stays: removing it would let two holders lock two files of one name."""
        os.close(self._descriptor)
