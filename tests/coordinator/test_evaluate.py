"""Evaluation and closure reading with the real Nix, in a store of the test's own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from coordinator.closure import ClosureError, LocalStore, describe_sources, local_store, read_closure
from coordinator.evaluate import EvaluationError, Wanted, evaluate, explain, parse_drv
from coordinator.limits import StepLimits
from infra.nar_files import dump
from infra.nix.ca import SourceDigest, verify_source
from infra.nix.store_path import StoreDir

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


def described(wanted: list[Wanted]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(each.attr, each.drv[44:], each.outputs) for each in wanted]


async def test_attributes_are_told_apart(file: str, flags: tuple[str, ...]) -> None:
    assert described(await evaluate(file, ["a", "b", "dev"], flags=flags)) == [
        ("a", "a.drv", ()),
        ("b", "b.drv", ()),
        ("dev", "b.drv", ("dev",)),
    ]
    assert described(await evaluate(file, ["several", "a"], flags=flags)) == [
        ("several.1", "a.drv", ()),
        ("several.2", "b.drv", ()),
        ("a", "a.drv", ()),
    ]


async def test_what_cannot_be_evaluated_is_said_in_nix_s_own_words(
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
    assert parse_drv(path) == Wanted("a+b", path)
    assert parse_drv(f"{path}!out,dev") == Wanted("a+b", path, ("out", "dev"))
    assert parse_drv("./a.drv") is None


async def test_the_closure_is_read_inputs_first_with_all_sources(file: str, flags: tuple[str, ...]) -> None:
    wanted = await evaluate(file, ["b"], flags=flags)
    store = local_store(flags[1], wanted[0].drv)
    closure = read_closure(store, [wanted[0].drv])
    assert [drv[44:] for drv in closure.derivations] == ["a.drv", "b.drv"]
    assert sorted(source[44:] for source in closure.sources) == ["s", "source.txt"]
    headers = await describe_sources(store, closure.sources)
    assert [header.path[33:] for header in headers if header.path[33:] != "source.txt"] == ["note", "s"]
    for header in headers:
        path = f"/nix/store/{header.path}"
        digest = SourceDigest()
        for chunk in dump(store.physical(path)):
            digest.feed(chunk)
        found = verify_source(
            StoreDir("/nix/store"), path, digest.finish(), [f"/nix/store/{r}" for r in header.references]
        )
        assert found == header.ca


async def test_a_store_that_lost_a_member_is_an_error_that_names_it(file: str, flags: tuple[str, ...]) -> None:
    wanted = await evaluate(file, ["b"], flags=flags)
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


async def test_limits_come_from_the_meta_of_the_attribute_itself(
    file: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "limited.nix").write_text(
        """
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
        }
        """
    )
    attrs = ["plain", 'set."with.dot"', "called", "broken"]
    limited = await evaluate(str(tmp_path / "limited.nix"), attrs, flags=(*flags, "--arg", "factor", "2"))
    assert [each.limits for each in limited] == [None, StepLimits(120, 7, 10, 9, 8), StepLimits(timeout_s=2), None]
    several = await evaluate(str(tmp_path / "limited.nix"), ["both"], flags=flags)
    assert [each.limits for each in several] == [None, None]
    assert [each.limits for each in await evaluate(file, ["a"], flags=flags)] == [None]
