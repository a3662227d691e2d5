"""Report of a benchmark: progress on standard error, one JSON object as the last line of standard output."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

#: What `files_are_on` says of a file system that makes figures of builds worthless.
NO_JOURNAL = "ext4 without a journal"


def arguments(description: str, runs: int) -> argparse.ArgumentParser:
    """Return the options all benchmarks share; SIGTERM ends this process in order, and so its farm."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    parser.add_argument(
        "--runs", type=int, default=runs, help="how often both sides are measured (default: %(default)s)"
    )
    return parser


def machine() -> dict[str, object]:
    """Facts about the machine without which the figures say little."""
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "files": files_are_on(Path(tempfile.gettempdir())),
    }


def files_are_on(directory: Path) -> str:
    """Return the type of a directory's file system, and of ext4 whether it has a journal; empty where it is not known.

    Without a journal, ext4 looks at each inode that was deleted in the last minute before it gives a new one
    (`recently_deleted` in fs/ext4/ialloc.c). Each build makes and deletes some thirty, so Nix takes three times as long
    for a build, by what ran in the minute before: ratios say little there.
    """
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return ""
    device = directory.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for words in mounts:
        if words[2] == number:
            kind, source = words[words.index("-") + 1 :][:2]
            journals = Path("/proc/fs/jbd2").glob(f"{Path(source).resolve().name}-*")
            return NO_JOURNAL if kind == "ext4" and not any(journals) else kind
    return ""


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def publish(
    bench: str,
    *,
    ours: Sequence[float],
    peer: Sequence[float],
    unit: str,
    bigger_is_better: bool,
    as_json: bool,
    **extra: object,
) -> None:
    """Print medians, the ratio (ours over peer, bigger is better) and the spread of the per-run ratios.

    A `peer` that is one figure for all runs is a target and not measured: `tests.benchmarks.check` leaves it out.
    """
    pairs = list(zip(ours, peer, strict=True))
    ratios = [a / b if bigger_is_better else b / a for a, b in pairs]
    row = {
        "bench": bench,
        "ours": round(statistics.median(ours), 3),
        "peer": round(statistics.median(peer), 3),
        "ratio": round(statistics.median(ratios), 3),
        "unit": unit,
        "runs": len(pairs),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        # Four digits that count, whatever the size.
        "ratios": [float(f"{ratio:.4g}") for ratio in ratios] if len({*peer}) > 1 or len(pairs) == 1 else [],
        **extra,
    }
    if files_are_on(Path(tempfile.gettempdir())) == NO_JOURNAL:
        progress(f"files are on {NO_JOURNAL}, which is slow where files were deleted: set TMPDIR to another directory")
    if as_json:
        print(json.dumps(row), flush=True)
    else:
        print(
            f"{bench}: ours {row['ours']} {unit}, peer {row['peer']} {unit}, "
            f"ratio {row['ratio']} (runs {row['runs']}, spread {row['spread']})"
        )


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the median between the ends of its interval: those order statistics that hold it so often.

    It takes no shape of the distribution for granted; with fewer than six values it is their whole range.
    """
    ordered, count = sorted(values), len(values)
    outside = 0.0
    rank = 0
    while rank < count // 2:
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 1 - confidence:
            break
        rank += 1
    rank = max(rank - 1, 0)
    return ordered[rank], statistics.median(ordered), ordered[-1 - rank]
