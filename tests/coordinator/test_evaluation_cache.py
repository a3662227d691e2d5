"""Findings of earlier evaluations: when they count, and that they never do where anything else went in."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from coordinator.evaluation.cache import EvaluationCache, KeptFindings
from coordinator.evaluation.inputs import Inputs, evaluation_of
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, Evaluation
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.systems import parse_systems

LIMITS = PoolLimits(1, 2 << 30, 300)
MAKE = """let make = name: derivation { inherit name; system = builtins.currentSystem; builder = "/bin/sh"; }; in """


class Evaluations:
    """Evaluations of one file in a store and a cache of their own, with what they printed."""

    def __init__(self, root: Path) -> None:
        self.tree = root / "tree"
        self.tree.mkdir()
        self.store = root / "store"
        self.directory = root / "cache"
        self.env: dict[str, str] = {**os.environ, "HOME": str(root)}
        self.env.pop("NIX_PATH", None)

    async def run(
        self, *attrs: str, more: tuple[str, ...] = (), systems: str = "", file: str = "", impure: bool = False
    ) -> tuple[Evaluation, bool]:
        """Evaluate; returns what was found and whether any of it was kept."""
        messages: list[str] = []
        flags = (*more, "--store", str(self.store), "--option", "substituters", "")
        named = (file or str(self.tree / "default.nix"),)
        inputs = Inputs(named, "", attrs, parse_systems(systems) if systems else (), flags, impure)
        found = await evaluation_of(
            inputs, LIMITS, env=self.env, on_messages=messages.append, cache=EvaluationCache(self.directory)
        )
        return found, any("come from the evaluation cache" in each for each in messages)


@pytest.fixture
def evaluations(tmp_path: Path) -> Evaluations:
    return Evaluations(tmp_path)


def write(evaluations: Evaluations, text: str, **files: str) -> None:
    (evaluations.tree / "default.nix").write_text(MAKE + text)
    for name, content in files.items():
        (evaluations.tree / f"{name}.nix").write_text(content)


async def test_the_same_evaluation_again_is_kept_findings_and_anything_else_is_not(evaluations: Evaluations) -> None:
    text = """{ seen ? "1" }: { a = make "a${seen}"; l = [ (make "b") ];
      set = { recurseForDerivations = true; c = import ./c.nix make; };
      left = { x = 1; }; }"""
    write(evaluations, text, c='make: make "c"')
    first, kept = await evaluations.run("a", "l", "set")
    assert not kept
    assert await evaluations.run("a", "l", "set") == (first, True)

    async def is_anew(**arguments: object) -> bool:
        found, was_kept = await evaluations.run("a", "l", "set", **arguments)  # type: ignore[arg-type]
        again = await evaluations.run("a", "l", "set", **arguments)  # type: ignore[arg-type]
        assert again == (found, True)
        return not was_kept

    assert await is_anew(more=("--argstr", "seen", "2"))
    assert await is_anew(systems="x86_64-linux,aarch64-darwin")
    assert await is_anew(more=("--option", "allow-import-from-derivation", "false"))
    write(evaluations, text, c='make: make "d"')
    assert await is_anew()
    (evaluations.tree / "unread").mkdir()
    assert await is_anew()
    # The derivations are gone, as after a collection of garbage.
    shutil.rmtree(evaluations.store, ignore_errors=True)
    assert await is_anew()


async def test_what_failed_is_evaluated_anew(evaluations: Evaluations) -> None:
    write(
        evaluations,
        '{ a = make "a"; bad = throw "the moon is wrong"; ring = { recurseForDerivations = true; n = 1 + "x"; }; }',
    )
    first, kept = await evaluations.run()
    assert not kept
    again, kept = await evaluations.run()
    assert kept
    assert again == first
    assert [each.attr for each in again.failed] == ["bad", "ring.n"]


@pytest.mark.parametrize(
    "expression",
    [
        'make "n${toString builtins.currentTime}"',
        'make "n${builtins.getEnv "OUTSIDE"}"',
        'make "n${builtins.readFile (/. + (toString ./. + "/../outside"))}"',
        'make "n${if builtins.pathExists ../outside then "1" else "2"}"',
        'make "n${(builtins.tryEval (import <outside>)).value}"',
        'let e = builtins.tryEval (import ./looks.txt); in make "n${e.value}"',
        'make "n${import ../outside.nix}"',
    ],
)
async def test_an_evaluation_that_looks_outside_of_its_tree_is_right_every_time(
    evaluations: Evaluations, expression: str
) -> None:
    """Each of these has another result when what it looks at changes, and no file in the tree does."""
    write(evaluations, f"{{ n = {expression}; }}")
    (evaluations.tree / "looks.txt").write_text("(builtins.tryEval (import <outside>)).value")
    outside, imported = evaluations.tree.parent / "outside", evaluations.tree.parent / "outside.nix"
    found = []
    for value in ("1", "2"):
        outside.write_text(value)
        imported.write_text(f'"{value}"')
        evaluations.env |= {"OUTSIDE": value, "NIX_PATH": f"outside={imported}"}
        if value == "2" and "pathExists" in expression:
            outside.unlink()
        evaluation, kept = await evaluations.run()
        assert not kept
        found.append(evaluation.wanted[0].drv)
        if "currentTime" in expression:
            await asyncio.sleep(1.0)  # what is asked for is seconds
    assert found[0] != found[1]


FLAKE = """{ outputs = { self }: { checks.x86_64-linux.a = derivation {
  name = "a%s"; system = "x86_64-linux"; builder = "/bin/sh"; env = builtins.getEnv "OUTSIDE"; %s
}; }; }"""


async def test_a_flake_is_kept_by_its_lock_and_sees_nothing_but_itself(evaluations: Evaluations) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=n", "-c", "user.email=e@x")
        subprocess.run(["git", "-C", str(evaluations.tree), *who, *words], check=True, capture_output=True)

    flake = evaluations.tree / "flake.nix"
    reference = f"{evaluations.tree}#checks"
    flake.write_text(FLAKE % ("", ""))
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    evaluations.env["OUTSIDE"] = "1"
    first, kept = await evaluations.run(file=reference)
    assert not kept
    evaluations.env["OUTSIDE"] = "2"
    assert await evaluations.run(file=reference) == (first, True)
    impure, kept = await evaluations.run(file=reference, impure=True)
    assert not kept
    assert impure != first
    # A tree with changes is known by its content, and never taken for the commit.
    flake.write_text(FLAKE % ("changed", ""))
    dirty, kept = await evaluations.run(file=reference)
    assert not kept
    assert dirty != first
    git("commit", "-qam", "second")
    flake.write_text(FLAKE % ("", "time = builtins.currentTime or 0;"))
    assert not (await evaluations.run(file=reference))[1]
    assert not (await evaluations.run(file=reference))[1]


ENTRY = KeptFindings(((AttrPlace(0, 0), EvaluatedRoot("a", "/nix/store/h0qb3wmwhkx4nsnnlp5janwnw1bz9ng8-a.drv")),))


def test_damaged_entries_and_directories_of_others_hold_nothing(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path / "deep" / "cache")
    assert cache.get("k") is None
    cache.put("k", ENTRY)
    assert cache.get("k") == ENTRY
    assert (tmp_path / "deep" / "cache").stat().st_mode & 0o777 == 0o700
    path = tmp_path / "deep" / "cache" / "k"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-1] + b"\0", bytes(100)):
        path.write_bytes(damaged)
        assert cache.get("k") is None
        assert not path.exists()
    cache.put("k", ENTRY)
    path.parent.chmod(0o777)
    assert cache.get("k") is None
    cache.put("other", ENTRY)
    assert [each.name for each in path.parent.iterdir()] == ["k"]


def test_a_cache_is_bounded_in_bytes_and_age(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path / "cache", 1000)
    begin = time.time() - 1000
    for number in range(20):
        cache.put(f"k{number}", ENTRY)
        os.utime(tmp_path / "cache" / f"k{number}", (begin + number, begin + number))
    kept = sorted((each.name for each in (tmp_path / "cache").iterdir()), key=lambda name: int(name[1:]))
    assert 0 < len(kept) < 19
    assert kept[-1] == "k19"
    os.utime(tmp_path / "cache" / "k19", (1, 1))
    cache.put("new", ENTRY)
    assert "k19" not in {each.name for each in (tmp_path / "cache").iterdir()}


async def test_one_cache_serves_programs_side_by_side(tmp_path: Path) -> None:
    def write_and_read(number: int) -> None:
        cache = EvaluationCache(tmp_path / "cache")
        for _ in range(50):
            cache.put("k", KeptFindings(ENTRY.found, (AttrPlace(0, number),)))
            found = cache.get("k")
            assert found is not None
            assert found.found == ENTRY.found

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(asyncio.to_thread(write_and_read, number))
