"""The Terraform modules: valid, planned with a mocked provider, scanned, and the set-up of machines run for real.

No account of a cloud is to be had here. The provider has the real one's schema and nothing else (`provider.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.deploy import aws_schema
from tests.deploy.tools import tools
from tests.support.units import DEPLOY, command

TERRAFORM: Final = aws_schema.MODULES
HERE: Final = Path(__file__).parent
#: The release of the provider that the schema comes from.
VERSION: Final = "6.69.1"
TOKEN: Final = "t" * 64


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of Terraform, with a directory in the place of the registry."""
    root = tmp_path_factory.mktemp("terraform")
    place = root / "mirror" / "registry.terraform.io" / "hashicorp" / "aws" / VERSION / "linux_amd64"
    place.mkdir(parents=True)
    program = place / f"terraform-provider-aws_v{VERSION}"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {HERE / 'provider.py'}\n")
    program.chmod(0o755)
    (root / "rc").write_text(
        f'provider_installation {{\n  filesystem_mirror {{\n    path = "{root}/mirror"\n  }}\n}}\n'
    )
    return {
        **os.environ, "TF_CLI_CONFIG_FILE": str(root / "rc"), "TF_DATA_DIR": str(root / "data"),
        "CHECKPOINT_DISABLE": "1", "DEPLOY_PYTHON": str(tools() / "python"), "DEPLOY_SCHEMA": str(aws_schema.FILE),
    }  # fmt: skip


def terraform(environment: Mapping[str, str], folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["terraform", f"-chdir={folder}", *words], env=environment, capture_output=True, text=True, check=False
    )


def copied(folder: str, to: Path) -> Path:
    """The modules in a directory where Terraform may write."""
    subprocess.run(["cp", "-r", TERRAFORM, to / "terraform"], check=True)
    return to / "terraform" / folder


def test_terraform_is_here_and_the_files_are_laid_out_as_it_lays_them_out(environment: dict[str, str]) -> None:
    ran = terraform(environment, TERRAFORM, "fmt", "-recursive", "-check", "-diff")
    assert (ran.returncode, ran.stdout) == (0, "")


def test_the_schema_has_what_the_modules_use() -> None:
    known = json.loads(aws_schema.FILE.read_text())
    used = {kind: [f"aws_{name}" for name in names] for kind, names in aws_schema.used_types().items()}
    assert {kind: sorted(types) for kind, types in known.items()} == used, aws_schema.__doc__


def test_the_example_of_a_whole_farm_is_valid_and_a_misspelt_argument_is_not(
    environment: dict[str, str], tmp_path: Path
) -> None:
    example = copied("examples/aws", tmp_path)
    made = terraform(environment, example, "init", "-no-color", "-backend=false")
    assert made.returncode == 0, made.stderr
    ran = terraform(environment, example, "validate", "-no-color")
    assert ran.returncode == 0, ran.stderr
    file = tmp_path / "terraform" / "aws" / "storage.tf"
    file.write_text(file.read_text().replace("storage_encrypted ", "storage_encrypt "))
    assert 'named "storage_encrypt" is not expected' in terraform(environment, example, "validate", "-no-color").stderr


def test_the_farm_is_planned_and_contradicting_variables_are_refused(
    environment: dict[str, str], tmp_path: Path
) -> None:
    module = copied("aws", tmp_path)
    made = terraform(environment, module, "init", "-no-color", "-backend=false")
    assert made.returncode == 0, made.stderr
    ran = terraform(environment, module, "test", "-no-color")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Bad input is one sentence each, with what to do.
    text = (module / "variables.tf").read_text()
    messages = re.findall(r'error_message = "(.*)"', text)
    assert len(messages) == text.count("validation {") > 15
    assert [one for one in messages if not one.endswith(".")] == []


def test_nothing_that_terraform_keeps_is_a_secret() -> None:
    text = "\n".join(path.read_text() for path in TERRAFORM.rglob("*.tf"))
    assert "manage_master_user_password = true" in text
    kept = r"aws_secretsmanager_secret_version|random_password|tls_private_key|^\s*password\s*="
    assert not re.search(kept, text, re.MULTILINE)


