"""What it costs to see everything, in four parts; `--only` names one.

**trivial**: two farms build trivial derivations in turn. One is seen by everybody (traces exported to a receiver,
metrics scraped each second, a browser's stream of the farm's page, `drover watch` and a follower of a log), the other
by nobody. The client submits and leaves in both. What counts is the processor time of both farms' programs: the median
difference of pairs, each half as soon after the other as can be, with the interval that holds it at 95 %.

**pages**: every page of a farm with 100,000 steps, over HTTP: processor time of the coordinator, wall time, bytes.

**logs**: one builder prints as fast as it can, over agent, wire, file and live reader, while others ask and build.

**watchers**: 2,000 streams of events of one submission, and one that stops reading: time from a worker's report until
the last watcher has it.

The peers are the targets: 2 % of the cost, 300 ms and 1 MB, 190,000 lines a second, 1 s.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks import observability_loads as loads
from tests.benchmarks.observability_watchers import watchers
from tests.benchmarks.report import arguments, median_interval, publish

#: Targets: part of the cost, seconds and bytes of a page, lines a second, seconds to the last watcher.
COST, PAGE_S, PAGE_BYTES, LINES, LAST_S = 0.02, 0.3, 1_000_000, 190_000, 1.0


def _trivial(root: Path, options: Any) -> dict[str, object]:
    ways = options.ways.split(",")
    runs = loads.trivial(root, options.pairs, options.count, ways)
    publish(
        "observability trivial", ours=[run.seen_s for run in runs], peer=[run.unseen_s for run in runs],
        unit="processor s of the farm", bigger_is_better=False, as_json=False,
    )  # fmt: skip
    unseen_s = statistics.median(run.unseen_s for run in runs)
    low, middle, high = (each / unseen_s for each in median_interval([run.seen_s - run.unseen_s for run in runs]))
    return {
        "seen_by": ways,
        "cost": round(middle, 4),
        "cost_interval_95": [round(low, 4), round(high, 4)],
        "target": COST,
        "coordinator_ms_a_build": [
            round(1000 * statistics.median(each) / options.count, 2)
            for each in ([run.seen_coordinator_s for run in runs], [run.unseen_coordinator_s for run in runs])
        ],
        "farm_ms_a_build": [
            round(1000 * statistics.median(each) / options.count, 2)
            for each in ([run.seen_s for run in runs], [run.unseen_s for run in runs])
        ],
        "builds_a_second": [
            round(options.count / statistics.median(each), 1)
            for each in ([run.seen_wall_s for run in runs], [run.unseen_wall_s for run in runs])
        ],
    }


def _pages(root: Path, options: Any) -> dict[str, object]:
    pages, stalls = loads.pages(root, options.steps, options.runs)
    slowest, largest = max(pages, key=lambda page: page.processor_s), max(pages, key=lambda page: page.bytes)
    return {
        "slowest": [slowest.path, round(slowest.processor_s, 3), PAGE_S],
        "largest": [largest.path, largest.bytes, PAGE_BYTES],
        "slices_over_50_ms": stalls,
        "pages": {page.path: [round(page.processor_s, 3), round(page.wall_s, 3), page.bytes] for page in pages},
    }


def _logs(root: Path, options: Any) -> dict[str, object]:
    log = loads.logs(root, options.lines)
    return {**log, "target_lines_a_second": LINES}


def _watchers(root: Path, options: Any) -> dict[str, object]:
    return {**watchers(root, options.watchers, options.runs), "target_last_s": LAST_S}


PARTS: dict[str, Callable[[Path, Any], dict[str, object]]] = {
    "trivial": _trivial,
    "pages": _pages,
    "logs": _logs,
    "watchers": _watchers,
}


def main() -> None:
    parser = arguments(__doc__ or "", runs=3)
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--count", type=int, default=100, help="derivations in each half (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="of runs of `trivial` (default: %(default)s)")
    parser.add_argument("--ways", default=",".join(loads.WAYS), help="in which it is looked at (default: all)")
    parser.add_argument("--steps", type=int, default=100_000, help="steps of the farm of pages (default: %(default)s)")
    parser.add_argument("--lines", type=int, default=4_000_000, help="of the noisy log (default: %(default)s)")
    parser.add_argument("--watchers", type=int, default=2_000, help="streams of events (default: %(default)s)")
    options = parser.parse_args()
    found: dict[str, object] = {}
    for name in [options.only] if options.only else PARTS:
        with tempfile.TemporaryDirectory(prefix="drover-bench-") as directory:
            found[name] = PARTS[name](Path(directory), options)
            print(f"observability {name}: {json.dumps(found[name])}", flush=True)
    if options.json:
        print(json.dumps({"bench": "observability", "runs": options.runs, **found}), flush=True)


if __name__ == "__main__":
    main()
