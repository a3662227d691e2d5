"""Settings of one worker, and the one place that composes the `nix-daemon` command.

The settings are a JSON file named by `DROVER_WORKER_SETTINGS`; nothing of them is secret. Nix options come in three
layers: what this module finds right for the machine, then the operator's `nix_options` (they win), then what the farm
decides (an operator's value for one of these is refused, not ignored):

- `sandbox-fallback` false: a build that silently runs outside its sandbox would be published as if it had not;
- `substituters`, `builders` empty: inputs come from the farm's cache and the farm distributes the builds;
- `extra-platforms`, `system-features`: they follow from `systems`, `emulate` and the features, which are announced;
- `max-jobs`, `store`, `system`: each slot is one connection, and the store has a setting of its own.
"""

from __future__ import annotations

import grp
import ipaddress
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from infra.validation import first_fault
from workers.errors import WorkerError
from workers.wire.messages import MAX_SLOTS

#: Environment variable that holds the path of the settings file.
SETTINGS_VARIABLE = "DROVER_WORKER_SETTINGS"
#: Options that the farm decides; see the module's text. Old names of the same settings are listed with them.
FARM_OPTIONS = frozenset(
    {
        "binary-caches",
        "build-max-jobs",
        "builders",
        "extra-binary-caches",
        "extra-platforms",
        "extra-substituters",
        "extra-system-features",
        "max-jobs",
        "sandbox-fallback",
        "store",
        "substituters",
        "system",
        "system-features",
    }
)
#: Names that Python's `platform` gives to machines and kernels, in Nix's words.
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "i386": "i686", "i586": "i686"}
_KERNELS = {"linux": "linux", "darwin": "darwin"}
#: Where distributions put a busybox that can serve as /bin/sh in a sandbox, if it is static.
_BUSYBOXES = ("/bin/busybox", "/usr/bin/busybox", "/usr/lib/busybox/busybox-static")
_ELF_PROGRAM_INTERPRETER = 3
_CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")
#: Command that prints Nix's settings: before 2.20 and since.
_SHOW_CONFIG = (("show-config",), ("config", "show"))
#: Seconds for Nix to print its settings; it takes a twentieth of one.
_SHOW_CONFIG_S = 20.0


class SettingsError(WorkerError):
    """A worker's settings cannot be used; the message names the setting."""


class WorkerSettings(BaseModel):
    """Settings of one worker, as they stand in its JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Unique in the farm.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    #: Directory of this worker alone: outbox and the like. Made where it is missing.
    state_dir: Path
    #: Root of a chroot store of the worker's own; empty is the machine's store (or its daemon's).
    store: str = ""
    #: Logical store directory, as the farm has it.
    store_dir: Annotated[str, Field(pattern=r"^/.*[^/]$")] = "/nix/store"
    #: Systems that the machine can run; empty is what its Nix builds for, or none where it emulates: a worker
    #: that stands in for a Mac should not take the work of the real ones.
    systems: tuple[str, ...] = ()
    #: Systems that the machine only pretends to be.
    emulate: tuple[str, ...] = ()
    #: Features beside the machine's own (see `default_features`).
    features: tuple[str, ...] = ()
    #: Features of which a step must ask for all to come here; they are offered as well.
    mandatory_features: tuple[str, ...] = ()
    #: Whether the features that Nix assumes of every machine are offered.
    default_features: bool = True
    #: Builds at one time; 0 is one per core.
    slots: Annotated[int, Field(ge=0, le=MAX_SLOTS)] = 0
    #: Whether fewer slots are offered while the machine is short of memory, or others keep its processors busy.
    yield_to_others: bool = True
    #: NIX_BUILD_CORES of builders; 0 is the machine's cores divided by the slots, for `big-parallel` by what runs.
    build_cores: Annotated[int, Field(ge=0)] = 0
    #: IPv4 networks that fixed-output builds reach although they are denied, and others that they do not reach.
    network_allow: tuple[str, ...] = ()
    network_deny: tuple[str, ...] = ()
    #: Whether fixed-output builds come here at all, and how many of them run at one time.
    network: bool = True
    fetches: Annotated[int, Field(ge=1, le=MAX_SLOTS)] = 8
    #: Names or addresses of the farm's own machines (coordinator, Ray head), which no build reaches.
    farm_hosts: tuple[str, ...] = ()
    #: Nix settings by name.
    nix_options: dict[str, str] = Field(default_factory=dict)
    #: MiB that must be free on each disk in use (store, build directory, state directory), or the worker takes no
    #: work; 0: it does not look.
    min_free_mb: Annotated[int, Field(ge=0)] = 512
    #: Whether the store deletes garbage when its disk runs low; unset: where the store is the worker's own.
    collect_garbage: bool | None = None
    #: Seconds between two trial builds of an idle worker; 0: none.
    trial_every_s: Annotated[int, Field(ge=0)] = 600
    #: Seconds between two canaries, which measure how builds are isolated; 0: at the start and after doubt only.
    canary_every_s: Annotated[int, Field(ge=0)] = 4 * 3600
    #: Program that serves the worker protocol on its standard streams.
    nix_daemon: str = "nix-daemon"

    @field_validator("store")
    @classmethod
    def _absolute_store(cls, value: str) -> str:
        if value and not value.startswith("/"):
            msg = "must be an absolute directory, or empty for the machine's own store"
            raise ValueError(msg)
        return value

    @field_validator("network_allow", "network_deny")
    @classmethod
    def _ipv4_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(str(ipaddress.IPv4Network(text, strict=False)) for text in value)
        except ValueError as error:
            msg = f"not an IPv4 network such as 10.1.0.0/16: {error}"
            raise ValueError(msg) from None

    @field_validator("nix_options")
    @classmethod
    def _only_the_operators(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name in FARM_OPTIONS:
                msg = f"the Nix option {name} is decided by the farm and cannot be set"
                raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _store_fits_the_machine(self) -> WorkerSettings:
        if self.store and sys.platform == "darwin":
            msg = "a chroot store cannot build on macOS: leave `store` empty"
            raise ValueError(msg)
        return self

    @property
    def collects_garbage(self) -> bool:
        """True if the store may be made to delete what nothing needs."""
        return bool(self.store) if self.collect_garbage is None else self.collect_garbage

    @property
    def physical_store(self) -> Path:
        """The directory in which the store's paths lie."""
        return Path(self.store + self.store_dir)