def test_a_scan_of_policies_finds_what_is_on_purpose() -> None:
    scanned = subprocess.run(
        [tools() / "trivy", "config", "--quiet", "--skip-check-update", "--format", "json", "--misconfig-scanners",
         "terraform", "--cache-dir", tools() / "cache", "--severity", "HIGH,CRITICAL", TERRAFORM / "aws"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {
        (fault["ID"], fault["CauseMetadata"]["Resource"])
        for result in json.loads(scanned.stdout)["Results"]
        for fault in result.get("Misconfigurations") or []
    }
    assert found == {
        # Fixed outputs are fetched from anywhere.
        ("aws-vpc-no-public-egress-sgr", "aws_security_group.farm"),
        # Keys of one's own for a bucket of public packages cost money with each object, and protect nothing more.
        ("AVD-AWS-0132", "aws_s3_bucket_server_side_encryption_configuration.cache"),
    }


def test_scripts_that_machines_run_are_sound() -> None:
    scripts = [TERRAFORM / "scripts" / "setup.sh", DEPLOY / "systemd" / "drain.sh", DEPLOY / "launchd" / "worker.sh"]
    ran = subprocess.run(
        [tools() / "shellcheck", "--shell=sh", "--severity=style", "--exclude=SC1091,SC2153,SC2154", *scripts],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.stdout == ""


class Machine:
    """A fresh machine below a directory: its tools are real, but for a cloud's, a package manager and systemd."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root / "root", root / "bin"
        self.calls = root / "calls"
        self.secret = root / "secret"
        self.metadata = root / "metadata"
        self.bin.mkdir()
        self.root.mkdir()
        self.archive = root / "drover.tar.gz"
        (root / "run").write_text('#!/bin/sh\necho "./run $*" >> "$CALLS"\n')
        (root / "run").chmod(0o755)
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(root / "run", "drover-1/run")
            archive.add(DEPLOY / "systemd", "drover-1/infra/deploy/systemd")
        self.stand_in("systemctl", 'echo "systemctl $*" >> "$CALLS"')
        self.stand_in("useradd", 'echo "useradd $*" >> "$CALLS"')
        self.stand_in("chown", 'echo "chown $*" >> "$CALLS"')
        self.stand_in("sleep", 'echo "sleep $*" >> "$CALLS"')
        self.stand_in(
            "aws",
            'case "$2 $4" in\n'
            '  "get-secret-value farm/database") echo \'{"username": "drover", "password": "a/b%c"}\' ;;\n'
            '  get-secret-value*) cat "$SECRET" ;;\n'
            '  put-secret-value*) cat > "$SECRET" ;;\nesac',
        )
        self.stand_in(
            "curl",
            'for last; do :; done\ncase "$last" in\n'
            f'  https://*) while [ "$1" != -o ]; do shift; done; cp {self.archive} "$2" ;;\n'
            "  */api/token) echo token ;;\n"
            "  */instance-id) echo i-0123 ;;\n  */local-ipv4) echo 10.77.0.21 ;;\n"
            f'  *) cat "{self.metadata}/$(basename "$last")" ;;\nesac',
        )

    def stand_in(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def run(self, script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "DROVER_ROOT": str(self.root), "CALLS": str(self.calls),
            "SECRET": str(self.secret), "TMPDIR": str(self.root.parent),
        }  # fmt: skip
        return subprocess.run(
            ["/bin/sh", script], env={**environment, **variables}, capture_output=True, text=True, check=False
        )

    def set_up(self, **variables: str) -> subprocess.CompletedProcess[str]:
        given = {
            "SOURCE_URL": "https://example.org/drover.tar.gz", "HEAD": "10.77.0.10:6379",
            "TOKEN_SECRET": "farm/ray-token",
            "SOURCE_SHA256": hashlib.sha256(self.archive.read_bytes()).hexdigest(),
        }  # fmt: skip
        return self.run(TERRAFORM / "scripts" / "setup.sh", **{**given, **variables})

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def file(self, path: str) -> Path:
        return self.root / path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_fresh_machine_becomes_a_worker(machine: Machine) -> None:
    machine.secret.write_text(TOKEN)
    ran = machine.set_up(ROLE="worker", GRACE_S="90", WATCH="yes", OPTIONS="--slots 4 --feature big-parallel")
    assert ran.returncode == 0, ran.stderr
    assert machine.called() == [
        "./run setup", "systemctl daemon-reload",
        "systemctl enable --now drover-worker", "systemctl enable --now drover-drain",
    ]  # fmt: skip
    token = machine.file("etc/drover/ray-token")
    assert (token.read_text().strip(), token.stat().st_mode & 0o777) == (TOKEN, 0o400)
    lines = machine.file("etc/drover/worker.env").read_text().splitlines()
    values = {key: value.strip('"') for key, _, value in (line.partition("=") for line in lines)}
    assert values.pop("DROVER_STOP_GRACE_S") == "90"
    # What the unit that it enabled starts with these variables.
    unit = machine.file("etc/systemd/system/drover-worker.service")
    assert unit.read_text() == (DEPLOY / "systemd" / "drover-worker.service").read_text()
    words = command("drover-worker", values)
    assert words[words.index("--head") + 1] == "10.77.0.10:6379"
    assert words[words.index("--host") + 1] == "10.77.0.21"
    assert words[words.index("--name") + 1] == "i-0123"
    assert words[-4:] == ["--slots", "4", "--feature", "big-parallel"]
    # The token is nowhere else.
    assert TOKEN not in ran.stderr + machine.file("etc/drover/worker.env").read_text()


def test_the_coordinator_makes_the_token_and_its_successor_takes_it(machine: Machine) -> None:
    settings = 'host = "0.0.0.0"\npublic_url = "http://10.77.0.10:7878"'
    more = {"ROLE": "coordinator", "FARM_TOML": settings}
    ran = machine.set_up(DATABASE="db.example.org/drover", DATABASE_SECRET="farm/database", **more)  # noqa: S106
    assert ran.returncode == 0, ran.stderr
    token = machine.file("var/lib/drover/secrets/ray-token")
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    assert machine.secret.read_text() == token.read_text()
    assert machine.file("etc/drover/farm.toml").read_text() == f"{settings}\n"
    env = machine.file("etc/drover/coordinator.env")
    assert env.stat().st_mode & 0o777 == 0o600
    assert (
        "DROVER_JOURNAL_DATABASE_URL=postgresql+psycopg://drover:a%2Fb%25c@db.example.org/drover\n" in env.read_text()
    )
    assert machine.called()[-2:] == [
        "systemctl enable --now drover-head", "systemctl enable --now drover-coordinator"
    ]  # fmt: skip
    # Another machine in its place.
    had = token.read_text()
    token.unlink()
    assert machine.set_up(**more).returncode == 0
    assert token.read_text() == had


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ROLE": ""}, "ROLE is not set"),
        ({"ROLE": "mac"}, "ROLE is mac, neither coordinator nor worker"),
        ({"ROLE": "worker", "GRACE_S": "90", "SOURCE_SHA256": "0" * 64}, "not " + "0" * 64),
        ({"ROLE": "worker", "GRACE_S": "90"}, "has no value after ten minutes; does the coordinator run?"),
    ],
)
def test_a_machine_that_cannot_be_set_up_says_why(machine: Machine, variables: dict[str, str], says: str) -> None:
    ran = machine.set_up(**variables)
    assert ran.returncode != 0
    assert says in ran.stderr.splitlines()[-1]
    assert "systemctl enable --now drover-worker" not in machine.called()


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("instance-action", "{}", "the spot machine is taken back"),
        ("target-lifecycle-state", "Terminated", "its group"),
    ],
)
def test_a_machine_that_is_to_go_stops_its_worker(machine: Machine, name: str, value: str, why: str) -> None:
    """It looks again and again until the metadata say so: here from the second look on."""
    machine.metadata.mkdir()
    machine.stand_in("sleep", f"echo '{value}' > {machine.metadata / name}")
    ran = machine.run(DEPLOY / "systemd" / "drain.sh")
    assert ran.returncode == 0, ran.stderr
    assert why in ran.stderr
    assert machine.called() == ["systemctl stop drover-worker"]
