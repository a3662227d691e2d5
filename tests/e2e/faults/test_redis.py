"""Ray's head with its tables in a Redis: killed, it comes back with its builds, and nobody sees the password."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from infra.process_tree import process_tree, signal_all
from tests.e2e.faults.conftest import MakeFarm
from tests.support.elsewhere import Program
from tests.support.ports import free_port
from tests.support.servers import RedisPlace

pytestmark = pytest.mark.e2e


def test_a_head_that_keeps_its_tables_in_redis_comes_back_with_its_builds(hurt: MakeFarm, redis: RedisPlace) -> None:
    password = redis.password_file.read_text().strip()
    one = hurt(
        "only",
        slots=1,
        settings=f'ray_redis = "{redis.address}"\nray_redis_password = "{redis.password_file}"',
    )
    assert not (one.farm.state / "ray" / "tables").exists()
    shown = b"".join(
        (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
        for directory in (Path("/proc") / str(process.pid) for process in process_tree(one.leader("head")))
    )
    assert b"gcs_server" in shown
    assert redis.address.encode() in shown
    assert password.encode() not in shown
    file = one.graph('slow = step "slow" [] "while [ ! -e /tally/go ]; do /bin/busybox sleep 0.1; done";')
    submission = one.submit(file, "slow")
    one.until(one.building)
    signal_all(process_tree(one.leader("head")), signal.SIGKILL)
    one.until(lambda: "answers again" in one.farm.log_path.read_text())
    (one.tally / "go").touch()
    assert one.ended(submission)["state"] == "succeeded"
    assert one.runs() == {"slow": 1}
    assert one.farm.stop() == 0


def test_a_redis_that_cannot_be_used_is_reported_in_one_sentence(redis: RedisPlace, tmp_path: Path) -> None:
    """Ray would end with a stack trace."""
    password = redis.password_file.read_text().strip()
    for settings, sentence in (
        (f'ray_redis = "{redis.address}"', "refuses: NOAUTH"),
        (f'ray_redis = "{redis.address}"\nray_redis_password = "env:WRONG"', "refuses: WRONGPASS"),
        (f'ray_redis = "127.0.0.1:{free_port()}"', "cannot be reached: connection refused"),
    ):
        (tmp_path / "head.toml").write_text(settings)
        told = ("--state-dir", tmp_path / "head", "--config", tmp_path / "head.toml")
        head = Program(tmp_path / "head.log", "head", *told, environment={"WRONG": "w" * 16})
        assert head.run() == 4
        [said] = head.log.splitlines()[-1:]
        assert sentence in said
        assert password not in said
