"""Evaluation by nix-eval-jobs, with a stand-in that has its arguments and wire format over the real Nix.

No machine of ours has the real one; what is held here is its format as its sources write it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.inputs import Inputs, evaluation_of
from coordinator.evaluation.model import Evaluation
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.source_plan import EvaluatorChoice
from tests.support import eval_jobs_stand_in
from tests.support.patience import PATIENCE_S

LIMITS = PoolLimits(2, 900 << 20, 60)

FILE = """
{ seen ? 1 }:
let make = name: more: (derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // more));
in {
  a = make "a" { };
  dev = (make "b" { outputs = [ "out" "dev" ]; }).dev;
  limited = make "limited" { } // { meta = { timeout = 60; drover.memoryBytes = 8; license = x: x; }; };
  nested = { b = throw "not looked into"; };
  set = {
    recurseForDerivations = true; "3d" = 1;
    thrown = throw "the moon is wrong"; typed = 1 + "x"; n = make "n${toString seen}" { };
  };
  list = [ (make "first" { }) [ (make "second" { }) ] ];
  ring = let ring = { recurseForDerivations = true; round = ring; }; in ring;
  number = 3;
  warned = builtins.trace "look at me" (make "warned" { });
}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "default.nix").write_text(FILE)
    return str(tmp_path / "default.nix")


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    return ("--store", str(tmp_path / "store"), "--option", "substituters", "", "--arg", "seen", "2")


@pytest.fixture
def env(tmp_path: Path) -> Mapping[str, str]:
    """An environment with the stand-in on its PATH."""
    program = tmp_path / "bin" / "nix-eval-jobs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{eval_jobs_stand_in.__file__}" "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}


async def evaluated(
    file: str,
    *attrs: str,
    flags: tuple[str, ...],
    env: Mapping[str, str],
    choice: EvaluatorChoice = EvaluatorChoice.AUTO,
    messages: list[str] | None = None,
    timeout_s: float = PATIENCE_S,
) -> Evaluation:
    kept: list[str] = [] if messages is None else messages
    limits = PoolLimits(LIMITS.evaluators, LIMITS.memory_bytes, timeout_s)
    return await evaluation_of(
        Inputs((file,), attrs=attrs, flags=flags), limits, env=env, on_messages=kept.append, choice=choice
    )


def content(evaluation: Evaluation) -> tuple[object, ...]:
    return (
        evaluation.wanted,
        set(evaluation.left_out),
        [(each.attr, each.error, each.position) for each in evaluation.failed],
    )


async def test_nix_eval_jobs_finds_what_our_own_evaluators_find(
    file: str, flags: tuple[str, ...], env: Mapping[str, str], tmp_path: Path
) -> None:
    env = {**env, "DROVER_STAND_IN_ARGUMENTS": str(tmp_path / "arguments"), "DROVER_STAND_IN": "noise"}
    for attrs in ((), ("set", "list", "dev", "limited", "nosuch", "number")):
        messages: list[str] = []
        found = await evaluated(file, *attrs, flags=flags, env=env, messages=messages)
        own = await evaluated(file, *attrs, flags=flags, env=env, choice=EvaluatorChoice.OWN)
        assert content(found) == content(own)
        assert len(found.wanted) >= 4
        assert "the moon is wrong" in next(each.text for each in found.failed if each.attr == "set.thrown")
        assert messages == ([] if attrs else ["trace: look at me"])
    words = json.loads((tmp_path / "arguments").read_text())
    # The ceiling is that of two workers and of one more share for what they have beyond theirs.
    assert words[:4] == ["--workers", "2", "--max-memory-size", "300"]


async def test_what_nix_eval_jobs_did_not_get_to_is_evaluated_by_our_own(
    file: str, flags: tuple[str, ...], env: Mapping[str, str]
) -> None:
    own = await evaluated(file, flags=flags, env=env, choice=EvaluatorChoice.OWN)
    for how, sentence in (
        ("die 0", "nix-eval-jobs ended early (while reading result for attrPath ''"),
        ("die 4", "evaluation worker got killed by SIGSEGV, (possible infinite recursion)); drover's own evaluators"),
        ("garbage", "nix-eval-jobs printed 'Segmentation fault', which is none of its lines; drover's own"),
        ("hang", "nix-eval-jobs found nothing for 10 s; drover's own evaluators do the rest"),
    ):
        messages: list[str] = []
        its = {**env, "DROVER_STAND_IN": how}
        # Far more than our own take, for which it holds too.
        timeout_s = 10 if how == "hang" else PATIENCE_S
        found = await evaluated(file, flags=flags, env=its, messages=messages, timeout_s=timeout_s)
        assert content(found) == content(own)
        assert any(sentence in each for each in messages), messages


class NoBuilds:
    """A maker that makes nothing."""

    async def are_there(self, paths: Sequence[str]) -> bool:
        return not paths

    async def build(self, paths: Sequence[str], attr: str) -> str | None:
        return f"{len(paths)} path is not built" if attr else None


async def test_what_imports_is_left_to_our_own_which_have_a_share_of_the_memory(
    flags: tuple[str, ...], env: Mapping[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "imports.nix"
    file.write_text(
        """
        let make = name: derivation { inherit name; system = "x86_64-linux"; builder = "/bin/sh"; };
        in { a = import (make "a"); b = make "b"; c = make "c-${import (make "a")}"; d = throw "no d"; }
        """
    )
    # The end comes after the first line: what was left to us by then is not evaluated again.
    for how in ("", "die 1"):
        its = {**env, "DROVER_STAND_IN_ARGUMENTS": str(tmp_path / "arguments"), "DROVER_STAND_IN": how}
        found = await evaluation_of(
            Inputs((str(file),), flags=flags), LIMITS, env=its, on_messages=lambda _: None, imports=NoBuilds()
        )
        assert [each.attr for each in found.wanted] == ["b"]
        assert [(each.attr, each.error) for each in found.failed] == [
            ("a", "1 path is not built"),
            ("c", "1 path is not built"),
            ("d", "no d"),
        ]
        words = json.loads((tmp_path / "arguments").read_text())
        assert words[:4] == ["--workers", "2", "--max-memory-size", "225"]


async def test_an_evaluator_that_is_not_there_is_said_to_be_missing(file: str, flags: tuple[str, ...]) -> None:
    with pytest.raises(EvaluationError, match="nix-eval-jobs is not on PATH; install it, or evaluate with --evaluator"):
        await evaluated(file, flags=flags, env=os.environ, choice=EvaluatorChoice.NIX_EVAL_JOBS)
