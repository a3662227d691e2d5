"""Canaries: the meaning of each finding, and the findings of real canaries."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from infra.daemon import DaemonConnection, open_stdio
from workers.agent.canary import SECRET_VARIABLE, Canary, CanaryError
from workers.wire.grades import CanaryReport, grade

#: What a sound worker's canary says.
SOUND = CanaryReport(
    uid=1000,
    gid=100,
    uid_map=("1000 30001 1",),
    host_uid=30001,
    agent_uid=0,
    interfaces=("lo",),
    fixed_interfaces=("lo", "eth0"),
    root=("bin", "build", "dev", "etc", "nix", "proc", "tmp"),
    host_name="localhost",
    processes=1,
    devices=("full", "null", "ptmx", "zero"),
    makes_setuid=False,
)
#: What one says that has no sandbox at all and runs as an ordinary user.
NO_SANDBOX: dict[str, Any] = {
    "host_uid": 1000, "agent_uid": 1000, "host_uid_shared": True, "interfaces": ("lo", "eth0"),
    "fixed_interfaces": ("lo", "eth0"), "sees_host_sockets": True, "fixed_sees_host_sockets": True,
    "fixed_reaches_loopback": True, "root": ("bin", "home"), "sees_host_files": True, "reads_secrets": True,
    "reads_agent": True, "changes_inputs": True, "reaches_store": True, "host_name": "mine", "shows_host_name": True,
    "processes": 240, "devices": ("null", "sda"), "makes_setuid": True,
}  # fmt: skip


def test_a_sandbox_that_shows_nothing_to_change_is_class_a() -> None:
    found = grade(SOUND)
    assert (found.level, found.reasons, found.remedy) == ("A", (), "")


@pytest.mark.parametrize(
    ("finding", "reason"),
    [
        ({"host_uid": 0}, "builders run as the host's root"),
        ({"host_uid": None, "uid_map": ("1000 0 1",)}, "builders run as the host's root"),
        ({"host_uid": None}, "the user that builders run as cannot be seen"),
        ({"host_uid": 1000, "agent_uid": 1000}, "builders run as the worker's own user (1000)"),
        ({"host_uid_shared": True}, "other processes run as the builders' user (30001)"),
        ({"changes_inputs": True}, "builds can change their inputs in the worker's store"),
        ({"reaches_store": True}, "builds can put files into the worker's store"),
        ({"writable": ("/bin/sh", "/etc/passwd")}, "builds can write /bin/sh, /etc/passwd"),
        ({"reads_secrets": True}, "builds can read the worker's own secrets"),
        ({"reads_agent": True}, "builds can read the worker's own secrets"),
        ({"sees_host_files": True}, "builds see the machine's files"),
        ({"interfaces": ("lo", "eth0")}, "builds have the machine's network"),
        ({"sees_host_sockets": True}, "builds have the machine's network"),
        ({"fixed_reaches_loopback": True}, "fixed-output builds reach what listens on the worker's loopback"),
        ({"fixed_sees_host_sockets": True}, "fixed-output builds reach what listens on the worker's loopback"),
        ({"processes": 99}, "builds see the machine's processes"),
        ({"shows_host_name": True}, "builds see the machine's name"),
        ({"devices": ("null", "sda", "mem")}, "builds see the devices mem, sda"),
        ({"makes_setuid": True}, "builds can make setuid programs"),
        ({"shows_environment": True}, "builds see the worker's environment"),
        ({"clock_differs": True}, "builds have another clock than the worker"),
    ],
)
def test_each_weakness_alone_makes_class_c_and_says_its_sentence(finding: dict[str, Any], reason: str) -> None:
    found = grade(SOUND.model_copy(update=finding))
    assert (found.level, found.reasons) == ("C", (reason,))
    assert found.remedy


def test_no_sandbox_is_said_once_and_not_as_everything_that_follows_from_it() -> None:
    found = grade(SOUND.model_copy(update=NO_SANDBOX))
    assert found.level == "C"
    assert found.reasons[0] == "builds run outside Nix's sandbox (`sandbox = false`, as Debian's nix.conf has it)"
    assert found.remedy == "set `sandbox = true` in the nix.conf of the worker's Nix"
    assert not any("processes" in reason or "name" in reason for reason in found.reasons)


def test_the_sandbox_of_macos_is_class_b_and_none_there_is_class_c() -> None:
    mac = CanaryReport(kernel="darwin", uid=301, agent_uid=501)
    assert grade(mac).level == "B"
    open_mac = grade(mac.model_copy(update={"sees_host_files": True, "reads_secrets": True}))
    assert open_mac.level == "C"
    assert "outside Nix's sandbox" in open_mac.reasons[0]


@asynccontextmanager
async def _daemon(
    root: Path, options: dict[str, str], *, chroot: bool
) -> AsyncIterator[tuple[Canary, DaemonConnection]]:
    """A daemon and the canary for it; without `chroot` the store's paths are where they say they are."""
    store_dir = "/nix/store" if chroot else str(root / "nix/store")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(root), "NIX_STORE_DIR": store_dir, "NIX_CONF_DIR": str(root / "conf"),
        **({} if chroot else {"NIX_STATE_DIR": str(root / "nix/var"), "NIX_LOG_DIR": str(root / "nix/log")}),
    }  # fmt: skip
    settings = {
        "substituters": "", "build-users-group": "", "sandbox": "true", "sandbox-paths": "/bin/sh=/bin/busybox",
        "extra-platforms": "aarch64-darwin", **options,
    }  # fmt: skip
    command = ["nix-daemon", "--stdio", *(["--store", str(root)] if chroot else [])]
    command += [word for name, value in settings.items() for word in ("--option", name, value)]
    (root / "state").mkdir()
    canary = Canary("aarch64-darwin", store_dir, root / "nix/store", root / "state")
    async with await open_stdio(command, environment) as connection:
        yield canary, connection


