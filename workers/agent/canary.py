"""A build that looks around in its sandbox and reports what it finds, and the agent that watches it from outside.

The canary goes the way of the real builds: same daemon, same options, the worker's own system. It is built twice,
plain and as a fixed output, which has a network. Each prints one `key=value` a line into its log, marked by a nonce,
so that it needs no output that the agent could read. Its script is for the smallest shell there is: what is no builtin
(`chmod`, `nc`, `date`) is used where it is found, and nothing is reported where it is not.

What a build cannot know of itself is seen from outside: as which user its process runs on the machine, whether it
reached the agent's socket, whether what it made lies in the real store. The builder is held for that moment by not
reading its log any further: it prints more than all buffers on the way take, and waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import secrets
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from infra.daemon import (
    BasicDerivation,
    BasicOutput,
    BuildEvent,
    DaemonConnection,
    DaemonOperationError,
    PrintedLines,
    Upload,
)
from infra.nix import base32
from infra.nix.hashing import sha256_text
from infra.nix.nar import NarData, NarFile, write_events
from infra.nix.path_info import PathInfo
from infra.nix.store_path import StoreDir, base_name_of
from infra.validation import first_fault
from workers.agent.lease_machine import judge_status
from workers.errors import WorkerError
from workers.wire.grades import CLOCK_DIFFERS_S, CanaryReport

#: Paths that a build must not be able to write.
PROBES: Final = (
    "/bin/sh",
    "/etc/passwd",
    "/etc/group",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/shadow",
    "/proc/sys/kernel/core_pattern",
    "/proc/sysrq-trigger",
    "/root",
    "/home",
)
#: Variable in the agent's own environment that no build may see.
SECRET_VARIABLE: Final = "DROVER_CANARY_SECRET"  # noqa: S105 - the name of one
#: Values of one key that are kept, and their longest.
MAX_VALUES: Final = 64
MAX_VALUE_CHARACTERS: Final = 200
#: Lines of a kilobyte that the canary prints to be held: more than a pseudo-terminal, the daemon, a pipe and our reader
#: take, with the piece (1 MB at most) that was taken from the reader together with the canary's last word.
FILLER_LINES: Final = 2000
#: What begins each line that means something.
_MARK: Final = "@canary"

_SCRIPT: Final = r"""
PATH=/usr/bin:/bin
say() { echo "@canary $nonce $1=$2"; }
while read -r key value rest; do
  case "$key" in Uid:) say uid "$value" ;; Gid:) say gid "$value" ;; esac
done 2>/dev/null < /proc/self/status
[ -r /proc/self/status ] || say uid "$(/usr/bin/id -u 2>/dev/null)"
while read -r inner outer count; do say uid_map "$inner $outer $count"; done 2>/dev/null < /proc/self/uid_map
while read -r name rest; do
  case "$name" in *:*) say interface "${name%%:*}" ;; esac
done 2>/dev/null < /proc/net/dev
while read -r number here there state rest; do
  case "$here $state" in *":$port_hex 0A") say sees_socket yes ;; esac
done 2>/dev/null < /proc/net/tcp
if [ "$fixed" = 1 ]; then
  for host in 127.0.0.1 10.0.2.2; do nc -w 1 "$host" "$port" < /dev/null > /dev/null 2>&1; done
