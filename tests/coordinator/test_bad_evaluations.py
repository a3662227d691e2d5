"""What people evaluate that is wrong: each has one sentence, and costs the others nothing."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from coordinator.cli.evaluation import show_messages
from coordinator.evaluation.errors import EvaluationError
from infra.process import run
from infra.process_tree import live_processes
from tests.coordinator.test_evaluation import evaluated
from tests.support.patience import PATIENCE_S

MAKE = (
    'let make = name: more: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // more); in '
)


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    return ("--store", str(tmp_path / "store"), "--option", "substituters", "")


def written(directory: Path, text: str, name: str = "default.nix") -> str:
    (directory / name).write_text(MAKE + text)
    return str(directory / name)


async def test_bytes_that_are_no_text_are_shown_without_what_a_terminal_obeys(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x1b]0;owned\x07::add-mask::x\n\x9b31m end")
    file = written(tmp_path, '{ a = builtins.trace (builtins.readFile ./bytes) (make "a" { }); }')
    messages: list[str] = []
    assert len((await evaluated(file, flags=flags, messages=messages)).wanted) == 1
    for each in messages:
        show_messages(each)
    shown = capsys.readouterr().err
    assert "end" in shown
    assert not set(shown) & {"\x1b", "\x07", "\x9b"}


async def test_what_an_evaluator_forks_ends_with_it(flags: tuple[str, ...], tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    (tmp_path / "script").write_text(f"sleep 1000 >/dev/null 2>&1 & echo $! > {mark}; echo '\"forked\"'")
    file = written(tmp_path, '{ a = make (builtins.exec [ "/bin/sh" (toString ./script) ]) { }; }')
    found = await evaluated(file, flags=(*flags, "--option", "allow-unsafe-native-code-during-evaluation", "true"))
    assert [each.attr for each in found.wanted] == ["a"]
    # A process that is killed ends once it has its turn.
    async with asyncio.timeout(PATIENCE_S):
        while int(mark.read_text()) in live_processes():  # noqa: ASYNC110 - other programs' processes send no event
            await asyncio.sleep(0.01)


async def test_names_of_any_characters_are_left_out_named_and_built_when_asked(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    file = written(
        tmp_path,
        """{ a = make "a" { }; "with.dot" = make "dotted" { }; "ü" = make "u" { }; "" = make "empty" { };
        "a b" = make "blank" { }; "quo\\"te" = make "quote" { }; }""",
    )
    found = await evaluated(file, flags=flags)
    assert [each.attr for each in found.wanted] == ["a"]
    assert {each.attr for each in found.left_out} == {'"with.dot"', '"ü"', '""', '"a b"', '"quo"te"'}
    asked = ['"with.dot"', '"ü"', '"a b"', '""']
    again = await evaluated(file, asked, flags=flags)
    assert [each.attr for each in again.wanted] == asked


async def test_an_aggregate_whose_constituents_are_names_is_an_error(flags: tuple[str, ...], tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """rec {
          a = make "a" { };
          whole = make "whole" { _hydraAggregate = true; constituents = [ a ]; };
          deep = builtins.foldl' (below: n: make "deep${n}" { _hydraAggregate = true; constituents = [ below ]; }) a
            (builtins.genList toString 20);
          missing = make "missing" { _hydraAggregate = true; constituents = [ "nosuch" ]; };
          one = make "one" { _hydraAggregate = true; constituents = [ two ]; };
          two = make "two" { _hydraAggregate = true; constituents = [ one ]; };
          over = let
            x = make "x" { _hydraAggregate = true; constituents = [ a y ]; };
            y = make "y" { _hydraAggregate = true; constituents = [ x ]; };
          in make "over" { _hydraAggregate = true; constituents = [ a x ]; };
        }""",
    )
    found = await evaluated(file, flags=flags)
    assert [each.attr for each in found.wanted] == ["a", "deep", "whole"]
    errors = {each.attr: each.error for each in found.failed}
    assert errors["missing"] == (
        "the aggregate names its constituent 'nosuch', and only Hydra looks for names; list the derivation itself"
    )
    assert errors["one"] == "the aggregate is a constituent of itself (one, two, one); take it out of one of them"
    assert errors["two"] == "the aggregate is a constituent of itself (two, one, two); take it out of one of them"
    assert "are constituents of each other (x, y, x)" in errors["over"]


async def test_a_flake_without_the_output_and_one_with_changes_say_so(flags: tuple[str, ...], tmp_path: Path) -> None:
    drv = 'derivation { name = "a"; system = "s"; builder = "b"; }'
    (tmp_path / "flake.nix").write_text(f"{{ outputs = {{ self }}: {{ packages.x86_64-linux.a = {drv}; }}; }}")
    for words in (["init", "-q"], ["add", "flake.nix"]):
        await run(["git", "-C", str(tmp_path), *words], env=os.environ, timeout_s=PATIENCE_S, max_output_bytes=1 << 16)
    messages: list[str] = []
    with pytest.raises(EvaluationError, match=r"attribute 'checks' in selection path .* not found; check the names"):
        await evaluated(f"{tmp_path}#", flags=flags, systems=["x86_64-linux"], messages=messages)
    found = await evaluated(f"{tmp_path}#a", flags=flags, systems=["x86_64-linux"], messages=messages)
    assert [each.attr for each in found.wanted] == ["a"]
    assert messages[-1].startswith(f"the git tree of {tmp_path} has changes that are not committed; they are built too")
