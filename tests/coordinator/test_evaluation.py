"""Evaluation and closure reading with the real Nix, in a store of the test's own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.api.requests import RootLimits
from coordinator.client.closure import ClosureError, LocalStore, describe_sources, local_store, read_closure
from coordinator.client.evaluation import (
    EvaluatedRoot,
    EvaluationError,
    LeftOut,
    evaluate,
    explain,
    left_out_text,
    parse_drv,
)
from infra.nar_files import dump
from infra.nix.ca import verify_source
from infra.nix.store_path import StoreDir
from infra.process import run
from tests.support.sources import hashes_of

EXPRESSION = """
let make = name: more: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // more);
in rec {
  a = make "a" { };
  b = make "b" { dep = a; src = ./source.txt; script = builtins.toFile "s" "run ${note}"; outputs = [ "out" "dev" ]; };
  note = builtins.toFile "note" "a note";
  several = { x = a; y = b; };
  dev = b.dev;
  wrong = throw "the moon is wrong";
  number = 3;
  nothing = { };
}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "source.txt").write_text("source\n")
    (tmp_path / "default.nix").write_text(EXPRESSION)
    return str(tmp_path / "default.nix")


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    return ("--store", str(tmp_path / "store"), "--option", "substituters", "")


def described(wanted: Sequence[EvaluatedRoot]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(each.attr, each.drv[44:], each.outputs) for each in wanted]


async def test_attributes_are_told_apart(file: str, flags: tuple[str, ...]) -> None:
    assert described((await evaluate(file, ["a", "b", "dev"], flags=flags)).wanted) == [
        ("a", "a.drv", ()),
        ("b", "b.drv", ()),
        ("dev", "b.drv", ("dev",)),
    ]
    assert described((await evaluate(file, ["several", "a"], flags=flags)).wanted) == [
        ("several.x", "a.drv", ()),
        ("several.y", "b.drv", ()),
        ("a", "a.drv", ()),
    ]


