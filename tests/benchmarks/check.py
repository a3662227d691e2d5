"""`./run bench --check [NAME…]`: ratios of now beside those that are committed in `ratios.json`.

Each benchmark runs as many times as was recorded, `--runs` at least. A row is worse where each of its ratios is below
each that was recorded: the ratios of a row that did not change fall so with a chance of 1 over the ways to choose the
recorded ones out of all, so the noise is that of these very runs, and no width is taken for granted. Rows with too few
runs to tell at FALSE_ALARM are named and judge nothing. The status is 1 where a row is worse.

`--record` writes what is measured instead. It is for people and nights, not for `./run test`: it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from tests.benchmarks.report import progress

#: Committed: benchmark -> row -> per-run ratios, ours over the peer's, bigger is better.
RATIOS: Final = Path(__file__).with_name("ratios.json")
#: Chance that a row which did not change is called worse.
FALSE_ALARM: Final = 0.01
#: Runs of each side: with as many that were recorded, all of now are below all of them by chance once in 252 times.
RUNS: Final = 5
#: Seconds that one benchmark may take.
LIMIT_S: Final = 3600

Rows = dict[str, list[float]]


class Verdict(Enum):
    """Judgement of one row."""

    WORSE = "worse"
    BETTER = "better"
    ALIKE = "not told apart"
    TOO_FEW = "too few runs to tell"
    GONE = "not measured any more"
    NEW = "not recorded yet"


@dataclass(frozen=True, slots=True)
class Judged:
    """One row: its ratios then and now, and what follows."""

    row: str
    then: Sequence[float]
    now: Sequence[float]
    verdict: Verdict

    def line(self) -> str:
        """Return it as one line of text."""
        return f"{self.verdict.value:>22}  {self.row}: {_range(self.then)} -> {_range(self.now)}"


def judge(then: Sequence[float], now: Sequence[float]) -> Verdict:
    """Compare the ratios of one row; both are bigger where ours is better."""
    if not then:
        return Verdict.NEW
    if not now:
        return Verdict.GONE
    if 1 / math.comb(len(then) + len(now), len(now)) > FALSE_ALARM:
        return Verdict.TOO_FEW
    if max(now) < min(then):
        return Verdict.WORSE
    return Verdict.BETTER if min(now) > max(then) else Verdict.ALIKE


def judge_all(then: Mapping[str, Sequence[float]], now: Mapping[str, Sequence[float]]) -> list[Judged]:
    """Compare the rows of one benchmark, by name."""
    pairs = ((row, then.get(row, ()), now.get(row, ())) for row in sorted({*then, *now}))
    return [Judged(row, before, after, judge(before, after)) for row, before, after in pairs]


def rows_of(output: str) -> Rows:
    """Read the rows that `report.publish` printed, those of one name together; a row beside a target has no ratios."""
    rows: Rows = {}
    for line in output.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            rows.setdefault(row["bench"], []).extend(row.get("ratios", ()))
    return {name: ratios for name, ratios in rows.items() if ratios}


def measure(name: str, runs: int) -> Rows:
    """Run one benchmark.

    Raises:
        SystemExit: it failed; what it said stands above.
    """
    progress(f"{name}: {runs} runs")
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--json", "--runs", str(runs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench {name} failed with status {done.returncode}; its messages stand above")
    return rows_of(done.stdout)


def read() -> dict[str, Rows]:
    """Read what is committed."""
    document: dict[str, Rows] = json.loads(RATIOS.read_text())
    return document


def record(names: Iterable[str], runs: int) -> None:
    """Measure and write, each benchmark as it ends."""
    for name in names:
        kept = read() | {name: measure(name, runs)}
        RATIOS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def check(names: Iterable[str], runs: int) -> int:
    """Measure and compare; returns the status."""
    recorded, worse = read(), 0
    for name in names:
        then = recorded[name]
        for judged in judge_all(then, measure(name, max([runs, *map(len, then.values())]))):
            print(judged.line(), flush=True)
            worse += judged.verdict is Verdict.WORSE
    print(f"{worse} worse than recorded" if worse else "none worse than recorded")
    return 1 if worse else 0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks; without any, all that are recorded")
    parser.add_argument("--record", action="store_true", help="write the ratios of now instead of judging them")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each side, at least (default: %(default)s)")
    options = parser.parse_args()
    names = options.names or sorted(read())
    if options.record:
        record(names, options.runs)
        return 0
    if unknown := sorted({*names} - {*read()}):
        parser.error(f"no ratios of {', '.join(unknown)} are recorded; record them with --record {' '.join(unknown)}")
    if not names:
        parser.error("nothing is recorded yet; record ratios with --record NAME…")
    return check(names, options.runs)


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):g} to {max(ratios):g} ({len(ratios)})" if ratios else "none"


if __name__ == "__main__":
    sys.exit(main())
