"""Ray nodes as drover starts them: closed to strangers, on loopback alone, and gone when they should be.

Real Ray throughout; one head for the module.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from infra.process_tree import process_tree
from tests.support.patience import PATIENCE_S
from workers.ray_transport.access import NodeHealth, RayNodeError, check_token_file, make_token_file, ray_env
from workers.ray_transport.cluster_identity import cluster_at
from workers.ray_transport.node_process import Handover
from workers.ray_transport.node_records import private_directory, sweep_stale
from workers.ray_transport.nodes import RayHead, RayWorkerNode
from workers.ray_transport.timer_slack import RAY_SLACK_NS, USUAL_SLACK_NS, timer_slack_ns

shared = pytest.mark.asyncio(loop_scope="module")


#: As a driver, and as somebody who speaks to the head's port without being one.
TRY_TO_CONNECT = """
import sys, ray
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_get(b"session_name", b"session", timeout=5)
except ray.exceptions.AuthenticationError:
    try:
        ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
    except ConnectionError:
        sys.exit("refused")
"""


#: As the coordinator itself.
TRY_TO_SERVE = """
import asyncio, sys
from pathlib import Path
from workers.wire.messages import FarmInfo
from workers.ray_transport.fleet import RayFleet
async def main():
    farm = FarmInfo(cache_url="http://127.0.0.1:9", public_keys=(), object_store_url="file:///")
    async with RayFleet(token_file=Path(sys.argv[2]), farm=farm).connected(sys.argv[1]):
        pass
try:
    asyncio.run(main())
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


#: As Ray's own class does for a node that joins.
LOOK_FOR_HEAD = """
import sys
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
of_head = GetAllNodeInfoRequest.NodeSelector()
of_head.is_head_node = True
for info in GcsClient(address=sys.argv[1]).get_all_node_info(timeout=30, node_selectors=[of_head]).values():
    print(GcsNodeInfo.GcsNodeState.Name(info.state), info.temp_dir)
"""


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_token_file(tmp_path_factory.mktemp("token") / "ray-token")


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A short path: pytest's own are too long for sockets."""
    made = Path(tempfile.mkdtemp(prefix="dt", dir="/tmp"))
    yield made
    made.rmdir()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def head(token: Path, base: Path) -> AsyncIterator[RayHead]:
    async with RayHead(token_file=token, base_dir=base) as head:
        yield head


def node(head: RayHead, token: Path, base: Path, *, name: str = "w1") -> RayWorkerNode:
    settings = Path("/nonexistent/settings.json")
    return RayWorkerNode(name=name, head=head.address, token_file=token, settings_file=settings, base_dir=base)


def listening_addresses(root: int) -> set[str]:
    """Addresses on which the tree of `root` listens, from the kernel's tables (proc(5): address in host order)."""
    sockets = set()
    for link in (link for process in process_tree(root) for link in Path(f"/proc/{process.pid}/fd").glob("*")):
        # Closed meanwhile.
        with suppress(OSError):
            sockets.add(str(link.readlink()))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])
                swapped = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, swapped))
    return found


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def command_lines(root: int) -> str:
    """Return the words of all processes of a tree; one may have ended since it was listed."""
    return b"".join(command(process.pid) for process in process_tree(root)).decode()


def programs_below(root: int) -> Counter[bytes]:
    return Counter(command(p.pid).partition(b"\0")[0].rpartition(b"/")[2] for p in process_tree(root))


def entries(directory: Path) -> set[Path]:
    return set(directory.iterdir())


