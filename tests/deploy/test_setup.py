"""What machines run to set themselves up: the scripts as they are, with stand-ins for a cloud, apt and systemd.

Machines that boot with real ones are those of test_user_data.py.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Final

import pytest

from tests.deploy.schemas import MODULES as TERRAFORM
from tests.deploy.tools import tools
from tests.support.units import DEPLOY, command

TOKEN: Final = "t" * 64


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
        self.pack()
        #: There where services run already.
        self.running = root / "running"
        self.stand_in(
            "systemctl", f'case "$*" in -q*) exec test -e {self.running} ;; esac\necho "systemctl $*" >> "$CALLS"'
        )
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

    def pack(self) -> None:
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(self.root.parent / "run", "drover-1/run")
            archive.add(DEPLOY / "systemd", "drover-1/infra/deploy/systemd")

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


def test_a_second_run_changes_nothing_and_another_version_waits_for_builds(machine: Machine) -> None:
    machine.secret.write_text(TOKEN)
    worker = {"ROLE": "worker", "GRACE_S": "90"}
    assert machine.set_up(**worker).returncode == 0
    machine.running.touch()
    machine.calls.unlink()
    assert machine.set_up(**worker).returncode == 0
    assert machine.called() == ["./run setup", "systemctl daemon-reload", "systemctl enable --now drover-worker"]
    machine.calls.unlink()
    kept = machine.file("opt/drover/.venv/kept")
    kept.parent.mkdir()
    kept.touch()
    (machine.root.parent / "run").write_text('#!/bin/sh\necho "./run newer $*" >> "$CALLS"\n')
    machine.pack()
    assert machine.set_up(**worker).returncode == 0
    assert machine.called()[:2] == ["systemctl stop drover-worker", "./run newer setup"]
    assert kept.exists()
    assert {path.name for path in machine.file("opt").iterdir()} == {"drover"}
    # Another setting is another start.
    machine.calls.unlink()
    assert machine.set_up(**worker, OPTIONS="--slots 9").returncode == 0
    assert machine.called()[:2] == ["./run newer setup", "systemctl stop drover-worker"]


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
        ({"ROLE": "mac"}, "ROLE is mac, neither coordinator nor head nor worker"),
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
