"""Unusual expressions that people brought: what Nix takes, the farm takes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from coordinator.intake.intake import VERIFYING_COST
from tests.support.attack import FarmUnderAttack
from tests.support.farm import nix_store
from tests.support.loop import LoopStalls

pytestmark = pytest.mark.e2e


def built(farm: FarmUnderAttack, text: str, *words: str) -> dict[str, Any]:
    """Build all of an attribute set; what each root became, by its name."""
    done = farm.build_text(f"{{ {text} }}", "--json", *words)
    assert done.returncode == 0, done.stderr
    return {root["attr"]: root for root in json.loads(done.stdout.splitlines()[-1])["roots"]}


#: Lines of the large derivation below, and its bytes, about.
LINES = 700_000
LARGE_BYTES = 18_000_000


def test_a_deep_tree_and_a_large_derivation_are_built_in_bounded_memory_beside_the_loop(
    readme_farm: FarmUnderAttack, tmp_path: Path
) -> None:
    deep = tmp_path / "deep"
    place = deep
    for _ in range(1500):
        place.mkdir()
        place /= "d"
    text = f"""
        deep = derivation {{
          name = "deep"; system = "x86_64-linux"; builder = "/bin/sh"; src = {deep};
          args = [ "-c" "echo $src > $out" ];
        }};
        large = let line = n: "line ${{toString n}} \\"quoted\\" \\\\"; in derivation {{
          name = "large"; system = "x86_64-linux"; builder = "/bin/sh"; passAsFile = [ "big" ];
          big = builtins.concatStringsSep "\\n" (builtins.genList line {LINES});
          args = [ "-c" "wc -l < $bigPath > $out" ];
        }};
    """
    readme_farm.process.reset_peak()
    before = readme_farm.process.rss_bytes
    with LoopStalls(readme_farm.url) as stalls:
        roots = built(readme_farm, text)
    assert {name: root["state"] for name, root in roots.items()} == {"deep": "done", "large": "done"}
    assert stalls.over(0.05) == 0, readme_farm.log_path.read_text()[-5000:]
    # What intake acquires for verifying it, which is more than dispatch does for sending it, and some.
    assert readme_farm.process.peak_rss_bytes - before < VERIFYING_COST * LARGE_BYTES + 48 * 1024 * 1024
    large = roots["large"]["outputs"]["out"]
    assert readme_farm.fetch(tmp_path / "plain", large).returncode == 0
    assert int((tmp_path / "plain" / large[1:]).read_text()) == LINES - 1
    assert len(json.dumps(readme_farm.api(f"steps/{roots['large']['step']}"))) < 100_000


def build_here(farm: FarmUnderAttack, name: str) -> tuple[str, str]:
    """Build a derivation with Nix itself in the client's store; its path and its output's."""
    file = farm.expression(f'shell "{name}" "echo {name} > $out"')
    command = ["nix-instantiate", str(file), "--store", str(farm.eval_store), "--option", "substituters", ""]
    drv = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    done = nix_store(farm.eval_store, "--realise", drv, options={"sandbox-paths": "/bin/sh=/bin/busybox"})
    assert done.returncode == 0, done.stderr
    return drv, done.stdout.strip()


def test_limits_and_names_need_no_attribute_on_the_command_line(readme_farm: FarmUnderAttack) -> None:
    quiet = '(shell "x" "sleep 4; echo > $out") // { meta.maxSilent = 1; }'
    done = readme_farm.build_text(f"{{ loud = {quiet}; nested.inner = {quiet}; }}", "--json")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert [(root["attr"], root["state"]) for root in answer["roots"]] == [("loud", "failed")]
    assert "silen" in json.dumps(answer["failed_steps"])
    assert answer["left_out"] == ["nested"]
    assert "build them with -A nested" in done.stderr


def test_a_derivation_may_read_derivations_as_files(readme_farm: FarmUnderAttack, tmp_path: Path) -> None:
    text = """
        reads = let
          leaf = shell "leaf" "echo leaf > $out";
          mid = shell "mid" "read -r line < ${leaf}; echo $line > $out";
        in shell "reads" "read -r line < ${mid.drvPath}; echo $line > $out";
    """
    path = built(readme_farm, text)["reads"]["outputs"]["out"]
    assert readme_farm.fetch(tmp_path / "plain", path).returncode == 0
    assert "-mid" in (tmp_path / "plain" / path[1:]).read_text()


def test_a_built_path_is_an_input_where_the_farm_has_it_or_can_build_it(
    readme_farm: FarmUnderAttack, tmp_path: Path
) -> None:
    held = built(readme_farm, 'held = shell "held" "echo held > $out";', "--fetch")["held"]["outputs"]["out"]
    _, here = build_here(readme_farm, "here")
    text = "".join(
        f'{name} = shell "uses-{name}" "read -r line < ${{builtins.storePath {path}}}; echo got $line > $out";'
        for name, path in (("one", held), ("two", here))
    )
    roots = built(readme_farm, text)
    for name, line in (("one", "got held\n"), ("two", "got here\n")):
        path = roots[name]["outputs"]["out"]
        assert readme_farm.fetch(tmp_path / name, path).returncode == 0
        assert (tmp_path / name / path[1:]).read_text() == line


def test_a_built_path_that_nobody_can_build_is_named_with_what_to_do(readme_farm: FarmUnderAttack) -> None:
    drv, path = build_here(readme_farm, "orphan")
    assert nix_store(readme_farm.eval_store, "--delete", "--ignore-liveness", drv).returncode == 0
    done = readme_farm.build_text(f'shell "uses" "read -r line < ${{builtins.storePath {path}}}; echo $line > $out"')
    assert done.returncode not in {0, 1}
    assert f"drover cache push {path}" in done.stderr


def test_a_source_that_refers_to_a_built_path_needs_that_path_in_the_farm(readme_farm: FarmUnderAttack) -> None:
    _, path = build_here(readme_farm, "below-a-source")
    text = f"""
      let note = builtins.toFile "note" "stands on ${{builtins.storePath {path}}}";
      in shell "uses-note" "read -r line < ${{note}}; echo $line > $out"
    """
    done = readme_farm.build_text(text)
    assert done.returncode not in {0, 1}
    assert f"-note refers to {path}" in done.stderr
    assert f"drover cache push {path}" in done.stderr
    assert readme_farm.drover("cache", "push", "--store", readme_farm.eval_store, path).returncode == 0
    assert readme_farm.build_text(text).returncode == 0