async def gone(root: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while process_tree(root):  # noqa: ASYNC110 - other programs' processes send no event
            await asyncio.sleep(0.1)


def test_a_new_token_is_random_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        first, second = make_token_file(tmp_path / "a"), make_token_file(tmp_path / "b")
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(first.stat().st_mode) == 0o400
    assert first.read_text() != second.read_text()
    assert make_token_file(first).read_text() == first.read_text()


def test_a_token_that_others_could_have_read_or_placed_is_refused(tmp_path: Path) -> None:
    token = make_token_file(tmp_path / "token")
    (tmp_path / "link").symlink_to(token)
    with pytest.raises(RayNodeError, match="not a plain file"):
        make_token_file(tmp_path / "link")
    token.chmod(0o440)
    with pytest.raises(RayNodeError, match="can be read by others"):
        check_token_file(token)
    (tmp_path / "empty").touch(mode=0o400)
    with pytest.raises(RayNodeError, match="too short"):
        make_token_file(tmp_path / "empty")
    with pytest.raises(RayNodeError, match="cannot be read"):
        check_token_file(tmp_path / "none")


def test_a_node_is_given_up_after_the_silence_that_is_set() -> None:
    assert NodeHealth.after(35) == NodeHealth()
    for silence_s in (10, 35, 125):
        health = NodeHealth.after(silence_s)
        given_up_ms = health.failures * health.timeout_ms + (health.failures - 1) * health.period_ms
        assert silence_s * 1000 - health.failures < given_up_ms <= silence_s * 1000


def test_the_environment_carries_the_path_of_the_token_never_the_token(token: Path) -> None:
    stray = {"RAY_AUTH_TOKEN": "secret", "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "elsewhere", "PATH": "/bin"}
    env = ray_env(token, base=stray, loopback=True)
    assert env["PATH"] == "/bin"
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert "RAY_AUTH_TOKEN" not in env
    assert "RAY_ADDRESS" not in env
    assert token.read_text() not in env.values()


@pytest.mark.parametrize("host", ["127.0.0.2", "0.0.0.0", "::", "::1", "localhost"])
def test_an_address_that_would_open_all_interfaces_by_surprise_is_refused(token: Path, host: str) -> None:
    with pytest.raises(RayNodeError):
        RayHead(token_file=token, host=host)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a.", "a=b", "a,b", "x" * 64])
def test_a_worker_name_that_is_no_label_is_refused(token: Path, name: str) -> None:
    with pytest.raises(RayNodeError, match="worker name"):
        RayWorkerNode(name=name, head="127.0.0.1:1", token_file=token, settings_file=Path("/x"))


def test_a_base_directory_too_long_for_sockets_is_refused_before_anything_starts(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 60)
    long.mkdir()
    with pytest.raises(RayNodeError, match="too long"):
        private_directory(long)
    assert list(long.iterdir()) == []


@shared
async def test_head_and_node_listen_on_loopback_only_and_keep_their_files_to_themselves(
    head: RayHead, token: Path, base: Path
) -> None:
    async with node(head, token, base) as worker:
        for running in (head, worker):
            assert {address.removeprefix("::ffff:") for address in listening_addresses(running.pid)} == {"127.0.0.1"}
            assert stat.S_IMODE(running.directory.stat().st_mode) == 0o700
            assert token.read_text() not in command_lines(running.pid)  # noqa: ASYNC240 - a small local file
        pid, directory = worker.pid, worker.directory
    assert process_tree(pid) == set()
    assert not directory.exists()


@shared
async def test_a_node_is_a_server_and_a_small_leader_with_no_other_program_of_ray(
    head: RayHead, token: Path, base: Path
) -> None:
    async with node(head, token, base) as worker:
        leader = os.fsencode(Path(sys.executable).name)
        async with asyncio.timeout(PATIENCE_S):
            # The raylet starts what it has for its agents some time after it has joined.
            while (programs := programs_below(worker.pid))[b"sh"] < 2:  # noqa: ASYNC110 - sends no event
                await asyncio.sleep(0.1)
        assert programs == {leader: 1, b"raylet": 1, b"sh": 2}
        assert programs_below(head.pid) == {leader: 1, b"gcs_server": 1}
        servers = [
            p.pid for each in (head, worker) for p in process_tree(each.pid) if command(p.pid).count(b"/ray/core/")
        ]
        assert [timer_slack_ns(server) for server in servers] == [RAY_SLACK_NS, RAY_SLACK_NS]
        assert timer_slack_ns() == USUAL_SLACK_NS
        assert not re.search(r"site-packages", Path(f"/proc/{worker.pid}/maps").read_text())  # noqa: ASYNC240 - no disk


@shared
async def test_a_node_of_an_earlier_release_finds_the_directories_of_a_head_whose_raylet_has_ended(
    head: RayHead, token: Path
) -> None:
    env = ray_env(token, base=os.environ, loopback=True)
    old = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LOOK_FOR_HEAD, head.address), env=env, stdout=subprocess.PIPE
    )
    found, _ = await old.communicate()
    assert found.decode().split() == ["DEAD", str(head.directory / "r")]


