"""Terraform as tests run it: with providers that have the schemas of the real ones, served by one process."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.deploy.schemas import FOLDER, MODULES, PROVIDERS
from tests.deploy.tools import tools

HERE: Final = Path(__file__).parent
END_WITHIN_S: Final = 10.0


@contextmanager
def providers() -> Iterator[dict[str, str]]:
    """Serve the providers meanwhile, and yield the environment of Terraform."""
    wanted = [
        {"source": one.source, "schema": str(FOLDER / f"{name}.json"), "configuration": one.configuration}
        for name, one in PROVIDERS.items()
    ]
    environment = {
        **os.environ, "TF_CLI_CONFIG_FILE": os.devnull, "CHECKPOINT_DISABLE": "1",
        "DEPLOY_PYTHON": str(tools() / "python"),
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, HERE / "provider.py", json.dumps(wanted)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield {**environment, "TF_REATTACH_PROVIDERS": process.stdout.readline().strip()}
        finally:
            process.stdin.close()
            process.wait(END_WITHIN_S)


def terraform(environment: Mapping[str, str], folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Terraform in a directory."""
    return subprocess.run(
        ["terraform", f"-chdir={folder}", *words], env=environment, capture_output=True, text=True, check=False
    )


def copied(to: Path) -> Path:
    """Return the modules, and the chart that one of them uses, in a directory where Terraform may write."""
    subprocess.run(["cp", "-r", MODULES, to / "terraform"], check=True)
    charts = Path("infra/deploy/kubernetes")
    (to / charts).parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", MODULES.parent / charts, to / charts], check=True)
    return to / "terraform"


def planned(environment: Mapping[str, str], module: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what the runs of a module's tests plan or make: by run the resources, by address."""
    ran = terraform(environment, module, "test", "-no-color", "-json", "-verbose")
    assert ran.returncode == 0, ran.stdout
    found = {}
    for line in map(json.loads, ran.stdout.splitlines()):
        if line["type"] == "test_state":
            resources = line["test_state"]["root_module"]["resources"]
            found[line["@testrun"]] = {one["address"]: one["values"] for one in resources}
        elif line["type"] == "test_plan":
            changes = line["test_plan"].get("resource_changes", [])
            found[line["@testrun"]] = {one["address"]: one["change"]["after"] for one in changes}
    return found


def plain_user_data(values: Mapping[str, Any]) -> str:
    """Return user data as cloud-init has it."""
    text = values.get("user_data") or values["user_data_base64"]
    return str(text) if text.startswith("#!") else gzip.decompress(base64.b64decode(text)).decode()