@dataclass(frozen=True, slots=True)
class HostSpec:
    """Facts of this machine that complete the settings; a value, so that the composition below is a pure function."""

    #: Nix's name of the system, for example `x86_64-linux`.
    system: str
    cores: int
    #: Path of a static busybox, or empty.
    busybox: str = ""
    #: Whether the group that Nix takes build users from by default exists.
    has_build_users: bool = False
    #: Group of build users that are this worker's own (`workers.agent.isolation`), or empty.
    build_users_group: str = ""
    #: Bytes; 0 is unknown.
    memory_bytes: int = 0
    #: Whether the machine's nix.conf says something about sandbox paths.
    configures_sandbox_paths: bool = False
    has_kvm: bool = False
    #: What the machine's Nix builds for beside `system` (its `extra-platforms`): i686-linux on x86_64-linux.
    extra_systems: tuple[str, ...] = ()
    #: Those of them that Nix would not name by itself: the machine's nix.conf adds them, most often for an emulator.
    configured_systems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """Offer of the worker to the farm; every tuple is sorted and without repeats."""

    systems: tuple[str, ...]
    emulated: tuple[str, ...]
    features: tuple[str, ...]
    mandatory_features: tuple[str, ...]
    slots: int
    build_cores: int
    #: Of the machine; 0 is unknown.
    memory_bytes: int = 0


def load_settings(path: str | Path | None = None) -> WorkerSettings:
    """Read the settings file (default: the one that `DROVER_WORKER_SETTINGS` names).

    Raises `SettingsError` with one sentence.
    """
    place = str(path) if path is not None else os.environ.get(SETTINGS_VARIABLE, "")
    if not place:
        raise SettingsError(f"{SETTINGS_VARIABLE} does not name a settings file")
    try:
        return WorkerSettings.model_validate(json.loads(Path(place).read_bytes()))
    except OSError as error:
        raise SettingsError(f"cannot read the worker settings {place}: {error.strerror}") from None
    except ValidationError as error:
        where, why = first_fault(error)
        raise SettingsError(f"worker settings {place}: {where or 'settings'}: {why}") from None
    except ValueError:
        raise SettingsError(f"the worker settings {place} are not JSON") from None


def inspect_host(nix_daemon: str = "nix-daemon") -> HostSpec:
    """Look at the machine that this process runs on; `nix_daemon` is the program of its Nix."""
    try:
        grp.getgrnam("nixbld")
        has_build_users = True
    except KeyError:
        has_build_users = False
    platforms, usual = extra_platforms(nix_daemon)
    return HostSpec(
        system=native_system(),
        cores=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        busybox=_static_busybox(),
        has_build_users=has_build_users,
        configures_sandbox_paths=_nix_conf_mentions("sandbox-paths"),
        has_kvm=os.access("/dev/kvm", os.R_OK | os.W_OK),
        extra_systems=platforms,
        configured_systems=tuple(name for name in platforms if name not in usual),
    )