async def test_an_evaluation_error_is_shown_in_the_words_of_nix(
    file: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    heard: list[str] = []
    for attr, sentence in (
        ("nosuch", "attribute 'nosuch' in selection path 'nosuch' not found; check the names after -A"),
        ("wrong", "the moon is wrong; correct"),
        ("number", "does not evaluate to a derivation"),
        ("nothing", "nothing of .* holds no derivation"),
    ):
        with pytest.raises(EvaluationError, match=sentence):
            await evaluate(file, [attr], flags=flags, on_stderr=heard.append)
    assert "the moon is wrong" in "".join(heard)
    assert "--add-root" not in "".join(heard)
    with pytest.raises(EvaluationError, match=r"nowhere\.nix does not exist"):
        await evaluate(str(tmp_path / "nowhere.nix"), ["a"], flags=flags)
    (tmp_path / "broken.nix").write_text("rec {")
    with pytest.raises(EvaluationError, match="syntax error, unexpected end of file"):
        await evaluate(str(tmp_path / "broken.nix"), [], flags=flags)


async def test_a_machine_without_nix_is_told_to_install_it(file: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nix-instantiate is not on PATH; install Nix"):
        await evaluate(file, ["a"], env={"PATH": str(tmp_path)})


async def test_an_endless_evaluation_is_ended(tmp_path: Path) -> None:
    endless = tmp_path / "endless.nix"
    endless.write_text("let f = n: f (n + 1); in builtins.seq (builtins.readFile /dev/zero) (f 0)")
    tool = tmp_path / "nix-instantiate"
    tool.write_text("#!/bin/sh\nsleep 100\n")
    tool.chmod(0o755)
    with pytest.raises(EvaluationError, match=r"did not end within 0\.2 s"):
        await evaluate(str(endless), [], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout_s=0.2)


def test_newer_nix_puts_the_error_last_and_that_is_the_one_that_counts() -> None:
    messages = "error:\n       … while calling the 'throw' builtin\n\n       error: \x1b[31mboom\x1b[0m\n"
    assert explain("f.nix", messages, 1).startswith("boom; correct f.nix")
    assert "status 7" in explain("f.nix", "no word", 7)


def test_derivation_paths_are_arguments_too() -> None:
    path = "/nix/store/h0qb3wmwhkx4nsnnlp5janwnw1bz9ng8-a+b.drv"
    assert parse_drv(path) == EvaluatedRoot("a+b", path)
    assert parse_drv(f"{path}!out,dev") == EvaluatedRoot("a+b", path, ("out", "dev"))
    assert parse_drv("./a.drv") is None


async def test_the_closure_is_read_inputs_first_with_all_sources(file: str, flags: tuple[str, ...]) -> None:
    wanted = (await evaluate(file, ["b"], flags=flags)).wanted
    store = local_store(flags[1], wanted[0].drv)
    closure = read_closure(store, [wanted[0].drv])
    assert [drv[44:] for drv in closure.derivations] == ["a.drv", "b.drv"]
    assert sorted(source[44:] for source in closure.sources) == ["s", "source.txt"]
    headers = (await describe_sources(store, closure.sources)).headers
    assert [header.path[33:] for header in headers if header.path[33:] != "source.txt"] == ["note", "s"]
    for header in headers:
        path = f"/nix/store/{header.path}"
        hashes = hashes_of(dump(store.physical(path)))
        found = verify_source(StoreDir("/nix/store"), path, hashes, [f"/nix/store/{r}" for r in header.references])
        assert found == header.ca


async def test_a_store_that_lost_a_member_is_an_error_that_names_it(file: str, flags: tuple[str, ...]) -> None:
    wanted = (await evaluate(file, ["b"], flags=flags)).wanted
    store = local_store(flags[1], wanted[0].drv)
    whole = read_closure(store, [wanted[0].drv])
    await asyncio.to_thread(Path(store.physical(whole.derivations[0])).unlink)
    with pytest.raises(ClosureError, match=r"-a\.drv is not in the local store"):
        read_closure(store, [wanted[0].drv])
    absent = f"/nix/store/{'0' * 32}-absent"
    with pytest.raises(ClosureError, match="absent is not in the local store"):
        await describe_sources(store, [absent])


def test_a_store_that_is_no_directory_is_refused() -> None:
    with pytest.raises(ClosureError, match="wants a directory"):
        local_store("ssh-ng://far")
    assert local_store("/x").physical("/nix/store/y") == "/x/nix/store/y"
    assert LocalStore().flags == ()


LIMITED = """
{ factor ? 1, ... }:
let
  make = name: meta:
    (derivation { inherit name; system = "x86_64-linux"; builder = "/bin/sh"; }) // { inherit meta; };
in {
  plain = make "plain" { };
  set."with.dot" = make "dotted" {
    timeout = 60 * factor; maxSilent = 7; drover = { memoryBytes = 8; outputBytes = 9; logBytes = 10; };
  };
  called = { factor ? 0 }: make "called" { timeout = factor; };
  broken = make "broken" { timeout = throw "no"; maxSilent = "soon"; };
  both = { x = make "x" { timeout = 1; }; y = make "y" { timeout = 1; }; };
  list = [ (make "first" { timeout = 3; }) [ ({ factor ? 4 }: make "second" { timeout = factor; }) ] ];
  deep.recurseForDerivations = true;
  deep.inner = { recurseForDerivations = true; leaf = make "leaf" { maxSilent = 5; }; };
}
"""


async def test_limits_come_from_the_meta_of_the_attribute_itself(flags: tuple[str, ...], tmp_path: Path) -> None:
    limited = tmp_path / "limited.nix"
    limited.write_text(LIMITED)
    attrs = ["plain", 'set."with.dot"', "called", "broken"]
    found = (await evaluate(str(limited), attrs, flags=(*flags, "--arg", "factor", "2"))).wanted
    assert [each.attr for each in found] == attrs
    every = RootLimits(timeout_s=120, silence_s=7, log_bytes=10, output_bytes=9, memory_bytes=8)
    assert [each.limits for each in found] == [None, every, RootLimits(timeout_s=2), None]


async def test_limits_and_names_hold_whichever_way_a_root_came_about(flags: tuple[str, ...], tmp_path: Path) -> None:
    limited = tmp_path / "limited.nix"
    limited.write_text(LIMITED)

    async def said(file: Path, *attrs: str) -> dict[str, RootLimits | None]:
        found = await evaluate(str(file), attrs, flags=flags)
        return {each.attr: each.limits for each in found.wanted}

    def seconds(count: int) -> RootLimits:
        return RootLimits(timeout_s=count)

    leaf = RootLimits(silence_s=5)
    assert await said(limited) == {"broken": None, "deep.inner.leaf": leaf, "plain": None}
    assert await said(limited, "both", "list", "deep.inner") == {
        "both.x": seconds(1),
        "both.y": seconds(1),
        "list.0": seconds(3),
        "list.1.0": seconds(4),
        "deep.inner.leaf": leaf,
    }
    single = tmp_path / "single.nix"
    single.write_text(f"(import {limited} {{ }}).both.x")
    assert await said(single) == {"x": seconds(1)}


async def test_attributes_that_nix_leaves_out_of_a_set_are_named(flags: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "nested.nix"
    file.write_text(
        """
        let make = name: derivation { inherit name; system = "x86_64-linux"; builder = "/bin/sh"; };
        in rec { a = make "a"; again = a; nested = { b = throw "not looked into"; }; "3d" = make "c"; number = 3; }
        """
    )
    found = await evaluate(str(file), [], flags=flags)
    assert [each.attr for each in found.wanted] == ["a"]
    assert found.left_out == (LeftOut('"3d"', is_set=False), LeftOut("nested", is_set=True))
    assert left_out_text("f.nix", found.left_out[1:]) == (
        "left out of f.nix, as Nix leaves them out: nested; "
        "build them with -A nested or with recurseForDerivations = true in the set"
    )
    assert [each.attr for each in (await evaluate(str(file), ['"3d"'], flags=flags)).wanted] == ['"3d"']


async def test_an_attribute_that_cannot_be_evaluated_is_named(flags: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "wrong.nix"
    file.write_text('{ set = { recurseForDerivations = true; ok = 1; wrong = throw "the moon is wrong"; }; }')
    heard: list[str] = []
    with pytest.raises(EvaluationError, match=r"^the moon is wrong; correct set\.wrong of .*wrong\.nix "):
        await evaluate(str(file), [], flags=flags, on_stderr=heard.append)
    assert "drover-" not in "".join(heard)
    file.write_text("{ needed }: needed")
    with pytest.raises(EvaluationError, match=r"an argument without a value \('needed'\); give it with --arg"):
        await evaluate(str(file), [], flags=flags)


async def test_the_roots_of_a_file_are_those_of_nix_instantiate(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Told apart by attribute, but the same derivations and outputs in the same order."""
    file = tmp_path / "all.nix"
    file.write_text(
        """
        { ... }@args:
        let make = name: derivation { inherit name; system = "s"; builder = "b"; outputs = [ "out" "x" ]; };
        in {
          z = make "z"; B = (make "b").x; a = [ (make "never") ]; f = _: make "never";
          set.recurseForDerivations = true;
          set.__functor = self: { seen ? 1 }: { s = make "s"; n = make (toString seen); };
          off = { recurseForDerivations = false; n = make "never"; };
          l.recurseForDerivations = true; l.inner = make "inner";
        }
        """
    )
    more = ("--arg", "seen", "2")
    for attrs in ([], ["a", "l", "a.0"]):
        words = [word for attr in attrs for word in ("-A", attr)]
        plain = await run(
            ["nix-instantiate", str(file), *words, *flags, *more],
            env=os.environ, timeout_s=60, max_output_bytes=1 << 20,
        )  # fmt: skip
        assert plain.returncode == 0, plain.stderr
        found = (await evaluate(str(file), attrs, flags=(*flags, *more))).wanted
        assert [f"{each.drv}{''.join('!' + name for name in each.outputs)}" for each in found] == (
            plain.stdout.decode().split()
        )