fi
for entry in /*; do say root "${entry#/}"; done
for entry in /dev/*; do say device "${entry#/dev/}"; done
[ -e "$host_file" ] && say sees_file yes
while read -r line; do say reads_secret yes; done 2>/dev/null < "$secret_file"
count=0
for entry in /proc/[0-9]*; do count=$((count + 1)); done
[ -e /proc/self/status ] && say processes "$count"
# Its own process may have the agent's number.
if [ "$count" -gt 8 ]; then
  problem=$( ( : < "/proc/$agent/environ" ) 2>&1 ) && [ -e "/proc/$agent/environ" ] && say reads_agent yes
fi
while read -r id above device root point options rest; do
  [ "$point" = /bin/sh ] && say shell_mount "${options%%,*}"
done 2>/dev/null < /proc/self/mountinfo
for path in $probes; do
  [ -e "$path" ] || continue
  if [ -d "$path" ]; then
    # Only tested: where there is no sandbox, what is made here would stay.
    [ -w "$path" ] && say writable "$path"
  elif problem=$( ( : >> "$path" ) 2>&1 ); then
    say writable "$path"
  else
    case "$problem" in *usy*) [ -w "$path" ] && say busy "$path" ;; esac
  fi
done
if [ -e "$input" ]; then
  say sees_input yes
  chmod u+w "$input" 2>/dev/null
  ( : >> "$input" ) 2>/dev/null && say changes_input yes
  chmod u-w "$input" 2>/dev/null
fi
( : > "$store_probe" ) 2>/dev/null && say store_probe made
( : > own ) 2>/dev/null
chmod 755 own 2>/dev/null && {
  chmod u+s own 2>/dev/null
  if [ -u own ]; then say setuid yes; else say setuid no; fi
}
read -r name 2>/dev/null < /proc/sys/kernel/hostname && say host_name "$name"
say clock "$(date +%s 2>/dev/null)"
[ -n "${DROVER_CANARY_SECRET+set}" ] && say environment yes
say hold yes
line=........................................................................................................
line=$line$line$line$line$line$line$line$line$line$line
count=0
while [ "$count" -lt "$filler" ]; do echo "$line"; count=$((count + 1)); done
printf %s "$nonce" > "$out"
"""


class CanaryError(WorkerError):
    """The canary could not be built; the message says why."""


@dataclass(slots=True)
class _Seen:
    """Observations of a canary from outside, by the agent."""

    uids: set[int] = field(default_factory=set)
    shared: bool = False
    reached: bool = False


@dataclass(frozen=True, slots=True)
class _Bait:
    """Resources that the agent exposes to one canary."""

    nonce: str
    port: int
    host_file: Path
    secret_file: Path
    input: str
    seen: _Seen


class Canary:
    """Builds canaries for one worker; nothing of them stays but garbage in the store."""

    def __init__(self, system: str, store_dir: str, physical_store: Path, state_dir: Path) -> None:
        """`system` is one that the worker's Nix builds for; `physical_store` is where its paths lie."""
        self._system = system
        self._store_dir = StoreDir(store_dir)
        self._physical_store = physical_store
        self._state_dir = state_dir
        os.environ.setdefault(SECRET_VARIABLE, secrets.token_hex(8))

    async def measure(self, connection: DaemonConnection) -> CanaryReport:
        """Build both canaries over the connection.

        Raises `CanaryError` where one does not build or reports nothing, else what the connection raises.
        """
        async with self._bait(connection) as bait:
            plain = await self._build(connection, bait, fixed=False)
            fixed = await self._build(connection, bait, fixed=True)
            marked = await asyncio.to_thread(self._take_probe, bait.nonce)
        return _report(plain, fixed, bait.seen, reaches_store=marked)

    async def _build(self, connection: DaemonConnection, bait: _Bait, *, fixed: bool) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        prefix = f"{_MARK} {bait.nonce} "

        def on_event(event: BuildEvent) -> Awaitable[object] | None:
            if not isinstance(event, PrintedLines):
                return None
            held = False
            for line in event.data.decode("ascii", "replace").split("\n"):
                if not line.startswith(prefix):
                    continue
                key, _, value = line.removeprefix(prefix).partition("=")
                if len(found) < MAX_VALUES and len(found[key]) < MAX_VALUES:
                    found[key].append(value[:MAX_VALUE_CHARACTERS])
                held = held or key == "hold"
            return asyncio.to_thread(_look_for, bait.nonce, bait.seen) if held else None

        drv_path, derivation = self._derivation(bait, fixed=fixed)
        result = await connection.build_derivation(drv_path, derivation, on_event)
        ending = judge_status(result.status, result.error_msg.strip())
        if ending is not None:
            raise CanaryError(ending.message)
        if "hold" not in found:
            raise CanaryError("the trial build ended well and said nothing of its isolation")
        return found

    def _derivation(self, bait: _Bait, *, fixed: bool) -> tuple[str, BasicDerivation]:
        """Return (path of the .drv, derivation) of a build that was never done before."""
        name = f"drover-canary-{'fixed' if fixed else 'plain'}"
        # Not a hash of anything: the daemon believes a trusted client's input-addressed paths.
        hashed = base32.encode(hashlib.sha256(f"{bait.nonce}{name}".encode()).digest()[:20])
        output = BasicOutput("out", self._store_dir.full(f"{hashed}-{name}"))
        if fixed:
            digest = hashlib.sha256(bait.nonce.encode()).hexdigest()
            output = BasicOutput(
                "out", self._store_dir.make_fixed_output_path(name, "", "sha256", digest), "sha256", digest
            )
        derivation = {
            "agent": str(os.getpid()),
            "filler": str(FILLER_LINES),
            "fixed": str(int(fixed)),
            "host_file": str(bait.host_file),
            "input": bait.input,
            "name": name,
            "nonce": bait.nonce,
            "out": output.path,
            "port": str(bait.port),
            "port_hex": f"{bait.port:04X}",
            "probes": " ".join(PROBES),
            "secret_file": str(bait.secret_file),
            "store_probe": self._probe(bait.nonce),
            "system": self._system,
        }
        if fixed:
            derivation |= {"outputHash": output.hash, "outputHashAlgo": "sha256", "outputHashMode": "flat"}
        return self._store_dir.full(f"{hashed}-{name}.drv"), BasicDerivation(
            outputs=(output,),
            inputs=(bait.input,),
            system=self._system,
            builder=b"/bin/sh",
            # The nonce is an argument as well, because that is what every user sees of a process.
            args=(b"-c", _SCRIPT.encode(), f"{_MARK}-{bait.nonce}".encode()),
            env=tuple(sorted((key.encode(), value.encode()) for key, value in derivation.items())),
        )

    @asynccontextmanager
    async def _bait(self, connection: DaemonConnection) -> AsyncIterator[_Bait]:
        nonce = secrets.token_hex(12)
        seen = _Seen()
        given = await self._input(connection)

        def reached(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.reached = True
            writer.close()

        with _files(self._state_dir, nonce) as (host_file, secret_file):
            async with await asyncio.start_server(reached, "127.0.0.1", 0) as server:
                port = server.sockets[0].getsockname()[1]
                yield _Bait(nonce, port, host_file, secret_file, given, seen)

    async def _input(self, connection: DaemonConnection) -> str:
        """Return a path that is valid in the store, for the canary to try itself on."""
        text = b"an input of drover's canary\n"
        nar = b"".join(write_events([NarFile(b"", executable=False, size=len(text)), NarData(text)]))
        digest = hashlib.sha256(nar)
        path = self._store_dir.make_source_path("drover-canary-input", digest.hexdigest())
        if path not in await connection.query_valid_paths([path]):
            info = PathInfo(
                store_path=path,
                nar_hash=sha256_text(digest.digest()),
                nar_size=len(nar),
                ca=f"fixed:r:{sha256_text(digest.digest())}",
            )
            try:
                await connection.add_to_store_nar(Upload(info, _chunks(nar)), dont_check_sigs=True)
            except DaemonOperationError as error:
                raise CanaryError(f"the store takes no input: {error}") from error
        return path

    def _probe(self, nonce: str) -> str:
        return self._store_dir.full(f"{base32.encode(bytes.fromhex(nonce)[:12]).rjust(32, '0')}-drover-canary-probe")

    def _take_probe(self, nonce: str) -> bool:
        """Return whether the file that the canary tried to make lies in the real store; it is removed."""
        place = self._physical_store / base_name_of(self._probe(nonce))
        there = place.exists()
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)
        return there


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


@contextmanager
def _files(state_dir: Path, nonce: str) -> Iterator[tuple[Path, Path]]:
    """Put out a file of the machine's that every user may read, and one that only the agent may."""
    with (
        tempfile.NamedTemporaryFile(prefix=f"drover-canary-{nonce}-", dir="/tmp") as shown,
        tempfile.NamedTemporaryFile(prefix="canary-", dir=state_dir) as secret,
    ):
        Path(shown.name).chmod(0o644)
        secret.write(b"secret\n")
        secret.flush()
        yield Path(shown.name), Path(secret.name)


def _look_for(nonce: str, seen: _Seen) -> None:
    """Find the processes of the canary and as which users they run; where there is no /proc, nothing."""
    mark = f"{_MARK}-{nonce}".encode()
    others: dict[int, int] = {}
    for entry in _processes():
        try:
            command = (entry / "cmdline").read_bytes()
            uid = (entry / "status").read_text(errors="replace").partition("\nUid:")[2].split(maxsplit=1)[0]
        except (OSError, IndexError):
            continue
        # The shell alone: a daemon that shows its client's request among its words is not the builder.
        if mark in command:
            seen.uids.add(int(uid))
        elif command:
            others[int(uid)] = others.get(int(uid), 0) + 1
    seen.shared = seen.shared or any(uid in others for uid in seen.uids)


def _processes() -> Iterable[Path]:
    try:
        return [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    except OSError:
        return []


def _report(
    plain: Mapping[str, list[str]], fixed: Mapping[str, list[str]], seen: _Seen, *, reaches_store: bool
) -> CanaryReport:
    """Put both halves together. Raises `CanaryError` where the canary's words are not what they should be."""
    kernel: Literal["linux", "darwin"] = "darwin" if platform.system() == "Darwin" else "linux"
    busy = [path for path in plain.get("busy", ()) if path != "/bin/sh" or plain.get("shell_mount", ["rw"])[-1] != "ro"]
    host_name = _one(plain, "host_name") or ""
    setuid = _one(plain, "setuid")
    findings: dict[str, Any] = {
        "kernel": kernel,
        "uid": _one(plain, "uid") or None,
        "gid": _one(plain, "gid") or None,
        "uid_map": tuple(plain.get("uid_map", ())),
        # Of several, the worst.
        "host_uid": min(seen.uids) if seen.uids else None,
        "agent_uid": os.geteuid(),
        "host_uid_shared": seen.shared,
        "interfaces": tuple(plain.get("interface", ())),
        "fixed_interfaces": tuple(fixed.get("interface", ())),
        "sees_host_sockets": "sees_socket" in plain,
        "fixed_sees_host_sockets": "sees_socket" in fixed,
        "fixed_reaches_loopback": seen.reached,
        "root": tuple(plain.get("root", ())),
        "sees_host_files": "sees_file" in plain or "sees_file" in fixed,
        "reads_secrets": "reads_secret" in plain or "reads_secret" in fixed,
        "reads_agent": "reads_agent" in plain or "reads_agent" in fixed,
        "writable": tuple(dict.fromkeys([*plain.get("writable", ()), *busy, *fixed.get("writable", ())])),
        "changes_inputs": "changes_input" in plain or "changes_input" in fixed,
        "reaches_store": reaches_store,
        "host_name": host_name,
        "shows_host_name": host_name != "localhost" and host_name == socket.gethostname(),
        "processes": _one(plain, "processes"),
        "devices": tuple(plain.get("device", ())),
        "makes_setuid": None if setuid is None else setuid == "yes",
        "clock_differs": _differs(_one(plain, "clock")),
        "shows_environment": "environment" in plain or "environment" in fixed,
    }
    try:
        return CanaryReport.model_validate(findings)
    except ValidationError as error:
        why = first_fault(error).message
        raise CanaryError(f"the trial build says something odd of its isolation: {why}") from None


def _one(found: Mapping[str, list[str]], key: str) -> str | None:
    return found[key][-1] if found.get(key) else None


def _differs(clock: str | None) -> bool:
    return clock is not None and clock.isdecimal() and abs(time.time() - int(clock)) > CLOCK_DIFFERS_S
