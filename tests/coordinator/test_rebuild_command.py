"""`drover rebuild` of whatever can be compared, with causes and without a farm's processes: most builds nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.farm import BIN
from tests.support.package_set import ROOT, PackageSet
from tests.support.patience import PATIENCE_S

from .conftest import PRELUDE, OpenedFarm, OpenFarm

FLAKE = """{{
  outputs = {{ self }}: {{
    checks.x86_64-linux.a = derivation {{ name = "a"; system = "x86_64-linux"; builder = "/bin/sh"; text = "{text}"; }};
  }};
}}
"""


#: Jobs for Hydra, and imports from derivations; `SIDE` tells base and head apart.
RELEASE = """
rec {
  name = run "name" "echo '\\"imported-SIDE\\"' > $out";
  imported = run (import name) "echo imported > $out";
  same = run "same-${import (run "stable" "echo '\\"stable\\"' > $out")}" "echo same > $out";
  breaks = run "breaks-${import (run "source-of-SIDE" "test SIDE = base && echo '\\"x\\"' > $out")}" "echo > $out";
  whole = aggregate "whole" [ imported same ];
  named = aggregate "named" [ "imported" ];
  missing = aggregate "missing" [ "nosuch" ];
  one = aggregate "one" [ two ];
  two = aggregate "two" [ one ];
}
"""
AGGREGATE = """
let aggregate = name: constituents: runOn "x86_64-linux"
  { inherit constituents; _hydraAggregate = true; } name "echo $constituents > $out"; in
