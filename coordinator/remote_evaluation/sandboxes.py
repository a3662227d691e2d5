"""Sandboxes of this machine for programs of remote evaluation: what they see and may use, and as whom.

A program sees the system's programs and libraries, Python with this program's own packages, and what its job brings.
It sees nothing of the coordinator's state, of its secrets, of its environment or of other evaluations: those are not
mounted. `found` tries a sandbox once; where the machine refuses it, remote evaluation is off.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import coordinator
import infra
import workers
from coordinator.remote_evaluation.errors import RemoteOffError
from infra.sandbox import launcher, system_calls
from infra.sandbox.launcher import INNER_ID, Sandbox
from workers.agent.build_users import MACHINE_REGISTRY, NoBuildUsersError, account_ids, claim, own_ids

#: Where the program's own files are in the sandbox: its tree, its store, its home.
WORK: Final = "/work"
TREE: Final = f"{WORK}/tree"
STORE: Final = f"{WORK}/store"
HOME: Final = f"{WORK}/home"
#: The socket of the gateway, and the port on the sandbox's loopback that leads to it.
GATEWAY: Final = "/run/gateway"
GATEWAY_PORT: Final = 1080
#: Variables of every program in a sandbox, and no other.
ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": HOME,
    "TMPDIR": "/tmp",  # noqa: S108 - a place in the sandbox
    "LANG": "C.UTF-8",
    "NIX_CONF_DIR": "/etc/nix",
    "NIX_USER_CONF_FILES": "/etc/nix/none",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
}
#: Nix settings of evaluations. Nothing is built or substituted, and no setting of a tree counts.
NIX_SETTINGS: Final = {
    "accept-flake-config": "false",
    "allow-import-from-derivation": "false",
    "allow-unsafe-native-code-during-evaluation": "false",
    "allowed-uris": "",
    "build-users-group": "",
    "builders": "",
    "connect-timeout": "10",
    "download-attempts": "2",
    "experimental-features": "nix-command flakes",
    "flake-registry": "",
    "fsync-metadata": "false",
    "max-jobs": "0",
    "plugin-files": "",
    "restrict-eval": "true",
    "substituters": "",
}
_SYSTEM: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
#: What programs of the system need of /etc; none of it is secret.
_ETC: Final = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ssl/certs", "/etc/localtime")
_NIX_STORE: Final = "/nix/store"
_TRIAL_WITHIN_S: Final = 30.0
#: Processes and threads of one program: evaluators, git, and threads of each.
_PROCESSES: Final = 256
#: Memory that a collector reserves beside what it uses.
_RESERVED_BYTES: Final = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Bounds of one program. Sizes are bytes."""

    memory_bytes: int
    scratch_bytes: int
    scratch_files: int


