"""No number of connections stops a farm whose processes may have 1,024 files open, which a login has by default."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.attack import ANSWER_S, FarmUnderAttack, exchange, running_farm

pytestmark = pytest.mark.e2e

DESCRIPTORS = 1024
#: Idle connections of strangers, and the addresses that they come from.
IDLE = 1100
ADDRESSES = 5
WATCHERS = 1000

QUESTION = b"GET /cache/nix-cache-info HTTP/1.1\r\nHost: localhost\r\n\r\n"
#: A derivation that waits for as long as its submission is not withdrawn: there is no worker for it.
WAITS = """derivation {{ name = "waits"; system = "riscv64-linux"; builder = "/bin/sh"; salt = "{salt}"; }}"""


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FarmUnderAttack]:
    """A farm with few descriptors; the tests have enough for both ends of the attack."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * IDLE), max(hard, 4 * IDLE)))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        yield stack.enter_context(running_farm(tmp_path_factory.mktemp("connections"), descriptors=DESCRIPTORS))


def assert_unharmed(farm: FarmUnderAttack) -> None:
    """The farm answers those with a token and strangers, has its worker, and builds what it has not built before."""
    assert [worker["state"] for worker in farm.api("workers")] == ["online"]
    assert farm.request("POST", "/cache/narinfos", b'{"paths":[]}').status == 200
    built = farm.build_text(f'shell "good-{time.monotonic_ns()}" "echo good > $out"')
    assert built.returncode == 0, built.stderr
    assert farm.process.descriptors < DESCRIPTORS
    assert b"too many open files" not in farm.log_path.read_bytes().lower()


def test_more_idle_connections_than_descriptors_stop_nothing_and_heads_that_never_end_are_given_up(
    farm: FarmUnderAttack,
) -> None:
    assert resource.prlimit(farm.pid, resource.RLIMIT_NOFILE) == (DESCRIPTORS, DESCRIPTORS)
    with ExitStack() as stack:
        clients = [stack.enter_context(farm.connect(f"127.0.0.{2 + each % ADDRESSES}")) for each in range(IDLE)]
        slow = []
        for number, client in enumerate(clients):
            # Whole requests that are kept alive, half heads, and nothing at all.
            try:
                client.sendall((QUESTION, QUESTION[:20], b"")[number % 3])
            except ConnectionError:
                continue
            if number % 3:
                slow.append(client)
        assert_unharmed(farm)
        for client in slow:
            # Without a head they are closed, by their time or for another; `recv` waits for that, at most ANSWER_S.
            try:
                assert client.recv(1024) == b""
            except ConnectionResetError:
                continue
    assert_unharmed(farm)


def test_watchers_with_a_token_are_bounded_and_stop_nothing(farm: FarmUnderAttack) -> None:
    sent = farm.drover(
        "build", farm.expression(WAITS.format(salt=farm.root)), "--store", farm.eval_store, "--detach", "--json"
    )
    assert sent.returncode == 0, sent.stderr
    submission = farm.api("submissions")[0]["id"]
    watch = (
        f"GET /api/v1/submissions/{submission}/events HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {farm.token}\r\n\r\n"
    ).encode()
    with ExitStack() as stack:
        answers = [exchange(stack.enter_context(farm.connect()), watch) for _ in range(WATCHERS)]
        watching = answers.count(200)
        assert set(answers) <= {200, 503, 0}
        # Half of the connections, which are a quarter of the descriptors.
        assert DESCRIPTORS // 16 <= watching <= DESCRIPTORS // 8
        assert_unharmed(farm)
    withdrawn = farm.request("POST", f"/api/v1/submissions/{submission}/cancel", token=farm.token)
    assert withdrawn.status == 200


def test_accepting_goes_on_once_descriptors_are_free(farm: FarmUnderAttack) -> None:
    before = farm.log_path.stat().st_size
    resource.prlimit(farm.pid, resource.RLIMIT_NOFILE, (8, DESCRIPTORS))
    try:
        with farm.connect() as waiting:
            deadline = time.monotonic() + ANSWER_S
            while b"no connection can be accepted" not in _log_from(farm.log_path, before):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            resource.prlimit(farm.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
            assert exchange(waiting, QUESTION) == 200
    finally:
        resource.prlimit(farm.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    assert [worker["state"] for worker in farm.api("workers")] == ["online"]


def _log_from(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read()
