"""Parts of a fleet on one machine: PostgreSQL, an S3 store, a coordinator with its workers, Prometheus.

Each is the real program, with its files below the fleet's directory and ports of its own, so that fleets can run
side by side. The workers have stores and build users of their own: Nix instances that share build users and not the
state of their stores kill each other's builds.
"""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml  # type: ignore[import-untyped]

from tests.fleet.place import CHECKOUT, FleetError
from tests.support.farm import Farm, WorkerSpec
from tests.support.ports import free_port
from tests.support.servers import Daemon, MortalPostgres, S3Place, S3Server, running_s3

RULES = CHECKOUT / "infra" / "deploy" / "prometheus" / "drover.rules.yml"
MAC = WorkerSpec("mac", slots=1, features=("large-memory",), emulate=("aarch64-darwin",))
#: What the coordinator keeps in PostgreSQL; with the objects in S3, its own directory holds no data.
DATABASES = ("journal", "derivations", "cache", "timings", "environments")
SCRAPE_EVERY_S = 2
#: Seconds that running builds have when the fleet is stopped.
BUILDS_END_WITHIN_S = 2


class Say(Protocol):
    """Prints a text, and what ends it."""

    def __call__(self, text: str, *, end: str = "\n") -> None:
        """Print."""


class FleetFarm(Farm):
    """The coordinator of a fleet with its workers, and the `drover` command for it."""

    def __init__(self, root: Path, workers: Sequence[WorkerSpec], settings: str, store: S3Place) -> None:
        super().__init__(root, workers, settings=settings)
        self._store = store

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of its programs, with the way to the object store."""
        return {**super().environment, **self._store.environment}

    @property
    def token(self) -> str:
        """The API token, which the pages ask for."""
        return (self.secrets / "api-token").read_text().strip()

    @property
    def last_words(self) -> str:
        """The last line of the coordinator's log."""
        return next(reversed(self.log_path.read_text(errors="replace").split("\n")[:-1]), "")

    def ended(self) -> int:
        """Wait for the coordinator's own end, however long that takes; return its exit status."""
        assert self._process is not None
        return self._process.wait()


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running fleet."""

    farm: FleetFarm
    workers: tuple[dict[str, Any], ...]
    prometheus: str

    @property
    def targets_page(self) -> str:
        """Prometheus's page of what it scrapes; Debian's Prometheus has only the older pages."""
        return next(filter(answers, (f"{self.prometheus}/targets", f"{self.prometheus}/classic/targets")))


def workers_of(count: int) -> tuple[WorkerSpec, ...]:
    """Return `count` workers for this machine's system, and one that emulates a Mac."""
    return (*(WorkerSpec(f"linux-{n}", slots=1, features=("large-memory",)) for n in range(1, count + 1)), MAC)


@contextmanager
def fleet(root: Path, workers: Sequence[WorkerSpec], say: Say) -> Iterator[Fleet]:
    """Start a fleet below `root`, and say of each part that it runs; the block's end stops all in reverse order.

    Raises `FleetError` where a part does not start.
    """
    with ExitStack() as stack:
        try:
            started = _start(stack, root, workers, say)
        except (RuntimeError, OSError) as error:
            raise FleetError(str(error)) from error
        yield started


def _start(stack: ExitStack, root: Path, workers: Sequence[WorkerSpec], say: Say) -> Fleet:
    for name in ("pg", "s3", "prometheus"):
        (root / name).mkdir(mode=0o700)
    with _starting(say, "PostgreSQL") as runs:
        postgres = stack.enter_context(MortalPostgres(root / "pg", durable=False)).server
        runs(f"its socket is in {root / 'pg'}")
    with _starting(say, "S3") as runs:
        s3 = stack.enter_context(running_s3(root / "s3"))
        runs(f"{s3.endpoint} (SeaweedFS)")
    url, store = postgres.url(postgres.create_database()), s3.at("fleet")
    settings = [f'{name}_database_url = "{url}"' for name in DATABASES]
    settings += [f'object_store_url = "{store.url}"', f"stop_grace_s = {BUILDS_END_WITHIN_S}"]
    # Its nodes end with a coordinator that is killed, instead of waiting for the next one.
    settings += ["ray_outlive_s = 0"]
    farm = FleetFarm(root, workers, "\n".join(settings), store)
    with _starting(say, "coordinator") as runs:
        # Before it is started: an interrupt may come in between.
        stack.callback(farm.stop)
        farm.start()
        runs(f"{farm.url}, with a Ray head")
    with _starting(say, "Prometheus") as runs:
        prometheus = stack.enter_context(_prometheus(root / "prometheus", farm, s3))
        runs(prometheus)
    with _starting(say, "workers") as runs:
        present = tuple(farm.wait_for_workers(len(workers)))
        runs(", ".join(map(_worker, present)))
    return Fleet(farm, present, prometheus)


@contextmanager
def _starting(say: Say, part: str) -> Iterator[Callable[[str], None]]:
    """Say what starts, and on the same line, once the block says where it runs, how long that took."""
    began = time.monotonic()
    say(f"  {part:<13}", end="")
    yield lambda where: say(f"{where}, after {time.monotonic() - began:.1f} s")


def _worker(worker: dict[str, Any]) -> str:
    """Return a worker's name, and what it only pretends to be."""
    return str(worker["name"]) + (f" (emulates {' '.join(worker['emulated'])})" if worker["emulated"] else "")


@contextmanager
def _prometheus(directory: Path, farm: Farm, s3: S3Server) -> Iterator[str]:
    """A Prometheus that scrapes all that shows metrics, itself included, with the farm's alerts; gives its address."""
    port = free_port()
    targets = {"drover": farm.port, "s3": s3.metrics_port, "prometheus": port}
    config = {
        "global": {"scrape_interval": f"{SCRAPE_EVERY_S}s", "evaluation_interval": "15s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{at}"]}]} for name, at in targets.items()
        ],
    }
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    argv: list[str | Path] = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with Daemon("prometheus", argv, directory, stop=signal.SIGTERM) as daemon:
        address = f"http://127.0.0.1:{port}"
        daemon.wait_until(lambda: answers(f"{address}/-/ready"))
        yield address


def answers(url: str) -> bool:
    """Return whether a server answers a request well."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
