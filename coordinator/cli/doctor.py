"""`drover doctor`: what keeps this machine's Nix from fetching, and the line that mends it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.rendering import one_line
from coordinator.doctor.checks import Diagnosis, diagnoses
from coordinator.doctor.gather import gather

_WIDTH = 8


def doctor(caches: Sequence[str], keys: Sequence[str], *, plan: bool, as_json: bool) -> int:
    """Examine this machine; returns 1 where there is a problem."""
    facts = asyncio.run(gather(caches, keys, Path.cwd(), os.environ, plan=plan))
    found = diagnoses(facts)
    if as_json:
        print_json({"diagnoses": found, "facts": facts})
    else:
        print_lines(diagnosis_lines(found))
    return exit_status.BUILD_FAILED if any(each.level == "problem" for each in found) else exit_status.OK


def diagnosis_lines(found: Sequence[Diagnosis]) -> list[str]:
    """Return a line for each judgement, with what mends it below, and one that sums them up."""
    lines = []
    for each in found:
        lines.append(f"{each.level:<{_WIDTH}} {one_line(each.about)}: {one_line(each.sentence)}")
        if each.mend:
            lines.append(f"{'':<{_WIDTH}}   mend it: {one_line(each.mend)}")
    problems = sum(each.level == "problem" for each in found)
    advice = sum(each.level == "advice" for each in found)
    counted = [f"{problems} problem{'s' * (problems != 1)}"] * bool(problems) + [f"{advice} to consider"] * bool(advice)
    return [*lines, ", ".join(counted) if counted else "all is well"]
