"""A farm as the README starts it, with the means of an attacker and the instruments that judge the damage."""

from __future__ import annotations

import http.client
import itertools
import re
import selectors
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.support.farm import Farm
from tests.support.ordinary import OrdinaryUser
from tests.support.patience import PATIENCE_S

#: Seconds; only ends a request that hangs.
ANSWER_S = PATIENCE_S

SomeFarm = TypeVar("SomeFarm", bound=Farm)


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class ProcessGauge:
    """Resources of a process, as the kernel counts them."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")

    @property
    def rss_bytes(self) -> int:
        return self.rss_and_peak_bytes[0]

    @property
    def peak_rss_bytes(self) -> int:
        """Most resident memory since the start or `reset_peak`."""
        return self.rss_and_peak_bytes[1]

    @property
    def rss_and_peak_bytes(self) -> tuple[int, int]:
        """Both at one moment: the kernel raises its peak now and then only, so a later one may be below `rss_bytes`."""
        status = (self._proc / "status").read_text()
        now, peak = (re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE) for field in ("VmRSS", "VmHWM"))
        assert now is not None
        assert peak is not None
        return int(now[1]) * 1024, int(peak[1]) * 1024

    @property
    def descriptors(self) -> int:
        return len(list((self._proc / "fd").iterdir()))

    def reset_peak(self) -> None:
        (self._proc / "clear_refs").write_text("5")


class FarmUnderAttack(Farm):
    """A farm without configuration, run by whoever runs the tests or by `user`."""

    def __init__(self, root: Path, user: OrdinaryUser | None = None, descriptors: int | None = None) -> None:
        """`descriptors`: the hard limit of open files of all its processes, where it is not the tests' own."""
        super().__init__(root, [], user=user)
        self._limits = () if descriptors is None else ("prlimit", f"--nofile={descriptors}:{descriptors}", "--")
        self._expressions = root / "expressions"
        self._expressions.mkdir()
        self._numbers = itertools.count()

    def command(self, *arguments: str | Path) -> list[str]:
        # It becomes the command, so the process keeps its id.
        return [*self._limits, *super().command(*arguments)]

    @property
    def process(self) -> ProcessGauge:
        """The coordinator's process."""
        return ProcessGauge(self.pid)

    @property
    def token(self) -> str:
        """The API token, which a stranger does not have."""
        return (self.secrets / "api-token").read_text().strip()

    def expression(self, text: str) -> Path:
        """Write a Nix file that the farm's user can read; `shell NAME SCRIPT` in it makes a derivation."""
        # An ordinary user sees of a closed directory only their home.
        directory = self._expressions if self.user is None else self.user.home
        file = directory / f"expression-{next(self._numbers)}.nix"
        file.write_text(
            f"""
            let
              shell = name: script: derivation {{
                inherit name; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" script ];
                salt = "{file}";
              }};
            in {text}
            """
        )
        return file

    def build_text(self, text: str, *arguments: str, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Evaluate `text` and build it with `drover build`; the result is the last line with `--json`."""
        return self.build(self.expression(text), *arguments, timeout_s=timeout_s)

    def request(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> Answer:
        """Send one request to the coordinator as it stands, with a token only where one is given."""
        sent = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_S)
        try:
            connection.request(method, target, body, sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """Open a connection from an address of loopback."""
        return socket.create_connection((self.host, self.port), ANSWER_S, (source, 0))

    def send_raw(self, data: bytes, *, half_close: bool = False) -> int:
        """Send bytes as they stand on a new connection; return the answer's status, 0 if there is none.

        Sending ends with the first answer. `half_close` tells the coordinator that nothing more comes. Raises
        `TimeoutError` where neither an answer nor the end comes.
        """
        with self.connect() as client:
            return exchange(client, data, half_close=half_close)


def exchange(client: socket.socket, data: bytes, *, half_close: bool = False) -> int:
    """Send bytes on a connection; see `FarmUnderAttack.send_raw`."""
    deadline = time.monotonic() + ANSWER_S
    rest, answer = memoryview(data), b""
    client.setblocking(False)
    # Not `select`, which takes no descriptor from 1,024 on: an attacker has more connections than that.
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while time.monotonic() < deadline:
            ready = next((events for _, events in selector.select(1.0)), 0)
            try:
                if ready & selectors.EVENT_READ:
                    received = client.recv(65536)
                    answer += received
                    if b"\r\n\r\n" in answer or not received:
                        return int(answer.split(None, 2)[1]) if answer else 0
                elif ready:
                    rest = rest[client.send(rest) :]
                    if not rest:
                        selector.modify(client, selectors.EVENT_READ)
                        if half_close:
                            client.shutdown(socket.SHUT_WR)
            except ConnectionError:
                return 0
    raise TimeoutError(f"neither an answer nor the end of the connection to {data[:200]!r}")


@contextmanager
def running(farm: SomeFarm) -> Iterator[SomeFarm]:
    """Start a farm and wait for a worker that may work; stop it, and clear what does not stop, at the end."""
    try:
        farm.start().wait_for_workers(1)
        yield farm
    finally:
        farm.stop()
        farm.clear()


@contextmanager
def running_farm(
    root: Path, user: OrdinaryUser | None = None, descriptors: int | None = None
) -> Iterator[FarmUnderAttack]:
    """A farm as the README starts it; see `running`."""
    with running(FarmUnderAttack(root, user, descriptors)) as farm:
        yield farm
