"""Heap of the C library, which keeps what is freed: for threads of their own, and between what is still in use.

After a submission of 100,000 steps a quarter of the coordinator's memory was such. Python's small objects lie
elsewhere; here are its large ones, and all of SQLite's, Ray's and the compressors'. Where the C library is not GNU's
nothing here does anything.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, Final

#: Parameters of mallopt(3) (malloc.h).
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8

#: Heaps that threads share. Each that has one of its own keeps the most that it ever needed.
ARENAS: Final = 2
#: Free bytes at the end of a heap that are kept.
KEPT_BYTES: Final = 1024 * 1024
#: Blocks from here on lie by themselves and are given back when they are freed. Larger than what is copied piece by
#: piece, because each costs its pages anew.
LARGE_BYTES: Final = 2 * 1024 * 1024


def keep_heap_small() -> None:
    """Set how much the heap keeps; the C library would raise these bounds by itself. For the start of a process."""
    if set_option := _function("mallopt"):
        for option, value in ((_ARENA_MAX, ARENAS), (_TRIM_THRESHOLD, KEPT_BYTES), (_MMAP_THRESHOLD, LARGE_BYTES)):
            set_option(option, value)


def give_back_free_memory() -> None:
    """Give the system what the heap keeps. Takes some milliseconds for each 100 MB, so it is for a thread."""
    if trim := _function("malloc_trim"):
        trim(ctypes.c_size_t(0))


def _function(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
