"""A whole farm as child processes: `drover up` with real Ray nodes, for the demo, the end-to-end tests and benchmarks.

Every worker has a chroot store of its own below the farm's directory; the client evaluates into yet another one, so
nothing is shared between client, workers and cache but what the farm itself carries.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.ordinary import OrdinaryUser
from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port

BIN = Path(sys.executable).parent
#: Farms of the session that run; see `tests.conftest.pytest_runtest_teardown`.
FARMS = pytest.StashKey[list["Farm"]]()
READY_WITHIN_S = PATIENCE_S
STOP_WITHIN_S = PATIENCE_S
#: For a Ray head, unless a test is about that: a machine of tests may be so busy that a node shows no sign of life for
#: half a minute. A node that is killed is gone within seconds all the same.
PATIENT_HEAD = {"DROVER_RAY_SILENCE_S": str(PATIENCE_S)}


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One `[[workers]]` table of the configuration file."""

    name: str
    slots: int = 2
    emulate: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    nix_options: Mapping[str, str] = field(default_factory=dict)
    min_free_mb: int = 512

    def toml(self) -> str:
        lines = ["[[workers]]", f"name = {json.dumps(self.name)}", f"slots = {self.slots}"]
        lines += [f"min_free_mb = {self.min_free_mb}", "yield_to_others = false"]
        lines += [
            f"{key} = {json.dumps(list(value))}"
            for key, value in (("emulate", self.emulate), ("features", self.features))
            if value
        ]
        if self.nix_options:
            lines.append("[workers.nix_options]")
            lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in self.nix_options.items()]
        return "\n".join(lines)


