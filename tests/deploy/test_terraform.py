"""The Terraform modules: valid, planned with mocked providers, scanned, and free of secrets.

No account of a cloud is to be had here. The providers have the real ones' schemas and nothing else (`provider.py`).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml  # type: ignore[import-untyped]

from tests.deploy import schemas
from tests.deploy.terraform import copied, planned, providers, terraform
from tests.deploy.tools import tools

TERRAFORM: Final = schemas.MODULES
MODULES: Final = ("aws", "hetzner", "kubernetes", "mac-fleet")


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with providers() as made:
        yield made


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules, with the files that the examples' readers make first."""
    to = copied(tmp_path_factory.mktemp("modules"))
    for example in ("hetzner", "mac-fleet"):
        (to / "examples" / example / "ray-token").write_text("t" * 64)
    (to / "examples" / "hetzner" / "bucket").write_text("AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n")
    return to


def initialised(environment: dict[str, str], folder: Path) -> Path:
    made = terraform(environment, folder, "init", "-no-color", "-backend=false")
    assert made.returncode == 0, made.stderr
    return folder


def test_terraform_is_here_and_the_files_are_laid_out_as_it_lays_them_out(environment: dict[str, str]) -> None:
    ran = terraform(environment, TERRAFORM, "fmt", "-recursive", "-check", "-diff")
    assert (ran.returncode, ran.stdout) == (0, "")


@pytest.mark.parametrize("provider", schemas.PROVIDERS)
def test_the_schemas_have_what_the_modules_use(provider: str) -> None:
    known = json.loads((schemas.FOLDER / f"{provider}.json").read_text())
    used = {kind: [f"{provider}_{one}" for one in names] for kind, names in schemas.used_types(provider).items()}
    assert {kind: sorted(types) for kind, types in known.items()} == used, schemas.__doc__


@pytest.mark.parametrize("module", MODULES)
def test_the_example_of_a_whole_farm_is_valid(environment: dict[str, str], modules: Path, module: str) -> None:
    ran = terraform(environment, initialised(environment, modules / "examples" / module), "validate", "-no-color")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("module", "file", "name"),
    [
        ("aws", "storage", "storage_encrypted "),
        ("hetzner", "main", "delete_protection "),
        ("kubernetes", "main", "chart "),
    ],
)
def test_a_misspelt_argument_is_found(
    environment: dict[str, str], tmp_path: Path, module: str, file: str, name: str
) -> None:
    folder = copied(tmp_path) / module
    path = folder / f"{file}.tf"
    path.write_text(path.read_text().replace(f" {name}", " mispelt "))
    said = terraform(environment, initialised(environment, folder), "validate", "-no-color").stderr
    assert 'named "mispelt" is not expected' in said


@pytest.mark.parametrize("module", MODULES)
def test_the_farm_is_planned_and_contradicting_variables_are_refused(
    environment: dict[str, str], modules: Path, module: str
) -> None:
    ran = terraform(environment, initialised(environment, modules / module), "test", "-no-color")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Bad input is one sentence each, with what to do.
    text = (modules / module / "variables.tf").read_text()
    messages = re.findall(r'error_message = "(.*)"', text)
    assert len(messages) == text.count("validation {") > 9
    assert [one for one in messages if not one.endswith(".")] == []


def test_the_chart_takes_what_the_module_gives_it(environment: dict[str, str], modules: Path, tmp_path: Path) -> None:
    folder = initialised(environment, modules / "kubernetes")
    runs = planned(environment, folder)
    for run, replicas in (("whole", 2), ("small", 1)):
        release = runs[run]["helm_release.farm"]
        (values,) = release["values"]
        (tmp_path / f"{run}.yaml").write_text(values)
        ran = subprocess.run(
            [tools() / "helm", "template", release["name"], folder / release["chart"], "--kube-version", "1.35.0",
             "--namespace", release["namespace"], "--values", tmp_path / f"{run}.yaml"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        (deployment,) = (one for one in yaml.safe_load_all(ran.stdout) if one["kind"] == "Deployment")
        assert deployment["spec"]["replicas"] == replicas


def test_nothing_that_terraform_keeps_is_a_secret() -> None:
    text = "\n".join(path.read_text() for path in TERRAFORM.rglob("*.tf"))
    assert "manage_master_user_password = true" in text
    kept = r"aws_secretsmanager_secret_version|random_password|tls_private_key|kubernetes_secret|^\s*password\s*="
    assert not re.search(kept, text, re.MULTILINE)


def test_a_scan_of_policies_finds_what_is_on_purpose() -> None:
    scanned = subprocess.run(
        [tools() / "trivy", "config", "--quiet", "--skip-check-update", "--format", "json", "--misconfig-scanners",
         "terraform", "--cache-dir", tools() / "cache", "--severity", "HIGH,CRITICAL", TERRAFORM],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {
        fault["ID"]
        for result in json.loads(scanned.stdout)["Results"]
        for fault in result.get("Misconfigurations") or []
    }
    assert found == {
        # Fixed outputs are fetched from anywhere.
        "aws-vpc-no-public-egress-sgr",
        # Keys of one's own for a bucket of public packages cost money with each object, and protect nothing more.
        "AVD-AWS-0132",
        # A front for clients in the internet stands there, with TLS.
        "AVD-AWS-0053",
    }
