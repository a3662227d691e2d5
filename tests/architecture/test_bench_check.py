"""Ratios of benchmarks beside recorded ones: what counts as worse."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from tests.benchmarks.check import FALSE_ALARM, RUNS, Verdict, judge, judge_all, rows_of
from tests.benchmarks.report import files_are_on, publish
from tests.support.patience import PATIENCE_S


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ([0.70, 0.72, 0.74, 0.71, 0.73], Verdict.WORSE),
        ([0.70, 0.72, 0.80, 0.71, 0.73], Verdict.ALIKE),
        ([0.90, 0.92, 0.94, 0.91, 0.93], Verdict.BETTER),
        ([0.10], Verdict.TOO_FEW),
        ([], Verdict.GONE),
    ],
)
def test_a_row_is_worse_only_where_each_run_is_below_each_that_was_recorded(now: list[float], verdict: Verdict) -> None:
    assert judge([0.75, 0.80, 0.85, 0.78, 0.82], now) is verdict


def test_a_row_that_did_not_change_is_called_worse_as_seldom_as_is_said() -> None:
    values = range(2 * RUNS)
    # Each way to fall into "then" and "now" is as likely as any other.
    ways = list(combinations(values, RUNS))
    worse = sum(judge(then, [each for each in values if each not in then]) is Verdict.WORSE for then in ways)
    assert 0 < worse / len(ways) <= FALSE_ALARM


def test_rows_are_read_as_they_are_printed_and_targets_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    for peer in ([2.0, 4.0], [3.0, 3.0]):
        for bench in ("a", "b"):
            publish(f"{bench} {peer}", ours=[4.0, 2.0], peer=peer, unit="s", bigger_is_better=False, as_json=True)
    output = "progress\n" + capsys.readouterr().out
    assert len([json.loads(line) for line in output.splitlines()[1:]]) == 4
    rows = rows_of(output)
    assert rows == {"a [2.0, 4.0]": [0.5, 2.0], "b [2.0, 4.0]": [0.5, 2.0]}
    assert [(each.row, each.verdict) for each in judge_all({"c": [1.0]}, {"d": [1.0]})] == [
        ("c", Verdict.GONE),
        ("d", Verdict.NEW),
    ]


def test_a_benchmark_that_is_asked_to_end_stops_what_it_started() -> None:
    program = (
        "import signal; from tests.benchmarks.report import arguments\n"
        "arguments('', 1)\n"
        "try:\n    signal.raise_signal(signal.SIGTERM)\n"
        "finally:\n    print('stopped')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "stopped\n")


def test_the_file_system_of_a_directory_is_known(tmp_path: Path) -> None:
    assert files_are_on(Path("/proc")) == "proc"
    assert files_are_on(tmp_path)
