"""Services of systemd, launchd, NixOS and nix-darwin: hardened, of one mind, and only with settings that drover has."""

from __future__ import annotations

import json
import os
import plistlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from coordinator.cli import farm_commands, serve
from coordinator.config import Settings, load_settings
from tests.architecture.deploy_schemas import schema
from tests.support.units import DEPLOY, PROGRAM, command, service

HERE = Path(__file__).parent
SERVERS = ("drover-head", "drover-coordinator")
WORKER = {"HEAD": "10.0.0.5:6379", "ADDRESS": "10.0.0.7", "NAME": "second", "WORKER_OPTIONS": "--slots 4"}
#: What covers a part of /proc, after which the kernel lets no sandbox mount a new one.
COVERS_PROC = {"ProtectKernelTunables", "ProtectKernelLogs", "ProtectProc", "ProcSubset"}


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the options of a command of drover, which refuses what it does not know."""
    commands: dict[str, click.Command] = {
        "up": farm_commands.up, "head": farm_commands.head, "worker": farm_commands.worker
    }  # fmt: skip
    return dict(commands[words[0]].make_context(words[0], words[1:]).params)


def exposure(name: str) -> float:
    """Return what systemd finds of a unit, from 0 (nothing is open) to 10."""
    file = DEPLOY / "systemd" / f"{name}.service"
    shown = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--json=off", file],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    match = re.search(r"Overall exposure level for .*: ([0-9.]+)", shown.stdout)
    assert match, shown.stderr
    return float(match[1])


def nix(module: str, services: str, *, fails: bool = False) -> Any:
    """Return what a module makes of `services.drover`, an expression; or the error of its evaluation."""
    expression = (
        f"import {HERE}/modules.nix {{ module = {DEPLOY}/nix/{module}.nix; "
        f"configuration.services.drover = {{ package = {json.dumps('/opt/drover/.venv')}; }} // {services}; }}"
    )
    ran = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", "--expr", expression],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode != 0) is fails, ran.stderr
    return ran.stderr if fails else json.loads(ran.stdout)


def test_servers_expose_next_to_nothing_and_a_worker_only_what_sandboxes_need() -> None:
    for name in SERVERS:
        assert exposure(name) < 3.0, name
    # It makes namespaces, mounts and users, which is most of what systemd counts.
    assert exposure("drover-worker") < 6.0
    assert COVERS_PROC.isdisjoint(service("drover-worker"))


def test_units_start_commands_that_drover_has() -> None:
    head = parsed(command("drover-head", {"HEAD": "127.0.0.1:6379"}))
    up = parsed(command("drover-coordinator", {}))
    assert up["no_workers"]
    assert up["config"] == head["config"] == Path("/etc/drover/farm.toml")
    worker = parsed(command("drover-worker", WORKER))
    assert (worker["head"], worker["host"], worker["name"], worker["slots"]) == (
        "10.0.0.5:6379",
        "10.0.0.7",
        "second",
        4,
    )
    # One directory of secrets for both, and none of a worker's.
    for name in SERVERS:
        assert "drover/secrets" in service(name)["StateDirectory"][0].split()
    assert "secrets" not in service("drover-worker")["StateDirectory"][0]


def test_a_worker_yields_to_others_unless_it_is_told_not_to() -> None:
    for words, yields in (([], True), (["--no-yield-to-others"], False)):
        options = parsed([*command("drover-worker", WORKER), *words])
        for gone in ("head", "ray_token", "host", "state_dir"):
            options.pop(gone)
        assert serve.worker_config({**options, "nix_options": {}}).yield_to_others is yields


def test_a_worker_that_is_stopped_has_longer_than_its_builds() -> None:
    unit = service("drover-worker")
    grace = dict(word.split("=") for word in unit["Environment"])["DROVER_STOP_GRACE_S"]
    assert int(unit["TimeoutStopSec"][0]) > int(grace)
    plist = plistlib.loads((DEPLOY / "launchd" / "org.drover.worker.plist").read_bytes())
    assert plist["ExitTimeOut"] > int(plist["EnvironmentVariables"]["DROVER_STOP_GRACE_S"])


def test_the_example_of_a_settings_file_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    text = (DEPLOY / "farm.toml").read_text()
    settings = load_settings(DEPLOY / "farm.toml")
    assert settings.ray_address == command("drover-head", {"HEAD": service("drover-head")["Environment"][0][5:]})[-1]
    # And so it is with the lines for which one only has to take the sign of a comment away.
    grown = tmp_path / "farm.toml"
    grown.write_text(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE))
    assert load_settings(grown).object_store_url.startswith("s3://")


def test_a_mac_starts_the_command_that_linux_starts(tmp_path: Path) -> None:
    script = DEPLOY / "launchd" / "worker.sh"
    plist = plistlib.loads((DEPLOY / "launchd" / "org.drover.worker.plist").read_bytes())
    assert plist["ProgramArguments"] == [f"/opt/drover/infra/deploy/launchd/{script.name}"]
    assert plist["RunAtLoad"]
    assert plist["KeepAlive"]
    shown = tmp_path / "drover"
    shown.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    shown.chmod(0o755)

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DROVER": str(shown), "ETC": str(tmp_path)}
        return subprocess.run([script], env=environment, capture_output=True, text=True, check=False)

    assert "worker.env is missing" in run().stderr
    env = tmp_path / "worker.env"
    env.write_text("HEAD=10.0.0.5:6379\nADDRESS=10.0.0.7\n")
    assert (run().returncode, run().stderr) == (2, f"drover worker: {env} does not set NAME\n")
    env.write_text("".join(f'{name}="{value}"\n' for name, value in WORKER.items()))
    assert run().stdout.splitlines() == command(
        "drover-worker", {**WORKER, "/etc/drover/ray-token": tmp_path / "ray-token"}
    )
    # The example has the names that are read.
    assert re.findall(r"^(\w+)=", (DEPLOY / "worker.env").read_text(), re.MULTILINE) == list(WORKER)


ALL = """{
  coordinator.enable = true;
  coordinator.openFirewall = true;
  head.enable = true;
  worker = { enable = true; head = "10.0.0.5:6379"; host = "10.0.0.7"; name = "second"; slots = 4; features = [ "big" ];
    emulate = [ "aarch64-darwin" ]; network = false; store = "/w"; nixOptions.sandbox-paths = "/a b"; };
  settings = {
    port = 80;
    limits = { graph_size = 5; failure_ttl_s = 1.5; };
    cache.upstreams = [ { url = "https://cache.example.org"; public_keys = [ "k:1" ]; } ];
    caches = [ { name = "team1"; readers = [ "env:READERS" ]; } ];
    owners = [ { name = "ci"; tokens = [ "env:CI" ]; } ];
  };
}"""


def test_nixos_runs_the_same_services_as_plain_systemd() -> None:
    made = nix("nixos", ALL)
    assert made["failed"] == []
    assert made["ports"] == [80]
    assert made["services"].keys() == {"drover-head", "drover-coordinator", "drover-worker"}
    for name, unit in made["services"].items():
        here = {key: value if isinstance(value, list) else [str(value)] for key, value in unit["serviceConfig"].items()}
        plain = service(name)
        own = {"ExecStart", "Environment", "EnvironmentFile"}
        assert {k: v for k, v in here.items() if k not in own} == {k: v for k, v in plain.items() if k not in own}, name
        program, *words = shlex.split(here["ExecStart"][0])
        assert program == "/opt/drover/.venv/bin/drover" == PROGRAM
        assert parsed(words)
    # What the program makes of the settings, and of a worker's command line.
    settings = Settings(**made["settings"])
    assert (settings.port, settings.limits.graph_size, settings.caches[0].readers) == (80, 5, ("env:READERS",))
    assert (settings.ray_address, str(settings.secrets)) == ("127.0.0.1:6379", "/var/lib/drover/secrets")
    words = shlex.split(made["services"]["drover-worker"]["serviceConfig"]["ExecStart"])[1:]
    options = parsed(words)
    for gone in ("head", "ray_token", "host", "state_dir"):
        options.pop(gone)
    config = serve.worker_config({**options, "nix_options": dict(options["nix_options"])})
    assert (config.features, config.emulate, config.network, config.store) == (
        ("big",),
        ("aarch64-darwin",),
        False,
        "/w",
    )
    assert config.nix_options == {"sandbox-paths": "/a b"}


def test_nix_darwin_runs_the_worker_that_the_plist_runs() -> None:
    worker = '{ worker = { enable = true; head = "10.0.0.5:6379"; host = "10.0.0.7"; name = "second"; }; }'
    made = nix("darwin", worker)["daemons"]["drover-worker"]["serviceConfig"]
    plain = plistlib.loads((DEPLOY / "launchd" / "org.drover.worker.plist").read_bytes())
    assert {k: v for k, v in made.items() if k != "ProgramArguments"} == {
        k: v for k, v in plain.items() if k != "ProgramArguments"
    }
    assert parsed(made["ProgramArguments"][1:])["name"] == "second"


def test_every_setting_is_an_option_of_nixos_with_its_bounds() -> None:
    whole = schema()
    assert whole["properties"].keys() == Settings.model_fields.keys()
    known = " ".join(f"{name} = null;" for name in whole["properties"])
    assert nix("nixos", f"{{ settings = {{ {known} }}; }}")["settings"] == {}
    for setting, why in (
        ("prot = 1", "`services.drover.settings.prot' does not exist"),
        ("limits.graph_sise = 1", "`services.drover.settings.limits.graph_sise' does not exist"),
        ("port = 70000", "`services.drover.settings.port' is not of type"),
        ('cache.compression = "lzma"', "`services.drover.settings.cache.compression' is not of type"),
        ('cache.upstreams = [ { url = "https://a"; } ]', "`services.drover.settings.cache.upstreams.*.public_keys'"),
    ):
        assert why in nix("nixos", f"{{ coordinator.enable = true; settings.{setting}; }}", fails=True)


def joins(head: str, name: str, more: str = "") -> str:
    return f'{{ worker = {{ enable = true; head = "{head}"; host = "b"; name = "{name}"; {more} }}; }}'


@pytest.mark.parametrize(
    ("module", "services", "says"),
    [
        ("nixos", "{ coordinator.enable = true; }", "services.drover.settings.ray_address is not set"),
        (
            "nixos",
            '{ coordinator.enable = true; head.enable = true; settings.workers = [ { name = "a"; } ]; }',
            "use services.drover.worker",
        ),
        ("nixos", joins("a:1", "c", 'rayTokenFile = "/nix/store/x-token";'), "Nix store, where everybody can read it"),
        ("nixos", joins("a", "c"), "it wants HOST:PORT"),
        ("darwin", joins("a:1", "c d"), "it wants 1 to 63 letters"),
        ("darwin", joins("a:1", "c", 'store = "/x";'), "cannot build on macOS"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_switched(module: str, services: str, says: str) -> None:
    (failed,) = nix(module, services)["failed"]
    assert says in failed
