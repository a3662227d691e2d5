"""Settings of a worker become one command, and the farm's own options cannot be undone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workers.agent.settings import (
    FARM_OPTIONS,
    SETTINGS_VARIABLE,
    HostSpec,
    SettingsError,
    WorkerSettings,
    daemon_argv,
    inspect_host,
    load_settings,
    native_system,
    nix_options,
    offer,
)

LINUX = HostSpec(system="x86_64-linux", cores=8, busybox="/bin/busybox")
MAC = HostSpec(system="aarch64-darwin", cores=8, has_build_users=True)


def settings_of(**values: Any) -> WorkerSettings:
    return WorkerSettings(name="w", state_dir=Path("/state"), **values)


@pytest.mark.parametrize(
    ("machine", "kernel", "system"),
    [
        ("x86_64", "Linux", "x86_64-linux"),
        ("aarch64", "Linux", "aarch64-linux"),
        ("arm64", "Darwin", "aarch64-darwin"),
        ("x86_64", "Darwin", "x86_64-darwin"),
        ("i686", "Linux", "i686-linux"),
        ("AMD64", "Linux", "x86_64-linux"),
    ],
)
def test_a_machine_is_named_as_nix_names_it(machine: str, kernel: str, system: str) -> None:
    assert native_system(machine, kernel) == system


def test_an_unknown_kernel_is_said_in_one_sentence() -> None:
    with pytest.raises(SettingsError, match="does not run on windows"):
        native_system("x86_64", "Windows")


def test_on_linux_builds_are_sandboxed_with_a_static_shell_and_without_absent_build_users() -> None:
    options = nix_options(settings_of(), LINUX)
    assert options["sandbox"] == "true"
    assert options["sandbox-paths"] == "/bin/sh=/bin/busybox"
    assert options["build-users-group"] == ""
    assert options["sandbox-fallback"] == "false"
    assert options["substituters"] == options["builders"] == ""


def test_on_macos_the_sandbox_is_as_the_machine_has_it() -> None:
    options = nix_options(settings_of(), MAC)
    assert options.keys().isdisjoint({"sandbox", "sandbox-paths", "build-users-group"})


def test_sandbox_paths_that_the_machine_configures_are_left_alone() -> None:
    machine = HostSpec(system="x86_64-linux", cores=1, busybox="/bin/busybox", configures_sandbox_paths=True)
    assert "sandbox-paths" not in nix_options(settings_of(), machine)


def test_an_option_of_the_operator_wins_over_what_was_found() -> None:
    settings = settings_of(nix_options={"sandbox-paths": "/bin/sh=/my/sh", "sandbox": "relaxed", "cores": "3"})
    options = nix_options(settings, LINUX)
    assert (options["sandbox-paths"], options["sandbox"], options["cores"]) == ("/bin/sh=/my/sh", "relaxed", "3")


@pytest.mark.parametrize("name", sorted(FARM_OPTIONS))
def test_an_option_that_the_farm_decides_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="decided by the farm"):
        settings_of(nix_options={name: "x"})


def test_systems_and_features_follow_from_the_settings() -> None:
    settings = settings_of(emulate=("aarch64-darwin",), features=("gpu",), mandatory_features=("signing",), slots=3)
    offered = offer(settings, LINUX)
    assert offered.systems == ("aarch64-darwin",)
    assert offered.emulated == ("aarch64-darwin",)
    assert offered.features == ("benchmark", "big-parallel", "gpu", "nixos-test", "signing")
    assert offered.mandatory_features == ("signing",)
    assert (offered.slots, offered.build_cores) == (3, 2)
    options = nix_options(settings, LINUX)
    assert options["extra-platforms"] == "aarch64-darwin"
    assert options["system-features"] == "benchmark big-parallel gpu nixos-test signing"


def test_a_machine_that_is_one_of_its_emulated_systems_does_not_emulate_it() -> None:
    assert offer(settings_of(emulate=("x86_64-linux",)), LINUX).emulated == ()


def test_an_emulating_worker_offers_what_the_machine_is_only_where_that_is_said() -> None:
    both = offer(settings_of(emulate=("aarch64-darwin",), systems=("x86_64-linux",)), LINUX)
    assert both.systems == ("aarch64-darwin", "x86_64-linux")
    assert both.emulated == ("aarch64-darwin",)


def test_a_worker_offers_what_its_nix_builds_for_unless_the_operator_names_systems() -> None:
    machine = replace(LINUX, extra_systems=("i686-linux", "aarch64-linux"), configured_systems=("aarch64-linux",))
    offered = offer(settings_of(), machine)
    assert offered.systems == ("aarch64-linux", "i686-linux", "x86_64-linux")
    assert offered.emulated == ("aarch64-linux",), "nix.conf adds what Nix itself does not run: an emulator does"
    assert nix_options(settings_of(), machine)["extra-platforms"] == "aarch64-linux i686-linux"
    named = offer(settings_of(systems=("x86_64-linux",)), machine)
    assert (named.systems, named.emulated) == (("x86_64-linux",), ())
    assert offer(settings_of(emulate=("aarch64-darwin",)), machine).systems == ("aarch64-darwin",)


def test_this_machines_nix_says_what_else_it_builds_for() -> None:
    assert "i686-linux" in inspect_host().extra_systems
    assert inspect_host().configured_systems == ()
    assert inspect_host("/no/such/nix-daemon").extra_systems == ()


def test_slots_default_to_the_cores_and_default_features_can_be_left_out() -> None:
    offered = offer(settings_of(default_features=False), LINUX)
    assert (offered.slots, offered.build_cores, offered.features) == (8, 1, ())


def test_the_command_names_the_store_and_every_option() -> None:
    argv = daemon_argv(settings_of(store="/chroot"), LINUX)
    assert argv[:4] == ("nix-daemon", "--stdio", "--store", "/chroot")
    pairs = {(argv[at + 1], argv[at + 2]) for at, word in enumerate(argv) if word == "--option"}
    assert pairs == set(nix_options(settings_of(store="/chroot"), LINUX).items())
    assert "--store" not in daemon_argv(settings_of(), LINUX)


def test_only_a_static_busybox_serves_as_the_shell_of_a_sandbox() -> None:
    from workers.agent.settings import _is_static_elf  # noqa: PLC0415 - the rule behind inspect_host

    assert not _is_static_elf(Path(shutil.which("env") or "/usr/bin/env"))
    assert not _is_static_elf(Path(__file__))
    machine = inspect_host()
    assert not machine.busybox or _is_static_elf(Path(machine.busybox))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not JSON"),
        ("[]", "settings"),
        ('{"name": "w"}', "state_dir"),
        ('{"name": "w", "state_dir": "/s", "colour": 1}', "colour"),
        ('{"name": "../w", "state_dir": "/s"}', "name"),
        ('{"name": "w", "state_dir": "/s", "store": "relative"}', "absolute"),
    ],
)
def test_settings_that_cannot_be_used_are_named_in_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "worker.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match=sentence) as caught:
        load_settings(path)
    assert "\n" not in str(caught.value)


def test_the_environment_names_the_settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTINGS_VARIABLE, raising=False)
    with pytest.raises(SettingsError, match=SETTINGS_VARIABLE):
        load_settings()
    path = tmp_path / "worker.json"
    monkeypatch.setenv(SETTINGS_VARIABLE, str(path))
    with pytest.raises(SettingsError, match="cannot read"):
        load_settings()
    path.write_text(json.dumps(settings_of(nix_options={"cores": "2"}).model_dump(mode="json")))
    assert load_settings() == settings_of(nix_options={"cores": "2"})