def processes_naming(text: str) -> dict[int, str]:
    """Return pid -> command line of every other process whose command line or environment names `text`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if command and (text.encode() in command or text.encode() in environment):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


class Farm:
    """`drover up` in a directory, and the `drover` command pointed at it."""

    def __init__(
        self,
        root: Path,
        workers: Sequence[WorkerSpec],
        *,
        settings: str = "",
        secrets: Path | None = None,
        host: str = "127.0.0.1",
        user: OrdinaryUser | None = None,
    ) -> None:
        """`settings` are lines of the configuration file before its tables, `secrets` their `secrets_dir`.

        Without both and without workers there is no configuration file, as in the README's first command. `user` is who
        runs the farm and its commands, instead of who runs the tests.
        """
        self.root = root
        self.host = host
        self.user = user
        home = root if user is None else user.home
        self.state = home / "farm"
        self.secrets = secrets or self.state
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        self.cache_url = f"{self.url}/cache"
        self.eval_store = home / "client"
        self._patient = {} if "ray_silence_s" in settings else PATIENT_HEAD
        self._config: tuple[str | Path, ...] = ()
        if settings or workers:
            config = root / "farm.toml"
            config.write_text("\n\n".join([settings, *(worker.toml() for worker in workers)]) + "\n")
            self._config = ("--config", config)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self.log_path = root / "farm.log"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **(os.environ if self.user is None else self.user.environment),
            **self._patient,
            "DROVER_URL": self.url,
            "DROVER_TOKEN_FILE": str(self.secrets / "api-token"),
            "DROVER_TEST_MARK": str(self.root),
        }

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Return whether the program was started and has not ended; on a busy machine it may not answer in time."""
        return self._process is not None and self._process.poll() is None

    @property
    def up_command(self) -> list[str]:
        """Return the command that starts the farm's program."""
        return self.command("up", "--state-dir", self.state, "--listen", f"{self.host}:{self.port}", *self._config)

    def launch(self) -> None:
        """Start the program, and wait for nothing."""
        self._log = self.log_path.open("ab")
        self._process = subprocess.Popen(
            self.up_command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )

    def start(self, *, standby: bool = False) -> Farm:
        """Start, and return once it answers: as a leader, or that it stands by."""
        if self.user is None:
            # Clients that run side by side shall find their store: of two that make it at one time, one fails at times.
            made = nix_store(self.eval_store, "--init")
            assert made.returncode == 0, made.stderr
        self.launch()
        assert self._process is not None
        deadline = time.monotonic() + READY_WITHIN_S
        while self.health() != ("standby" if standby else "ok"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the farm did not start:\n{self.log_path.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)
        return self

    def health(self) -> str:
        """Return the farm's health: "ok", "standby", "" where it does not answer."""
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=2) as answer:
                said = answer.read()
        except urllib.error.HTTPError as refusal:
            said = refusal.read()
        except OSError:
            return ""
        return str(json.loads(said)["status"])

    def wait_for_workers(self, count: int, within_s: float = PATIENCE_S) -> list[dict[str, Any]]:
        deadline = time.monotonic() + within_s
        while True:
            workers: list[dict[str, Any]] = [w for w in self.api("workers") if w["state"] == "online"]
            if len(workers) >= count:
                return workers
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{len(workers)} of {count} workers came:\n{self.log_path.read_text(errors='replace')[-4000:]}"
                )
            time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int | None:
        """Ask the farm to stop and wait; return its exit status (None where it never ran)."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            status = self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            status = self._process.wait()
        if self._log is not None:
            self._log.close()
        self._process = None
        return status

    def wait(self) -> int:
        """Wait for the coordinator's own end; return its exit status."""
        assert self._process is not None
        assert self._log is not None
        status = self._process.wait(STOP_WITHIN_S)
        self._log.close()
        self._process = None
        return status

    def kill(self) -> None:
        """SIGKILL the coordinator alone; its Ray nodes go on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        assert self._log is not None
        self._log.close()
        self._process = None

    def clear(self) -> None:
        """SIGKILL whatever is left of this farm."""
        for pid in processes_naming(str(self.root)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes_left(self, within_s: float = PATIENCE_S) -> dict[int, str]:
        """Processes of this farm that are still there; waits a little for the last to end."""
        deadline = time.monotonic() + within_s
        while (left := processes_naming(str(self.root))) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def api(self, path: str) -> Any:
        token = (self.secrets / "api-token").read_text().strip()
        request = urllib.request.Request(f"{self.url}/api/v1/{path}", headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.add_note(f"{path}: {error.read().decode()}\n{self.log_path.read_text(errors='replace')[-4000:]}")
            raise

    def begun(self, step: str) -> list[dict[str, Any]]:
        """Return the attempts of a step that a worker began, in order.

        A worker whose slots stay busy for longer than it foresaw, as on a busy machine, hands back what waits for one.
        """
        return [each for each in self.api(f"steps/{step}/timeline") if each["outcome"] != "returned"]

    @property
    def public_keys(self) -> str:
        return " ".join(self.api("farm")["public_keys"])

    def command(self, *arguments: str | Path) -> list[str]:
        prefix = () if self.user is None else self.user.prefix
        return [*prefix, str(BIN / "drover"), *map(str, arguments)]

    def build_command(self, file: Path, *arguments: str | Path) -> list[str]:
        return self.command("build", file, "--store", self.eval_store, *arguments)

    def drover(self, *arguments: str | Path, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def build(
        self, file: Path, *arguments: str | Path, timeout_s: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        return self.drover("build", file, "--store", self.eval_store, *arguments, timeout_s=timeout_s)

    def fetch(self, store: Path, *paths: str, keys: str | None = None) -> subprocess.CompletedProcess[str]:
        """A plain Nix client that knows the farm's cache and key, and nothing else of the farm."""
        return nix_store(
            store,
            "-r",
            *paths,
            options={
                "substituters": self.cache_url,
                "trusted-public-keys": self.public_keys if keys is None else keys,
                "require-sigs": "true",
                "narinfo-cache-negative-ttl": "0",
            },
        )


def nix_store(
    store: Path, *arguments: str, options: Mapping[str, str] | None = None, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run `nix-store` on a chroot store; the cache of narinfos lives beside that store."""
    settings = {"build-users-group": "", "substituters": "", **(options or {})}
    flags = [word for name, value in settings.items() for word in ("--option", name, value)]
    environment = {**os.environ, "HOME": str(store), "XDG_CACHE_HOME": f"{store}.cache"}
    return subprocess.run(
        ["nix-store", "--store", str(store), *arguments, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
