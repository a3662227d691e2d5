"""What Nix takes, the farm takes: what people met who brought expressions that are a little unusual."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.attack import FarmUnderAttack

pytestmark = pytest.mark.e2e


def built(farm: FarmUnderAttack, text: str, *words: str) -> dict[str, Any]:
    """Build all of an attribute set; what each root became, by its name."""
    done = farm.build_text(text, "--json", *words)
    assert done.returncode == 0, done.stderr
    return {root["attr"]: root for root in json.loads(done.stdout.splitlines()[-1])["roots"]}


def test_a_deep_tree_and_a_large_derivation_are_built(readme_farm: FarmUnderAttack, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    place = deep
    for _ in range(1500):
        place.mkdir()
        place /= "d"
    text = f"""
        deep = derivation {{
          name = "deep"; system = "x86_64-linux"; builder = "/bin/sh"; src = {deep}; args = [ "-c" "echo $src > $out" ];
        }};
        large = derivation {{
          name = "large"; system = "x86_64-linux"; builder = "/bin/sh"; passAsFile = [ "big" ];
          big = builtins.concatStringsSep "\\n" (builtins.genList (n: "line ${{toString n}} \\"quoted\\" \\\\") 700000);
          args = [ "-c" "n=0; while read -r line; do n=$((n+1)); done < $bigPath; echo $n > $out" ];
        }};
    """
    roots = built(readme_farm, text)
    assert {name: root["state"] for name, root in roots.items()} == {"deep": "done", "large": "done"}
    assert readme_farm.fetch(tmp_path / "plain", roots["large"]["outputs"]["out"]).returncode == 0
    assert len(json.dumps(readme_farm.api(f"steps/{roots['large']['step']}"))) < 100_000
