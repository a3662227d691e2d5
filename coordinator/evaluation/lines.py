"""Lines on standard input that say what to build: derivations, or what nix-eval-jobs prints.

A line of nix-eval-jobs is a JSON object with `attr`, and `drvPath` or `error` or (for an aggregate whose constituents
are not all there) both. Source: src/drv.cc and src/constituents.cc of nix-eval-jobs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

import orjson

from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.messages import error_line, plain, position
from coordinator.evaluation.model import EvaluatedRoot, FailedAttr, parse_drv
from infra.decoding import decoder
from infra.records import record

#: Characters of a line that a sentence shows.
_SHOWN: Final = 100


@record(frozen=True, slots=True)
class _Job:
    """One line of nix-eval-jobs, as far as it is read."""

    PASSES_OVER: ClassVar[bool] = True

    attr: str
    drvPath: str = ""  # noqa: N815 - its name there
    error: str = ""


def findings_of_line(number: int, line: str) -> list[EvaluatedRoot | FailedAttr]:
    """Read one line: a derivation as a path, or an object of nix-eval-jobs; an empty line holds nothing.

    Raises:
        EvaluationError: It is neither.
    """
    text = line.strip()
    if not text:
        return []
    if not text.startswith("{"):
        root = parse_drv(text)
        if root is None:
            raise EvaluationError(
                f"line {number} of standard input, {text[:_SHOWN]!r}, is neither the full path of a .drv nor "
                "a line of nix-eval-jobs; give attributes with -A - beside the file that has them"
            )
        return [root]
    job = _job(number, text)
    found: list[EvaluatedRoot | FailedAttr] = []
    if job.drvPath:
        drv = parse_drv(job.drvPath)
        if drv is None:
            raise EvaluationError(f"line {number} of standard input has the derivation {job.drvPath[:_SHOWN]!r}")
        found.append(EvaluatedRoot(job.attr or drv.attr, drv.drv))
    if job.error or not job.drvPath:
        message = plain(job.error).strip()
        first = error_line(message) or (message.splitlines() or ["it says neither a derivation nor an error"])[0]
        found.append(FailedAttr(job.attr, first, message, position(message)))
    return found


def read_attrs(lines: Iterable[str]) -> tuple[str, ...]:
    """Read one attribute path a line; empty lines are passed over."""
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _job(number: int, text: str) -> _Job:
    try:
        job: _Job = decoder(_Job)(orjson.loads(text))
    except (ValueError, TypeError, KeyError):
        raise EvaluationError(
            f"line {number} of standard input, {text[:_SHOWN]!r}, is no line of nix-eval-jobs"
        ) from None
    return job