async def test_a_real_canary_sees_its_sandbox_from_inside_and_out(root: Path) -> None:
    async with _daemon(root, {}, chroot=True) as (canary, connection):
        report = await canary.measure(connection)
        again = await canary.measure(connection)
    assert again == report, "what did not change is the same report"
    assert (report.uid, report.uid_map, report.host_uid) == (1000, (f"1000 {os.geteuid()} 1",), os.geteuid())
    assert (report.interfaces, report.processes, report.host_name) == (("lo",), 1, "localhost")
    assert not report.outside_sandbox
    assert not report.sees_host_files
    assert not report.reaches_store
    assert not report.reads_secrets
    assert not report.shows_environment
    assert report.makes_setuid is False
    # A daemon without build users, as root: this is what the farm must not be.
    assert report.fixed_reaches_loopback
    assert report.changes_inputs
    assert "/etc/passwd" in report.writable
    found = grade(report)
    assert found.level == "C"
    assert found.reasons[0] == "builders run as the host's root"


async def test_a_daemon_without_a_sandbox_is_noticed_whatever_said_so(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "secret")
    (root / "conf").mkdir()
    # As Debian ships it, and as it holds where a worker may not overrule it.
    (root / "conf/nix.conf").write_text("sandbox = false\n")
    async with _daemon(root, {"sandbox": "false"}, chroot=False) as (canary, connection):
        report = await canary.measure(connection)
    assert report.outside_sandbox
    assert report.sees_host_files
    assert report.reaches_store
    assert report.reads_secrets
    assert report.fixed_sees_host_sockets
    assert report.host_uid == os.geteuid()
    assert not report.shows_environment
    assert not list((root / "nix/store").glob("*-drover-canary-probe")), "what the canary left is taken away"
    assert not list((root / "state").iterdir())
    assert "outside Nix's sandbox" in grade(report).reasons[0]


async def test_a_canary_is_held_until_it_was_looked_for_however_slow_its_reader(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed_data, to_thread = asyncio.StreamReader.feed_data, asyncio.to_thread

    def feed_late(reader: asyncio.StreamReader, data: bytes) -> None:
        # The pipe is full each time: the reader takes the most that it ever does.
        time.sleep(0.01)
        feed_data(reader, data)

    async def look_late(function: Callable[..., object], *arguments: object) -> object:
        await asyncio.sleep(0.5)
        return await to_thread(function, *arguments)

    monkeypatch.setattr(asyncio.StreamReader, "feed_data", feed_late)
    monkeypatch.setattr(asyncio, "to_thread", look_late)
    async with _daemon(root, {}, chroot=True) as (canary, connection):
        report = await canary.measure(connection)
    assert report.host_uid == os.geteuid()


async def test_a_canary_that_cannot_be_built_says_why(root: Path) -> None:
    async with _daemon(root, {"sandbox-paths": ""}, chroot=True) as (canary, connection):
        with pytest.raises(CanaryError, match="/bin/sh"):
            await canary.measure(connection)