@shared
async def test_the_id_of_a_cluster_is_that_which_ray_itself_gives_and_needs_the_token(
    head: RayHead, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ray_env(token, base={}, loopback=True).items():
        monkeypatch.setenv(name, value)
    asked = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).cluster_id.hex())"
    ray = await asyncio.create_subprocess_exec(sys.executable, "-c", asked, head.address, stdout=subprocess.PIPE)
    answer, _ = await ray.communicate()
    assert cluster_at(head.address) == answer.decode().strip()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(make_token_file(tmp_path / "other")))
    assert cluster_at(head.address) == ""
    assert cluster_at("127.0.0.1:1") == ""


@shared
async def test_without_the_token_neither_a_driver_nor_a_node_gets_in(
    head: RayHead, token: Path, base: Path, tmp_path: Path
) -> None:
    other = make_token_file(tmp_path / "other")
    with_other = ray_env(other, base=os.environ, loopback=True)
    with_none = {**with_other, "RAY_AUTH_MODE": "disabled"}
    # A refused driver asks again, once a second.
    with_other["RAY_NUM_REDIS_GET_RETRIES"] = with_none["RAY_NUM_REDIS_GET_RETRIES"] = "2"
    drivers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TRY_TO_CONNECT, head.address), env=env, stderr=asyncio.subprocess.PIPE
        )
        for env in (with_other, with_none)
    ]
    stranger = node(head, other, base)
    env = stranger.env(os.environ) | {"RAY_NUM_REDIS_GET_RETRIES": "2"}
    joining = await asyncio.create_subprocess_exec(
        *stranger.argv(tmp_path), env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(PATIENCE_S):
        said, _ = await joining.communicate()
    assert joining.returncode == 1
    assert b"InvalidAuthToken" in said
    for driver in drivers:
        async with asyncio.timeout(PATIENCE_S):
            _, said = await driver.communicate()
        assert driver.returncode == 1
        assert said.endswith(b"refused\n")
    for address, why in ((head.address, b"refuses this farm's token"), ("127.0.0.1:1", b"no Ray head answers")):
        coordinator = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TRY_TO_SERVE, address, str(other)), stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(PATIENCE_S):
            _, said = await coordinator.communicate()
        assert why in said


@shared
async def test_a_port_that_is_taken_is_reported_before_anything_starts(head: RayHead, token: Path, base: Path) -> None:
    before = entries(base)
    with pytest.raises(RayNodeError, match="Address already in use"):
        async with RayHead(token_file=token, base_dir=base, port=int(head.address.rpartition(":")[2])):
            pass
    assert entries(base) == before


@shared
async def test_a_killed_node_is_reported_and_what_is_left_of_it_is_ended(
    head: RayHead, token: Path, base: Path
) -> None:
    async with node(head, token, base, name="w2") as worker:
        os.kill(worker.pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            assert "ended unexpectedly" in await worker.wait_failed()
        pid = worker.pid
    assert process_tree(pid) == set()


@shared
async def test_a_node_whose_raylet_ended_in_order_is_reported_and_not_taken_over(
    head: RayHead, token: Path, base: Path, tmp_path: Path
) -> None:
    def made() -> RayWorkerNode:
        return RayWorkerNode(
            name="w4",
            head=head.address,
            token_file=token,
            settings_file=tmp_path / "none",
            base_dir=base,
            keep=Handover(tmp_path / "record", 60.0),
        )

    async with made() as worker:
        [raylet] = [p.pid for p in process_tree(worker.pid) if b"raylet/raylet" in command(p.pid)]
        os.kill(raylet, signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert "raylet ended with status 0" in await worker.wait_failed()
        async with made() as next_one:
            assert not next_one.adopted


@shared
async def test_nodes_whose_owner_was_killed_end_and_the_next_start_removes_their_files(
    head: RayHead, token: Path, base: Path, tmp_path: Path
) -> None:
    owner = tmp_path / "owner.py"
    owner.write_text(
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from workers.ray_transport.nodes import RayWorkerNode\n"
        "async def main():\n"
        "    token, head, base = sys.argv[1:]\n"
        "    node = RayWorkerNode(name='w3', head=head, token_file=Path(token), settings_file=Path('/x'),"
        " base_dir=Path(base))\n"
        "    async with node:\n"
        "        print(node.pid, node.directory, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(owner), str(token), head.address, str(base)), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        pid, directory = (await process.stdout.readline()).split()
    assert sweep_stale(base) == []
    process.kill()
    await process.wait()
    await gone(int(pid))
    assert [str(path) for path in sweep_stale(base)] == [directory.decode()]
    assert Path(directory.decode()) not in entries(base)
    assert head.directory.exists()