def extra_platforms(nix_daemon: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ask the `nix` beside a `nix-daemon` for its `extra-platforms`: as configured, and as they are by default.

    Both are empty where it does not say: the worker then offers what the machine is.
    """
    daemon = shutil.which(nix_daemon)
    nix = shutil.which("nix", path=str(Path(daemon).parent)) if daemon else None
    for words in _SHOW_CONFIG if nix else ():
        command = [nix or "nix", "--extra-experimental-features", "nix-command", *words, "--json"]
        try:
            shown = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SHOW_CONFIG_S, check=True
            )
            setting = _PlatformSetting.model_validate(json.loads(shown.stdout)["extra-platforms"])
        except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
            continue
        return setting.value, setting.defaultValue
    return (), ()


class _PlatformSetting(BaseModel):
    """`extra-platforms` as Nix shows it."""

    value: tuple[str, ...]
    defaultValue: tuple[str, ...] = ()  # noqa: N815 - Nix's own name


def native_system(machine: str | None = None, kernel: str | None = None) -> str:
    """Nix's name of a system: `x86_64-linux`, `aarch64-darwin`, … Raises `SettingsError` for an unknown kernel."""
    name = (machine or platform.machine()).lower()
    os_name = (kernel or platform.system()).lower()
    if os_name not in _KERNELS:
        raise SettingsError(f"drover's worker does not run on {os_name}")
    return f"{_MACHINES.get(name, name)}-{_KERNELS[os_name]}"


def offer(settings: WorkerSettings, machine: HostSpec) -> Offer:
    """Complete what the operator set with what the machine is."""
    native = () if settings.emulate else (machine.system, *machine.extra_systems)
    real = settings.systems or native
    pretended = settings.emulate if settings.systems else (*settings.emulate, *machine.configured_systems)
    offered = {*real, *settings.emulate}
    genuine = {*settings.systems, machine.system}
    features = set(settings.features) | set(settings.mandatory_features)
    if settings.default_features:
        # What Nix itself assumes of a machine when `system-features` is not set.
        features |= {"benchmark", "big-parallel", "nixos-test"}
        if machine.has_kvm:
            features.add("kvm")
    slots = settings.slots or machine.cores
    return Offer(
        systems=tuple(sorted(offered)),
        emulated=tuple(sorted(offered.intersection(pretended) - genuine)),
        features=tuple(sorted(features)),
        mandatory_features=tuple(sorted(set(settings.mandatory_features))),
        slots=slots,
        build_cores=settings.build_cores or max(1, machine.cores // slots),
        memory_bytes=machine.memory_bytes,
    )


def nix_options(settings: WorkerSettings, machine: HostSpec) -> Mapping[str, str]:
    """All Nix options of the worker's connections, by name; see the module's text for who wins."""
    offered = offer(settings, machine)
    options: dict[str, str] = {}
    if machine.system.endswith("-linux"):
        options["sandbox"] = "true"
        if machine.busybox and not machine.configures_sandbox_paths:
            options["sandbox-paths"] = f"/bin/sh={machine.busybox}"
        if machine.build_users_group or not machine.has_build_users:
            options["build-users-group"] = machine.build_users_group
    options |= settings.nix_options
    return options | {
        "sandbox-fallback": "false",
        "substituters": "",
        "builders": "",
        "extra-platforms": " ".join(name for name in offered.systems if name != machine.system),
        "system-features": " ".join(offered.features),
        # Logs of builds go to the coordinator; a second copy in the worker's log directory is never read.
        "keep-build-log": options.get("keep-build-log", "false"),
    }


def daemon_argv(settings: WorkerSettings, machine: HostSpec) -> tuple[str, ...]:
    """The command that serves one connection on its standard streams."""
    arguments = [settings.nix_daemon, "--stdio"]
    if settings.store:
        arguments += ["--store", settings.store]
    for name, value in nix_options(settings, machine).items():
        arguments += ["--option", name, value]
    return tuple(arguments)


def _memory_bytes() -> int:
    """Return the memory of the machine, or of the container that this process runs in where that has less."""
    try:
        machine = max(0, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        machine = 0
    try:
        # A number, or "max"; a process outside of containers finds no such file in the root group.
        return min(machine, int(_CONTAINER_MEMORY.read_text())) if machine else 0
    except (OSError, ValueError):
        return machine


def _static_busybox() -> str:
    for candidate in dict.fromkeys((*_BUSYBOXES, shutil.which("busybox") or "")):
        if candidate and _is_static_elf(Path(candidate)):
            return candidate
    return ""


def _is_static_elf(path: Path) -> bool:
    """Return whether a program needs no interpreter: only then does it run in a sandbox that has nothing else."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
            if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
                return False
            (table,) = struct.unpack_from("<Q", header, 32)
            entry_size, entries = struct.unpack_from("<HH", header, 54)
            file.seek(table)
            programs = file.read(entry_size * entries)
    except OSError:
        return False
    kinds = (int.from_bytes(programs[at : at + 4], "little") for at in range(0, len(programs), max(entry_size, 1)))
    return _ELF_PROGRAM_INTERPRETER not in kinds


def _nix_conf_mentions(option: str) -> bool:
    path = Path(os.environ.get("NIX_CONF_DIR", "/etc/nix")) / "nix.conf"
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.split("=")[0].strip() in {option, f"extra-{option}"} for line in lines if "=" in line)