class Sandboxes:
    """Sandboxes of this machine. Make it with `found`."""

    def __init__(self, limits: SandboxLimits, uids: Sequence[int], binds: tuple[tuple[str, str], ...]) -> None:
        self._limits = limits
        #: A user for each program that runs at one time; 0: this user, in a user namespace.
        self._uids = uids
        self._binds = binds

    @classmethod
    def found(cls, limits: SandboxLimits, at_once: int, state_dir: Path) -> Sandboxes:
        """Return the sandboxes of this machine; blocks. Raises `RemoteOffError` where it has none."""
        if sys.platform != "linux":
            raise RemoteOffError("remote evaluation is off: its sandbox is made of Linux's namespaces.")
        if not system_calls.supported():
            raise RemoteOffError("remote evaluation is off: system calls are known on x86-64 and AArch64 only.")
        if shutil.which("nix", path=ENVIRONMENT["PATH"]) is None:
            raise RemoteOffError(
                f"remote evaluation is off: there is no nix in {ENVIRONMENT['PATH']}; install it there."
            )
        binds = _binds()
        _refuse_shown(state_dir, binds)
        sandboxes = cls(limits, _users(at_once, state_dir), binds)
        sandboxes._try()
        return sandboxes

    def uid(self, slot: int) -> int:
        """Return the user of the program in a slot; 0: this one."""
        return self._uids[slot]

    def command(self, slot: int, command: Sequence[str], *, gateway: Path | None = None, uris: str = "") -> list[str]:
        """Return the command line that runs a command in the sandbox of a slot."""
        uid = self._uids[slot]
        own = uid or INNER_ID
        settings = {**NIX_SETTINGS, "allowed-uris": uris}
        sandbox = Sandbox(
            uid=uid,
            binds=(*self._binds, *(((str(gateway), GATEWAY),) if gateway else ())),
            links=_links(),
            files=(
                ("/etc/passwd", f"evaluation:x:{own}:{own}::{HOME}:/bin/sh\n"),
                ("/etc/group", f"evaluation:x:{own}:\n"),
                ("/etc/hosts", "127.0.0.1 localhost\n"),
                ("/etc/nix/nix.conf", "".join(f"{name} = {value}\n" for name, value in settings.items())),
            ),
            directories=("/tmp", WORK, HOME),  # noqa: S108 - places in the sandbox
            scratch_bytes=self._limits.scratch_bytes,
            scratch_files=self._limits.scratch_files,
            processes=_PROCESSES,
            memory_bytes=self._limits.memory_bytes + _RESERVED_BYTES,
            loopback=gateway is not None,
        )
        return [sys.executable, "-I", "-S", launcher.__file__, *sandbox.words(), *command]

    def _try(self) -> None:
        command = self.command(0, ["nix", "--version"])
        try:
            done = subprocess.run(
                command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=_TRIAL_WITHIN_S
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise RemoteOffError(f"remote evaluation is off: its sandbox cannot be tried: {error}.") from None
        if done.returncode:
            said = "; ".join(done.stderr.strip().splitlines()[-3:]) or f"exit status {done.returncode}"
            raise RemoteOffError(
                f"remote evaluation is off: {said}; run the coordinator as root, or allow user namespaces to its user."
            )


def _users(at_once: int, state_dir: Path) -> list[int]:
    """Return users that nothing else runs as, one for each program. Raises `RemoteOffError`."""
    if os.geteuid() != 0:
        return [0] * at_once
    try:
        found = claim(MACHINE_REGISTRY, own_ids(), account_ids(), state_dir, at_once)
    except NoBuildUsersError as error:
        raise RemoteOffError(f"remote evaluation is off: {error}.") from None
    return list(found.ids)[:at_once]


def _binds() -> tuple[tuple[str, str], ...]:
    wanted = ["/usr", *(f"/{name}" for name in _SYSTEM if not Path(f"/{name}").is_symlink()), *_ETC]
    wanted += [sys.base_prefix, sys.prefix]
    wanted += [str(Path(package.__path__[0]).absolute()) for package in (coordinator, infra, workers)]
    nix = shutil.which("nix", path=ENVIRONMENT["PATH"])
    if nix is not None and os.path.realpath(nix).startswith(_NIX_STORE):
        wanted.append(_NIX_STORE)
    kept: list[str] = []
    for path in dict.fromkeys(wanted):
        # What lies below another one is shown with it, and could not be mounted there.
        if Path(path).exists() and not any(Path(path).is_relative_to(other) for other in kept):
            kept.append(path)
    return tuple((path, path) for path in kept)


def _links() -> tuple[tuple[str, str], ...]:
    return tuple((str(Path(f"/{name}").readlink()), f"/{name}") for name in _SYSTEM if Path(f"/{name}").is_symlink())


def _refuse_shown(state_dir: Path, binds: Sequence[tuple[str, str]]) -> None:
    """Refuse a state directory that lies in what a sandbox shows."""
    for source, _ in binds:
        if state_dir.resolve().is_relative_to(Path(source).resolve()):
            raise RemoteOffError(
                f"remote evaluation is off: the state directory lies in {source}, which evaluations see; move it."
            )
