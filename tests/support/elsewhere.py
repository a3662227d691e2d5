"""A Ray head and workers as programs of their own, as on machines that are not the coordinator's.

They are started as the services of infra/deploy/systemd start them, with the rights that these leave to root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.farm import BIN, PATIENT_HEAD
from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port
from tests.support.units import command, confined

#: Only ends a test that hangs.
WITHIN_S = PATIENCE_S


class Program:
    """A `drover` command that stays, with its log."""

    def __init__(
        self, log: Path, *arguments: str | Path, environment: Mapping[str, str], prefix: Sequence[str] = ()
    ) -> None:
        """`prefix` is a command that becomes the one behind it."""
        self.path = log
        self._argv = [*prefix, BIN / "drover", *arguments]
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return self.path.read_text(errors="replace")

    def start(self, ready: str) -> Program:
        """Start, and return once it has written `ready`, which it had not before."""
        said = self.path.read_text().count(ready) if self.path.exists() else 0
        with self.path.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + WITHIN_S
        while self.log.count(ready) == said:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)
        return self

    def run(self) -> int:
        """Start one that ends by itself; return its exit status."""
        with self.path.open("ab") as log:
            return subprocess.run(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                timeout=WITHIN_S,
                check=False,
            ).returncode

    @property
    def runs(self) -> bool:
        """Return whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end; return its exit status."""
        return self.process.wait(WITHIN_S)

    def force_stop(self) -> None:
        """End it at once, as two signals do, unless it has ended."""
        if self._process is not None and self._process.poll() is None:
            self.send(signal.SIGTERM)
            time.sleep(0.5)
            if self._process.poll() is None:
                self.send(signal.SIGTERM)
            self.ended()

    def stop(self) -> int:
        """Ask it to stop, unless it has ended; return its exit status."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self.send(signal.SIGTERM)
        return self.ended()


class Elsewhere:
    """The head and the workers of a farm below `root`; `config` has the secrets' directory."""

    def __init__(self, root: Path, config: Path, token: Path) -> None:
        self.root = root
        self.address = f"127.0.0.1:{free_port()}"
        self._token = token
        #: As the farm's own processes are marked.
        self._environment = {"DROVER_TEST_MARK": str(root), **PATIENT_HEAD}
        places: dict[str, str | Path] = {"/etc/drover/farm.toml": config, "/var/lib/drover/head": root / "head"}
        self.head = Program(
            root / "head.log",
            *command("drover-head", {**places, "HEAD": self.address}),
            environment=self._environment,
            prefix=confined("drover-head"),
        )

    def start_head(self) -> None:
        self.head.start("the Ray head is ready")

    def worker(self, name: str, *options: str | Path, environment: Mapping[str, str] | None = None) -> Program:
        """A worker that is not started. All its slots are offered, also beside other tests."""
        values = {"HEAD": self.address, "ADDRESS": "127.0.0.1", "NAME": name, "WORKER_OPTIONS": ""}
        places = {"/etc/drover/ray-token": self._token, "/var/lib/drover-worker": self.root / f"worker-{name}"}
        return Program(
            self.root / f"{name}.log",
            *command("drover-worker", {**values, **places}),
            "--no-yield-to-others",
            *options,
            environment={**self._environment, **(environment or {})},
            prefix=confined("drover-worker"),
        )
