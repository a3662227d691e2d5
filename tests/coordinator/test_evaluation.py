"""Evaluation and closure reading with the real Nix, in a store of the test's own."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from coordinator.api.root_limits import RootLimits
from coordinator.client.closure import ClosureError, LocalStore, describe_sources, local_store, read_closure
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.evaluator import NICER
from coordinator.evaluation.inputs import Inputs, evaluation_of
from coordinator.evaluation.lines import findings_of_line
from coordinator.evaluation.messages import error_line, position
from coordinator.evaluation.model import EvaluatedRoot, Evaluation, FailedAttr, LeftOut, left_out_text, parse_drv
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.source import nix_text
from coordinator.evaluation.systems import parse_systems
from infra.nar_files import dump
from infra.nix.ca import verify_source
from infra.nix.store_path import StoreDir
from infra.process import run
from tests.support.patience import PATIENCE_S
from tests.support.sources import hashes_of

#: Two evaluators, whatever this machine has.
LIMITS = PoolLimits(2, 2 << 30, 300)

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


async def evaluated(
    file: str,
    attrs: Sequence[str] = (),
    *,
    flags: Sequence[str],
    limits: PoolLimits = LIMITS,
    systems: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    messages: list[str] | None = None,
) -> Evaluation:
    """Evaluate a file as `drover build` does."""
    inputs = Inputs((file,), attrs=tuple(attrs), systems=tuple(systems), flags=tuple(flags))
    kept: list[str] = [] if messages is None else messages
    return await evaluation_of(inputs, limits, env=os.environ if env is None else env, on_messages=kept.append)


def described(wanted: Sequence[EvaluatedRoot]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(each.attr, each.drv[44:], each.outputs) for each in wanted]


async def test_attributes_are_told_apart(file: str, flags: tuple[str, ...]) -> None:
    assert described((await evaluated(file, ["a", "b", "dev"], flags=flags)).wanted) == [
        ("a", "a.drv", ()),
        ("b", "b.drv", ()),
        ("dev", "b.drv", ("dev",)),
    ]
    assert described((await evaluated(file, ["several", "a"], flags=flags)).wanted) == [
        ("several.x", "a.drv", ()),
        ("several.y", "b.drv", ()),
        ("a", "a.drv", ()),
    ]


async def test_an_evaluation_error_is_shown_in_the_words_of_nix(
    file: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    messages: list[str] = []
    for attr, sentence in (
        ("nosuch", "attribute 'nosuch' in selection path 'nosuch' not found; check the names after -A"),
        ("wrong", "the moon is wrong; correct"),
        ("number", "does not evaluate to a derivation"),
        ("nothing", "nothing of .* holds no derivation"),
    ):
        with pytest.raises(EvaluationError, match=sentence):
            await evaluated(file, [attr], flags=flags, messages=messages)
    assert "the moon is wrong" in "".join(messages)
    assert "--add-root" not in "".join(messages)
    with pytest.raises(EvaluationError, match=r"nowhere\.nix does not exist"):
        await evaluated(str(tmp_path / "nowhere.nix"), ["a"], flags=flags)
    (tmp_path / "broken.nix").write_text("rec {")
    with pytest.raises(EvaluationError, match="syntax error, unexpected end of file"):
        await evaluated(str(tmp_path / "broken.nix"), [], flags=flags, messages=messages)
    assert "broken.nix:1:" in messages[-1]


async def test_a_machine_without_nix_is_told_to_install_it(file: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="nix is not on PATH; install Nix"):
        await evaluated(file, ["a"], flags=(), env={"PATH": str(tmp_path)})


def test_newer_nix_puts_the_error_last_and_that_is_the_one_that_counts() -> None:
    messages = "error:\n       … while calling the 'throw' builtin\n\n       error: \x1b[31mboom\x1b[0m\n"
    assert error_line(messages) == "boom"
    assert error_line("no word") == ""


def test_derivation_paths_are_arguments_too() -> None:
    path = "/nix/store/h0qb3wmwhkx4nsnnlp5janwnw1bz9ng8-a+b.drv"
    assert parse_drv(path) == EvaluatedRoot("a+b", path)
    assert parse_drv(f"{path}!out,dev") == EvaluatedRoot("a+b", path, ("out", "dev"))
    assert parse_drv("./a.drv") is None


async def test_the_closure_is_read_inputs_first_with_all_sources(file: str, flags: tuple[str, ...]) -> None:
    wanted = (await evaluated(file, ["b"], flags=flags)).wanted
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
    wanted = (await evaluated(file, ["b"], flags=flags)).wanted
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
    found = (await evaluated(str(limited), attrs, flags=(*flags, "--arg", "factor", "2"))).wanted
    assert [each.attr for each in found] == attrs
    every = RootLimits(timeout_s=120, silence_s=7, log_bytes=10, output_bytes=9, memory_bytes=8)
    assert [each.limits for each in found] == [None, every, RootLimits(timeout_s=2), None]


async def test_limits_and_names_hold_whichever_way_a_root_came_about(flags: tuple[str, ...], tmp_path: Path) -> None:
    limited = tmp_path / "limited.nix"
    limited.write_text(LIMITED)

    async def said(file: Path, *attrs: str) -> dict[str, RootLimits | None]:
        found = await evaluated(str(file), attrs, flags=flags)
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


async def test_maintainers_and_further_names_of_a_derivation_are_found(flags: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "people.nix"
    file.write_text(
        """let
          make = name: meta: derivation { inherit name; system = "s"; builder = "b"; } // { inherit meta; };
          a = make "a" { maintainers = [ { github = "ada"; name = "Ada"; } { name = "Bob"; } "eve" { } 3 ]; };
        in { inherit a; z = a; b = make "b" { maintainers = throw "x"; }; c = make "c" { maintainers = 1; }; }"""
    )
    found = await evaluated(str(file), flags=flags)
    assert {each.attr: each.maintainers for each in found.wanted} == {"a": ("ada", "Bob", "eve"), "b": (), "c": ()}
    assert [(each.attr, each.drv) for each in found.aliases] == [("z", found.wanted[0].drv)]


async def test_attributes_that_nix_leaves_out_of_a_set_are_named(flags: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "nested.nix"
    file.write_text(
        """
        let make = name: derivation { inherit name; system = "x86_64-linux"; builder = "/bin/sh"; };
        in rec { a = make "a"; again = a; nested = { b = throw "not looked into"; }; "3d" = make "c"; number = 3; }
        """
    )
    found = await evaluated(str(file), [], flags=flags)
    assert [each.attr for each in found.wanted] == ["a"]
    assert found.left_out == (LeftOut('"3d"', is_set=False), LeftOut("nested", is_set=True))
    assert left_out_text("f.nix", found.left_out[1:]) == (
        "left out of f.nix, as Nix leaves them out: nested; "
        "build them with -A nested or with recurseForDerivations = true in the set"
    )
    assert [each.attr for each in (await evaluated(str(file), ['"3d"'], flags=flags)).wanted] == ['"3d"']


async def test_an_attribute_that_cannot_be_evaluated_is_named(flags: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "wrong.nix"
    file.write_text('{ set = { recurseForDerivations = true; ok = 1; wrong = throw "the moon is wrong"; }; }')
    messages: list[str] = []
    with pytest.raises(EvaluationError, match=r"^the moon is wrong; correct set\.wrong of .*wrong\.nix "):
        await evaluated(str(file), [], flags=flags, messages=messages)
    assert re.findall(r"drover-[0-9a-f]{32}", "".join(messages)) == []
    file.write_text("{ needed }: needed")
    with pytest.raises(EvaluationError, match=r"an argument without a value \('needed'\); give it with --arg"):
        await evaluated(str(file), [], flags=flags)


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
            env=os.environ, timeout_s=PATIENCE_S, max_output_bytes=1 << 20,
        )  # fmt: skip
        assert plain.returncode == 0, plain.stderr
        found = (await evaluated(str(file), attrs, flags=(*flags, *more))).wanted
        assert [f"{each.drv}{''.join('!' + name for name in each.outputs)}" for each in found] == (
            plain.stdout.decode().split()
        )


MIXED = """
let make = name: derivation { inherit name; system = builtins.currentSystem; builder = "/bin/sh"; };
in {
  good = make "good"; later = make "later"; warned = builtins.trace "look at me" (make "warned");
  thrown = throw "not today"; typed = 1 + "x"; endless = let f = x: f (x + 1) + 1; in f 0;
  recursive = let x = { y = x.y; }; in x.y;
  forged = builtins.trace "drover-0123 end 2" (make "forged");
  huge = builtins.foldl' (sum: n: sum + n) 0 (builtins.genList (n: n) 100000000);
  slow = let spin = n: if n == 0 then 0 else spin (n - 1); in
    builtins.foldl' (a: _: builtins.seq (spin 10000) a) (make "slow") (builtins.genList (n: n) 10000000);
  many.recurseForDerivations = true;
  many.inner = builtins.listToAttrs (map (n: { name = "n${toString n}"; value = make "n${toString n}"; })
    (builtins.genList (n: n) 300)) // { recurseForDerivations = true; bad = throw "one of many"; };
}
"""


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    (tmp_path / "mixed.nix").write_text(MIXED)
    return str(tmp_path / "mixed.nix")


async def test_an_attribute_that_fails_costs_the_others_nothing(mixed: str, flags: tuple[str, ...]) -> None:
    attrs = ["good", "thrown", "typed", "endless", "recursive", "nosuch", "forged", "warned", "later", "many"]
    messages: list[str] = []
    found = await evaluated(mixed, attrs, flags=flags, messages=messages)
    names = [each.attr for each in found.wanted]
    assert names[:4] == ["good", "forged", "warned", "later"]
    assert len(names) == 4 + 300
    assert {each.attr: each.error.split(" (")[0] for each in found.failed} == {
        "thrown": "not today",
        "typed": "cannot add a string to an integer",
        "endless": "stack overflow",
        "recursive": "infinite recursion encountered",
        "nosuch": "attribute 'nosuch' in selection path 'nosuch' not found",
        "many.inner.bad": "one of many",
    }
    recursive = next(each for each in found.failed if each.attr == "recursive")
    assert recursive.position == f"{mixed}:6:25"
    assert "infinite recursion" in recursive.text
    assert any("look at me" in each for each in messages)
    # The mark of the evaluator's own lines is no news.
    assert re.findall(r"drover-[0-9a-f]{32}", "".join(messages)) == []


async def test_an_attribute_that_never_ends_is_ended_and_named(mixed: str, flags: tuple[str, ...]) -> None:
    # Far more than the others take, also on a busy machine.
    found = await evaluated(mixed, ["good", "slow", "later"], flags=flags, limits=PoolLimits(1, 2 << 30, 10.0))
    assert [each.attr for each in found.wanted] == ["good", "later"]
    assert found.failed == (FailedAttr("slow", "the evaluation did not end within 10 s"),)


async def test_evaluators_keep_to_their_memory_together(mixed: str, flags: tuple[str, ...]) -> None:
    found = await evaluated(mixed, ["good", "huge", "many", "later"], flags=flags, limits=PoolLimits(2, 600 << 20, 300))
    assert len(found.wanted) == 2 + 300
    assert [(each.attr, each.error) for each in found.failed] == [
        ("huge", "the evaluation needs more than 600 MiB"),
        ("many.inner.bad", "one of many"),
    ]


async def test_evaluators_leave_the_processor_to_what_sends_and_builds_their_findings(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "nice.nix"
    file.write_text("""
      let words = builtins.filter builtins.isString (builtins.split " " (builtins.readFile "/proc/self/stat"));
      in derivation { name = "nice-${builtins.elemAt words 18}"; system = "x86_64-linux"; builder = "/bin/sh"; }
    """)
    [found] = (await evaluated(str(file), [], flags=flags)).wanted
    assert found.drv.endswith(f"-nice-{os.getpriority(os.PRIO_PROCESS, 0) + NICER}.drv")


async def test_one_call_evaluates_for_several_systems(mixed: str, flags: tuple[str, ...]) -> None:
    systems = ("x86_64-linux", "aarch64-darwin")
    found = await evaluated(mixed, ["good", "thrown"], flags=flags, systems=systems)
    assert [each.attr for each in found.wanted] == ["x86_64-linux.good", "aarch64-darwin.good"]
    assert len({each.drv for each in found.wanted}) == 2
    assert [each.attr for each in found.failed] == ["x86_64-linux.thrown", "aarch64-darwin.thrown"]


def test_systems_are_named_one_by_one_or_as_groups() -> None:
    assert parse_systems("x86_64-linux,aarch64-darwin") == ("x86_64-linux", "aarch64-darwin")
    assert parse_systems("darwin, x86_64-linux") == ("x86_64-darwin", "aarch64-darwin", "x86_64-linux")
    assert set(parse_systems("all")) == set(parse_systems("linux darwin"))
    with pytest.raises(ValueError, match="'macos' is no system; write such as"):
        parse_systems("macos")


async def test_an_expression_is_evaluated_where_the_caller_is(flags: tuple[str, ...], mixed: str) -> None:
    async def found(expression: str, *more: str) -> list[str]:
        inputs = Inputs(expression=expression, flags=(*flags, *more))
        evaluation = await evaluation_of(inputs, LIMITS, env=os.environ, on_messages=lambda _: None)
        return [each.attr for each in evaluation.wanted]

    assert await found(f"{{ x = (import {mixed}).good; # a comment\n}}") == ["x"]
    assert await found("{ which }: { y = which.later; }", "--arg", "which", f"import {mixed}") == ["y"]
    for wrong in ("{ x = 1;", '"never closed', "nosuch + 1", "(1 + (2"):
        with pytest.raises(EvaluationError, match=r"correct the expression$"):
            await found(wrong)
    with pytest.raises(EvaluationError, match="correct the expression"):
        await found("{ which }: which", "--arg", "which", "(1 + (2")


async def test_attributes_come_by_lines_and_files_by_a_search_path(
    flags: tuple[str, ...], mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "names").write_text('good\n\nset."with.dot"\ngood\n')
    (tmp_path / "found.nix").write_text(
        f"""{{ name }}: {{ inherit (import {mixed}) good; set."with.dot" = derivation {{
          inherit name; system = builtins.currentSystem; builder = "/bin/sh"; }}; }}"""
    )
    with (tmp_path / "names").open("rb") as names:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(names))
        more = ("-I", f"own={tmp_path}", "--argstr", "name", "told")
        found = await evaluated("<own/found.nix>", ["-"], flags=(*flags, *more))
    assert described(found.wanted) == [("good", "good.drv", ()), ('set."with.dot"', "told.drv", ())]


FLAKE = """{
  outputs = { self }: let make = system: name: derivation { inherit system name; builder = "/bin/sh"; }; in {
    checks.x86_64-linux = { a = make "x86_64-linux" "a"; b = throw "no b"; };
    checks.aarch64-darwin.a = make "aarch64-darwin" "a";
    checks.aarch64-darwin."with.dot" = make "aarch64-darwin" "dotted";
    packages.x86_64-linux.tool = make "x86_64-linux" "tool";
    legacyPackages.x86_64-linux.deep.thing = make "x86_64-linux" "thing";
    other = make "x86_64-linux" "other";
  };
}
"""


async def test_outputs_of_a_flake_are_found_as_nix_build_finds_them(flags: tuple[str, ...], tmp_path: Path) -> None:
    flake = tmp_path / "flake"
    flake.mkdir()
    (flake / "flake.nix").write_text(FLAKE)

    async def found(attr: str, *systems: str) -> tuple[list[str], list[str]]:
        result = await evaluated(f"path:{flake}#{attr}", flags=flags, systems=systems)
        return [each.attr for each in result.wanted], [each.attr for each in result.failed]

    both = ("x86_64-linux", "aarch64-darwin")
    assert await found("checks", *both) == (
        ["checks.x86_64-linux.a", "checks.aarch64-darwin.a"],
        ["checks.x86_64-linux.b"],
    )
    assert await found("", "aarch64-darwin") == (["checks.aarch64-darwin.a"], [])
    assert await found("tool", "x86_64-linux") == (["tool"], [])
    assert await found("deep.thing", "x86_64-linux") == (["deep.thing"], [])
    assert await found("other", "x86_64-linux") == (["other"], [])
    quoted = 'checks.aarch64-darwin."with.dot"'
    for asked in (quoted, 'checks."with.dot"'):
        assert await found(asked, "aarch64-darwin") == ([quoted], [])
    # As `nixpkgs#hello` is found.
    registry = tmp_path / "registry.json"
    names = [{"type": "indirect", "id": "packages"}, {"type": "path", "path": str(flake)}]
    registry.write_text(json.dumps({"version": 2, "flakes": [dict(zip(("from", "to"), names, strict=True))]}))
    more = ("--option", "flake-registry", str(registry))
    named = await evaluated("packages#tool", flags=(*flags, *more), systems=["x86_64-linux"])
    assert [each.attr for each in named.wanted] == ["tool"]
    assert await found("checks.aarch64-darwin.a", "x86_64-linux") == (["checks.aarch64-darwin.a"], [])
    with pytest.raises(EvaluationError, match=r"attribute 'nosuch' in selection path 'nosuch' not found; check the"):
        await found("nosuch", "x86_64-linux")
    with pytest.raises(EvaluationError, match=r"the flake path:/nowhere could not be read: .*/nowhere"):
        await evaluated("path:/nowhere#x", flags=flags)


DRV = "/nix/store/h0qb3wmwhkx4nsnnlp5janwnw1bz9ng8-a.drv"


def test_lines_of_standard_input_name_derivations_or_are_those_of_nix_eval_jobs() -> None:
    lines = [
        DRV,
        "",
        f'{{"attr":"\\"dotted.attr\\"","attrPath":["dotted.attr"],"drvPath":"{DRV}","name":"a","system":"x86_64-linux"}}',
        '{"attr":"broken","attrPath":["broken"],"error":"error: this is an evaluation error"}',
        f'{{"attr":"agg","constituents":[],"drvPath":"{DRV}","error":"tests.*: no matches\\n"}}',
    ]
    found = [finding for number, line in enumerate(lines, 1) for finding in findings_of_line(number, line)]
    assert [each.attr for each in found if isinstance(each, EvaluatedRoot)] == ["a", '"dotted.attr"', "agg"]
    assert [(each.attr, each.error) for each in found if isinstance(each, FailedAttr)] == [
        ("broken", "this is an evaluation error"),
        ("agg", "tests.*: no matches"),
    ]
    for line in ("hello", '{"attr": 3}', '{"attr":"x","drvPath":"/nix/store/x"}', "{"):
        with pytest.raises(EvaluationError, match="line 1 of standard input"):
            findings_of_line(1, line)


async def test_lines_of_standard_input_are_whole_however_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = json.dumps({"attr": "long", "error": "error: " + "no " * 50_000})
    pieces = [DRV[:20], f"{DRV[20:]}\n\n{DRV}!dev\n{failed[:70_000]}", f"{failed[70_000:]}\n", DRV, "!out"]
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as standard_input:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(standard_input))

        def write() -> None:
            with os.fdopen(writing, "w") as out:
                for piece in pieces:
                    out.write(piece)
                    out.flush()

        found, _ = await asyncio.gather(evaluated("-", flags=()), asyncio.to_thread(write))
    assert [each.outputs for each in found.wanted] == [(), ("dev",), ("out",)]
    assert [(each.attr, len(each.text)) for each in found.failed] == [("long", len("error: " + "no " * 50_000) - 1)]


def test_texts_are_written_as_nix_reads_them_back() -> None:
    assert nix_text('a"b\\c${d}\ne') == '"a\\"b\\\\c\\${d}\\ne"'


def test_a_position_of_our_own_file_is_none_of_the_users() -> None:
    text = "error: x\n\n       at /x/evaluation/tree.nix:3:4:\n\n       at /home/me/f.nix:5:17:\n"
    assert position(text) == "/home/me/f.nix:5:17"


async def test_a_set_that_leads_to_itself_ends_in_an_error_of_its_own(flags: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "endless.nix"
    file.write_text(
        """
        let ring = { recurseForDerivations = true; round = ring; };
        in { a = derivation { name = "a"; system = "s"; builder = "b"; }; inherit ring; }
        """
    )
    found = await evaluated(str(file), flags=flags)
    assert [each.attr for each in found.wanted] == ["a"]
    [failed] = found.failed
    assert failed.attr == "ring.round.round"
    assert failed.error == "it goes on for more than 64 names below; a set may lead to itself"


async def test_what_nix_prints_without_end_is_kept_from_its_start_and_its_end(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "loud.nix"
    file.write_text(
        """
        builtins.foldl' (all: n: builtins.trace "line ${toString n}" all)
          (derivation { name = "a"; system = "s"; builder = "b"; }) (builtins.genList (n: n) 20000)
        """
    )
    messages: list[str] = []
    assert len((await evaluated(str(file), flags=flags, messages=messages)).wanted) == 1
    lines = "".join(messages).split("\n")
    assert lines[0] == "trace: line 0"
    assert "[...]" in lines
    assert lines[-2] == "trace: line 19999"
    assert len("".join(messages)) < 70_000
