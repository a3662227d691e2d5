"""Every listening socket of a farm is on loopback and asks for its token: what THREAT_MODEL's table of sockets says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.attack import FarmUnderAttack
from tests.support.farm import processes_naming

pytestmark = pytest.mark.e2e

#: One harmless method of each service of Ray, and the one that asks nothing but whether a server lives.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
)
LIVES = "/grpc.health.v1.Health/Check"
#: Calls of one method until it counts as not answered.
TRIES = 5
#: gRPC's status codes.
UNIMPLEMENTED, UNAUTHENTICATED = 12, 16
#: What curl prints where the connection ends without an answer.
SAYS_NOTHING = 0
#: State of a listening socket in /proc/net/tcp, and loopback there: an IPv4 address, and it mapped into IPv6.
LISTENING = "0A"
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")


def listening_sockets(pids: Iterator[int]) -> dict[int, str]:
    """Return port -> address, in the kernel's words, of the sockets on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in list(Path(f"/proc/{pid}/fd").glob("*")):
            try:
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue  # closed meanwhile
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            if fields[3] == LISTENING and fields[9] in inodes:
                found[int(port, 16)] = address
    return found


def grpc_status(port: int, method: str) -> int | None:
    """Call a method with an empty message and without a token; None where no gRPC server answers."""
    argv = ["curl", "--silent", "--max-time", "30", "--http2-prior-knowledge", "--dump-header", "-"]
    argv += ["--output", "/dev/null", "--data-binary", "@-"]
    argv += ["--header", "content-type: application/grpc", "--header", "te: trailers"]
    for _ in range(TRIES):
        # A server that does not know the method may close the stream before curl has sent the message.
        done = subprocess.run(
            [*argv, f"http://127.0.0.1:{port}{method}"], input=bytes(5), capture_output=True, check=False
        )
        status = re.search(rb"^grpc-status: ?(\d+)", done.stdout, re.MULTILINE)
        if status is not None:
            return int(status[1])
    return None


def http_status(port: int) -> int:
    argv = ["curl", "--silent", "--max-time", "30", "--output", "/dev/null", "--write-out", "%{http_code}"]
    target = f"http://127.0.0.1:{port}/api/v1/submissions"
    return int(subprocess.run([*argv, target], capture_output=True, check=False, text=True).stdout)


def agents(pids: Iterator[int]) -> Iterator[int]:
    """Those of the processes that host an agent, which listens for lines of coordinators."""
    for pid in pids:
        with suppress(OSError):
            if b"ray::AgentHost" in Path(f"/proc/{pid}/cmdline").read_bytes():
                yield pid


def test_every_socket_of_a_farm_is_on_loopback_and_wants_its_token(own_farm: FarmUnderAttack) -> None:
    pids = [own_farm.pid, *processes_naming(str(own_farm.root))]
    sockets = listening_sockets(iter(pids))
    assert own_farm.port in sockets
    assert set(sockets.values()) <= set(LOOPBACK)
    guarded = dict.fromkeys(METHODS, 0)
    of_agents = listening_sockets(agents(iter(pids)))
    lines = 0
    for port in sockets:
        answers = {method: grpc_status(port, method) for method in METHODS}
        if set(answers.values()) == {None}:
            # HTTP: the API, and Ray's agent for runtime environments. An agent's lines say nothing to a stranger.
            http = http_status(port)
            assert http == 401 or (http == SAYS_NOTHING and port in of_agents), f"port {port}: {http}"
            lines += http == SAYS_NOTHING
            continue
        # A method that the server does not know is refused, or its stream is closed before curl has read why.
        assert set(answers.values()) <= {UNIMPLEMENTED, UNAUTHENTICATED, None}
        assert UNAUTHENTICATED in answers.values(), f"port {port} has no known service"
        assert grpc_status(port, LIVES) == 0
        for method, status in answers.items():
            guarded[method] += status == UNAUTHENTICATED
    assert all(guarded.values()), guarded
    assert lines == len(list(agents(iter(pids))))
