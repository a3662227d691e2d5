"""Heap of the C library: a process that keeps it small gives back what it frees."""

from __future__ import annotations

import subprocess
import sys

#: Threads that allocate at one time, as SQLite's and the compressors' do: blocks below the size that lies by itself.
FILL_AND_FREE = """
import sys, threading
from pathlib import Path
from infra.heap import give_back_free_memory, keep_heap_small

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256

def fill_and_free():
    blocks = [bytearray(50_000) for _ in range(1_000)]
    filled.wait()
    # The last of them lies behind all others.
    kept.append(blocks[-1])

keep_heap_small()
kept, before, filled = [], resident_mb(), threading.Barrier(4)
threads = [threading.Thread(target=fill_and_free) for _ in range(4)]
for each in threads:
    each.start()
for each in threads:
    each.join()
give_back_free_memory()
print(resident_mb() - before)
"""


def test_what_threads_have_freed_is_given_back_although_blocks_behind_it_are_in_use() -> None:
    grown = subprocess.run([sys.executable, "-c", FILL_AND_FREE], capture_output=True, text=True, check=True)
    # Of 200 MB that were in use at one time.
    assert int(grown.stdout) < 20
