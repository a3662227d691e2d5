"""Real servers for tests: an S3 store (SeaweedFS), PostgreSQL and Redis, started at most once a session, on first use.

A pytest plugin (see tests/conftest.py). Both listen on free loopback ports or a socket, keep all their files in a
directory of their own, and end with the session; where pytest is killed, the kernel ends them (Linux).

    s3_server        the server; `at(prefix)` gives an address and what the environment must say
    s3               a fresh prefix of its bucket, with the environment set for this test
    postgres_server  the server
    postgres_url     a fresh database: `postgresql+psycopg://…`
    redis            a server of the test's own, with a password
    mortal_postgres  a server for one test, which may kill it and start it again
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import psycopg
import pytest

from infra.process_tree import process_tree
from tests.support.patience import PATIENCE_S
from tests.support.ports import free_port

#: Seconds for a server to answer, and to end.
START_WITHIN_S = PATIENCE_S
STOP_WITHIN_S = 15.0
BUCKET = "drover-test"


class ServerError(RuntimeError):
    """A server did not start; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class S3Place:
    """A prefix of the bucket: what `object_store_url` is, and the environment that belongs to it."""

    url: str
    environment: Mapping[str, str]
    endpoint: str
    bucket: str
    prefix: str


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running SeaweedFS with one bucket."""

    port: int
    access_key: str
    secret_key: str
    #: Where it shows its own metrics to Prometheus.
    metrics_port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def at(self, prefix: str, endpoint: str = "") -> S3Place:
        """Return the store below `prefix`; `endpoint` is another way to the same server, through a proxy say."""
        environment = {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        return S3Place(f"s3://{BUCKET}/{prefix}", environment, endpoint or self.endpoint, BUCKET, prefix)


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A running PostgreSQL, reached by a socket; `user` may do everything."""

    socket_dir: Path
    user: str

    def conninfo(self, database: str) -> str:
        return f"host={self.socket_dir} user={self.user} dbname={database}"

    def url(self, database: str) -> str:
        """Return the address for SQLAlchemy."""
        return f"postgresql+psycopg://{self.user}@/{database}?host={quote(str(self.socket_dir), safe='')}"

    def create_database(self) -> str:
        name = f"test_{secrets.token_hex(8)}"
        with psycopg.connect(self.conninfo("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return name

    def drop_database(self, name: str) -> None:
        with psycopg.connect(self.conninfo("postgres"), autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())


def _as_user(user: str, stop: signal.Signals = signal.SIGKILL) -> list[str]:
    """Return what runs a command as `user` ("": unchanged) and, on Linux, sends it `stop` when its parent is gone."""
    if sys.platform != "linux":
        return []
    identity = [f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups"] if user else []
    return ["setpriv", *identity, "--pdeathsig", stop.name.removeprefix("SIG"), "--"]


class Daemon:
    """A server process in a directory of its own, with its log. A context; leaving it ends the process surely."""

    def __init__(
        self, name: str, argv: Sequence[str | Path], directory: Path, user: str = "", *, stop: signal.Signals
    ) -> None:
        self._name = name
        self._argv = [*_as_user(user, stop), *map(str, argv)]
        self._directory = directory
        self._log = directory / f"{name}.log"
        self._stop = stop

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env={"PATH": os.environ["PATH"], "HOME": str(self._directory), "LC_ALL": "C"},
                start_new_session=True,
            )
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_WITHIN_S
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{self._name} did not start:\n{self._log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(self._stop)
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _weed_argv(directory: Path, ports: Sequence[int]) -> list[str | Path]:
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    more = ("s3.port", "s3.port.grpc", "metricsPort")
    return [
        Path(sys.executable).parent / "weed",
        f"-logdir={directory}",
        "server",
        f"-dir={directory}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=4096",
        "-volume.max=16",
        "-volume.minFreeSpace=1",
        "-volume.preStopSeconds=0",
        "-filer",
        f"-filer.localSocket={directory / 'filer.sock'}",
        "-s3",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={directory / 's3.sock'}",
        f"-s3.config={directory / 's3.json'}",
        *(f"-{name}={port}" for name, port in zip((*names, *more), ports, strict=True)),
    ]


@contextmanager
def running_s3(directory: Path) -> Iterator[S3Server]:
    """An S3 store with its files in `directory`, for as long as the block runs."""
    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    identity = {
        "name": "test",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = directory / "s3.json"
    config.touch(mode=0o600)
    config.write_text(json.dumps({"identities": [identity]}))
    ports = [free_port() for _ in range(9)]
    server = S3Server(ports[6], access, secret, ports[8])
    # Its files are thrown away with it: nothing is gained by waiting for it to tidy up.
    try:
        with Daemon("weed", _weed_argv(directory, ports), directory, stop=signal.SIGKILL) as daemon:
            daemon.wait_until(lambda: _has_bucket(server))
            yield server
    finally:
        # Sockets of its parts for each other, whose place cannot be chosen.
        for port in ports:
            for socket in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - the server's own place
                socket.unlink()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    directory = Path(tempfile.mkdtemp(prefix="drover-s3-"))
    try:
        with running_s3(directory) as server:
            yield server
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _has_bucket(server: S3Server) -> bool:
    """Make the bucket and write into it: only then do all parts of the server run."""
    import botocore.session  # noqa: PLC0415 - half a second that other tests need not pay
    from botocore.config import Config  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    try:
        with urllib.request.urlopen(f"{server.endpoint}/status", timeout=2):
            pass
    except urllib.error.HTTPError:
        pass
    except OSError:
        return False
    client: Any = botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
    )
    try:
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    place = s3_server.at(secrets.token_hex(8))
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    return place


def postgres_bin() -> Path:
    """Return the directory with PostgreSQL's programs, the newest there is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found:
        return found[-1]
    initdb = shutil.which("initdb")
    if initdb is None:
        raise ServerError("PostgreSQL is not installed; `./run test` installs it")
    return Path(initdb).resolve().parent


class MortalPostgres:
    """A server over a directory of data that may be killed and started again. A context; leaving it ends the server.

    `durable`: what it confirms survives that it is killed.
    """

    def __init__(self, directory: Path, *, durable: bool) -> None:
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else ""
        self._directory = directory
        self._durable = durable
        self._running = ExitStack()
        self._daemon: Daemon | None = None
        self._programs = postgres_bin()
        self.server = PostgresServer(directory, "drover")

    def __enter__(self) -> Self:
        if self._user:
            shutil.chown(self._directory, self._user)
        subprocess.run(
            [*_as_user(self._user), *map(str, _initdb_argv(self._programs, self._data))],
            check=True,
            capture_output=True,
            cwd=self._directory,
            timeout=START_WITHIN_S,
        )
        self.start()
        return self

    @property
    def _data(self) -> Path:
        return self._directory / "data"

    def start(self) -> None:
        """Return once it answers, after a recovery where it was killed."""
        commit = "on" if self._durable else "off"
        argv = _postgres_argv(self._programs, self._data, self._directory, commit)
        # SIGINT: do not wait for clients to leave.
        daemon = Daemon("postgres", argv, self._directory, self._user, stop=signal.SIGINT)
        self._daemon = self._running.enter_context(daemon)
        daemon.wait_until(lambda: _answers(self.server))

    def kill(self) -> None:
        """SIGKILL all its processes, as a crash of its machine does."""
        assert self._daemon is not None
        for process in process_tree(self._daemon.pid):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self._running.close()

    def __exit__(self, *_: object) -> None:
        self._running.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    # The name is short: a socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="drover-pg-"))
    try:
        with MortalPostgres(directory, durable=False) as postgres:
            yield postgres.server
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def mortal_postgres() -> Iterator[MortalPostgres]:
    directory = Path(tempfile.mkdtemp(prefix="drover-pg-"))
    try:
        with MortalPostgres(directory, durable=True) as postgres:
            yield postgres
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _initdb_argv(programs: Path, data: Path) -> list[str | Path]:
    options = ["--auth=trust", "--username=drover", "--encoding=UTF8", "--locale=C", "--no-sync"]
    return [programs / "initdb", *options, "-D", data]


def _postgres_argv(programs: Path, data: Path, directory: Path, synchronous_commit: str) -> list[str | Path]:
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": directory,
        # What a crash of the machine would cost a test's database is of no interest.
        "fsync": "off",
        "synchronous_commit": synchronous_commit,
        "full_page_writes": "off",
        "max_connections": 200,
        # Below the data, so that a server which is killed leaves nothing elsewhere.
        "dynamic_shared_memory_type": "mmap",
        "shared_buffers": "32MB",
    }
    flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return [programs / "postgres", "-D", data, *flags]


def _answers(server: PostgresServer) -> bool:
    try:
        with psycopg.connect(server.conninfo("postgres"), connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    name = postgres_server.create_database()
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@dataclass(frozen=True, slots=True)
class RedisPlace:
    """A running Redis: `host:port`, and a file (mode 0600) with the password that it wants."""

    address: str
    password_file: Path


@pytest.fixture
def redis() -> Iterator[RedisPlace]:
    directory = Path(tempfile.mkdtemp(prefix="drover-redis-"))
    port = free_port()
    password = secrets.token_hex(16)
    place = RedisPlace(f"127.0.0.1:{port}", directory / "password")
    for file, text in (
        (place.password_file, password),
        # By a file: command lines are public.
        (directory / "redis.conf", f'bind 127.0.0.1\nport {port}\nsave ""\nrequirepass {password}\n'),
    ):
        file.touch(mode=0o600)
        file.write_text(text + "\n")
    try:
        argv: list[str | Path] = ["redis-server", directory / "redis.conf"]
        with Daemon("redis", argv, directory, stop=signal.SIGKILL) as daemon:
            daemon.wait_until(lambda: _listens(port))
            yield place
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
