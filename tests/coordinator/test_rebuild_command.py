"""`drover rebuild --dry-run` on a farm without workers: whatever is compared, nothing is built and causes are named."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from tests.support.farm import BIN
from tests.support.package_set import ROOT, PackageSet

from .conftest import OpenedFarm, OpenFarm

FLAKE = """{{
  outputs = {{ self }}: {{
    checks.x86_64-linux.a = derivation {{ name = "a"; system = "x86_64-linux"; builder = "/bin/sh"; text = "{text}"; }};
  }};
}}
"""


async def foreseen(farm: OpenedFarm, *arguments: str | Path) -> dict[str, Any]:
    """Run the command and return its report."""
    words = [*map(str, arguments), "--store", str(farm.root / "client"), "--dry-run", "--json"]
    child = await asyncio.create_subprocess_exec(
        BIN / "drover",
        "rebuild",
        *words,
        env={
            **os.environ,
            "DROVER_URL": farm.coordinator.ready.url,
            "DROVER_TOKEN_FILE": str(farm.coordinator.ready.token_file),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, errors = await child.communicate()
    assert child.returncode == 0, errors.decode()
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


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