"""


async def test_a_rebuild_that_is_interrupted_names_the_builds_that_go_on(open_farm: OpenFarm, tmp_path: Path) -> None:
    files = [tmp_path / side for side in ("base", "head")]
    for file in files:
        file.write_text(f'{PRELUDE} {{ a = run "a" "echo {file.name} > $out"; }}')
    # No worker: what is submitted goes on.
    async with open_farm() as farm:
        child = await started(farm, "--base-file", files[0], "--head-file", files[1])
        assert child.stderr is not None
        said, both = "", 0
        async with asyncio.timeout(PATIENCE_S):
            while both < 2:
                line = (await child.stderr.readline()).decode()
                assert line, said
                said, both = said + line, both + line.startswith("submitted ")
        child.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE_S):
            _, errors = await child.communicate()
        assert child.returncode == 130
        head, base = [view.id for view in await farm.client.submissions()]
        sentence = f"report later: drover rebuild --base-submission {base} --head-submission {head}"
        assert sentence in errors.decode()
        for name in (base, head):
            assert (await farm.client.submission(name)).state == "running"


async def foreseen(farm: OpenedFarm, *arguments: str | Path) -> dict[str, Any]:
    """Run the command without builds and return its report."""
    status, report, errors = await rebuilt(farm, *arguments, "--dry-run")
    assert status == 0, errors
    return report


async def rebuilt(farm: OpenedFarm, *arguments: str | Path) -> tuple[int | None, dict[str, Any], str]:
    """Run the command; returns its status, its report and what it says."""
    child = await started(farm, *arguments)
    async with asyncio.timeout(PATIENCE_S):
        out, errors = await child.communicate()
    found: dict[str, Any] = json.loads(out.splitlines()[-1]) if out else {}
    return child.returncode, found, errors.decode()


async def started(farm: OpenedFarm, *arguments: str | Path, command: str = "rebuild") -> asyncio.subprocess.Process:
    """Start the command."""
    words = [*map(str, arguments), "--store", str(farm.root / "client"), "--json"]
    return await asyncio.create_subprocess_exec(
        BIN / "drover",
        command,
        *words,
        env={
            **os.environ,
            "DROVER_URL": farm.coordinator.ready.url,
            "DROVER_TOKEN_FILE": str(farm.coordinator.ready.token_file),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_revisions_files_and_flakes_are_compared_before_anything_is_built(
    open_farm: OpenFarm, tmp_path: Path
) -> None:
    packages = await asyncio.to_thread(PackageSet, tmp_path / "set")
    packages.change(ROOT, "second")
    packages.commit("another root")
    flakes = [tmp_path / side for side in ("before", "after")]
    for flake in flakes:
        flake.mkdir()
        (flake / "flake.nix").write_text(FLAKE.format(text=flake.name))
    async with open_farm() as farm:
        report = await foreseen(farm, packages.file, "--base", packages.first, "--only", "perl*")
        (cause,) = report["causes"]["causes"]
        # `perl` itself, and what stands on it in its set.
        assert (cause["names"], cause["reach"], report["left_out"]) == ([f"{ROOT}-1.0"], 9, 53)
        assert report["forecast"]["bound"] == "no_worker"
        assert report["base"]["name"] == packages.first[:12]

        report = await foreseen(farm, *("--base-file", f"{flakes[0]}#checks"), *("--head-file", f"{flakes[1]}#checks"))
        ((change,),) = (cause["changes"] for cause in report["causes"]["causes"])
        assert (change["name"], change["before"], change["after"]) == ("text", "before", "after")
        assert [each["attr"] for each in report["attributes"]] == ["checks.x86_64-linux.a"]
        assert not await farm.client.submissions()


@pytest.mark.parametrize("command", ["rebuild", "bisect"])
async def test_evaluators_that_run_side_by_side_find_the_store_made(
    open_farm: OpenFarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    packages = await asyncio.to_thread(PackageSet, tmp_path / "set")
    packages.change(ROOT, "second")
    packages.commit("another root")
    # Of two Nix programs that make a store at one time, one fails now and then.
    program, seen = tmp_path / "programs" / "nix", tmp_path / "seen"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntest -s {tmp_path}/client/nix/var/nix/db/schema; echo $? >> {seen}; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    ends = {"rebuild": ("--base",), "bisect": ("-A", ROOT, "--bad", "HEAD", "--good")}[command]
    async with open_farm() as farm:
        child = await started(farm, packages.file, *ends, packages.first, command=command)
        async with asyncio.timeout(PATIENCE_S):
            _, errors = await child.communicate()
    found = seen.read_text().split() if seen.exists() else errors.decode()
    assert (set(found), len(found) >= 2) == ({"0"}, True), errors.decode()


async def test_imports_of_both_sides_are_built_and_an_aggregate_that_is_wrong_costs_the_others_nothing(
    open_farm: OpenFarm, tmp_path: Path
) -> None:
    files = [tmp_path / side for side in ("base", "head")]
    for file in files:
        file.write_text(PRELUDE + AGGREGATE + RELEASE.replace("SIDE", file.name))
    async with open_farm("w") as farm:
        status, report, errors = await rebuilt(
            farm, "--base-file", files[0], "--head-file", files[1], "--option", "sandbox", "false"
        )
        # A side that does not evaluate at all gives that status too, and no report.
        assert (status, "attributes" in report) == (3, True), errors
        found = {each["attr"]: each for each in report["attributes"]}
        assert {attr: each["change"] for attr, each in found.items()} == {
            "imported": "changed",
            "name": "changed",
            "whole": "changed",
            "breaks": "no longer evaluates",
            **dict.fromkeys(("named", "missing", "one", "two"), "evaluates at neither"),
        }
        assert report["unchanged"] == 1
        assert {found[attr]["verdict"] for attr in ("imported", "name", "whole")} == {"built"}
        sentence = "the farm could not build source-of-head, which the evaluation imports: the builder failed"
        assert found["breaks"]["error"].startswith(sentence)
        assert [found[attr]["error"] for attr in ("named", "missing", "one", "two")] == [
            f"the aggregate names its constituent '{name}', and only Hydra looks for names; list the derivation itself"
            for name in ("imported", "nosuch")
        ] + [
            "the aggregate is a constituent of itself (one, two, one); take it out of one of them",
            "the aggregate is a constituent of itself (two, one, two); take it out of one of them",
        ]
