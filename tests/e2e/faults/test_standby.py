"""Two coordinators of one farm, as two machines would run them: one works, the other stands by and takes over.

They share a database, a bucket and their secrets. Ray's head and the workers are programs of their own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.faults.conftest import FarmUnderFault
from tests.support.elsewhere import Elsewhere
from tests.support.farm import Farm, processes_naming
from tests.support.servers import PostgresServer, S3Server

pytestmark = pytest.mark.e2e

SHORT_BUILDS = 60
#: Lines that a build prints before it waits.
PRINTED = 2_000
WAIT_FOR = f"/bin/busybox seq {PRINTED}; while [ ! -e /tally/{{go}} ]; do /bin/busybox sleep 0.1; done; echo last words"


class Pair(FarmUnderFault):
    """`farm` is the coordinator that is thought to lead; `other` the one that is not."""

    def __init__(self, root: Path, database_url: str, objects_url: str) -> None:
        self._prepare(root, database_url)
        secrets = root / "secrets"
        config = root / "head.toml"
        config.write_text(f'secrets_dir = "{secrets}"\n')
        self.elsewhere = Elsewhere(root, config, secrets / "ray-token")
        settings = "\n".join(
            [
                f'ray_address = "{self.elsewhere.address}"',
                f'secrets_dir = "{secrets}"',
                f'object_store_url = "{objects_url}"',
                *(f'{part}_database_url = "{database_url}"' for part in ("journal", "derivations", "cache")),
            ]
        )
        for name in ("a", "b"):
            (root / name).mkdir()
        self.farm, self.other = (Farm(root / name, [], settings=settings, secrets=secrets) for name in ("a", "b"))
        options = ("--slots", "2", "--nix-option", "sandbox-paths", self.sandbox_paths)
        # One sees the bucket, the other knows coordinators only.
        blind = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
        self.workers = [
            self.elsewhere.worker("left", *options),
            self.elsewhere.worker("right", *options, environment=blind),
        ]

    def start(self) -> None:
        self.elsewhere.start_head()
        self.farm.start()
        self.other.start(standby=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda worker: worker.start("has joined the farm"), self.workers))
        self.farm.wait_for_workers(2)

    def change_places(self) -> None:
        self.farm, self.other = self.other, self.farm
        self.until(lambda: self.farm.health() == "ok")
        self.farm.wait_for_workers(2)

    def steps(self, submission: str, state: str) -> list[dict[str, Any]]:
        """Return the steps of a submission in a state."""
        found: list[dict[str, Any]] = self.farm.api(f"submissions/{submission}/steps?state={state}&limit=100")
        return found

    def processes_left(self) -> dict[int, str]:
        return processes_naming(str(self.root))

    def stop(self) -> None:
        for farm in (self.farm, self.other):
            farm.stop()
        for program in (*self.workers, self.elsewhere.head):
            program.stop()


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer, s3_server: S3Server
) -> Iterator[Pair]:
    database = postgres_server.create_database()
    place = s3_server.at("pair")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.environment.items():
            patch.setenv(name, value)
        pair = Pair(tmp_path_factory.mktemp("pair"), postgres_server.url(database), place.url)
        try:
            pair.start()
            yield pair
        finally:
            pair.stop()
            for pid in pair.processes_left():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            postgres_server.drop_database(database)


def graph(pair: Pair, name: str) -> Path:
    """Many short builds and two that wait for a sign; another one behind each."""
    return pair.graph(
        f"""
        short = map (n: step "{name}-${{toString n}}" [ ] "echo short words") (range 1 {SHORT_BUILDS});
        long = map (n: step "{name}-long-${{toString n}}" [ ] "{WAIT_FOR.format(go=name)}") (range 1 2);
        top = step "{name}-top" (short ++ map (n: step "behind-${{n.name}}" [ n ] ":") long) ":";
        """
    )


def test_the_leader_is_killed_while_builds_run(pair: Pair) -> None:
    submission = pair.submit(graph(pair, "killed"), "top")

    def waiting() -> list[str]:
        return [step["key"] for step in pair.steps(submission, "running") if "-long-" in step["name"]]

    pair.until(lambda: sum(pair.runs().values()) >= SHORT_BUILDS // 3 and len(waiting()) == 2)
    running = waiting()
    pair.until(lambda: all(f"{PRINTED}\n" in pair.farm.drover("log", key).stdout for key in running))
    pair.until(lambda: pair.steps(submission, "done"))
    ended = [step["key"] for step in pair.steps(submission, "done")]
    pair.farm.kill()
    pair.change_places()
    (pair.tally / "killed").touch()
    view = pair.ended(submission)
    assert view["state"] == "succeeded"
    # What the first one had on its disk alone, of a build that ran and of those that had just ended, is not lost.
    said = "".join(f"{number}\n" for number in range(1, PRINTED + 1)) + "last words\n"
    assert [pair.farm.drover("log", key).stdout for key in running] == [said] * len(running)
    assert {pair.farm.drover("log", key).stdout for key in ended} == {"short words\n"}
    pair.can_be_fetched(view)
    runs = pair.runs("killed-") + pair.runs("behind-killed-")
    assert len(runs) == SHORT_BUILDS + 5
    assert set(runs.values()) == {1}


def test_the_leader_is_paused_and_wakes_up_in_anothers_reign(pair: Pair) -> None:
    if not pair.other.runs:
        pair.other.start(standby=True)
    submission = pair.submit(graph(pair, "paused"), "top")
    pair.until(lambda: pair.runs()["paused-1"])
    os.kill(pair.farm.pid, signal.SIGSTOP)
    pair.change_places()
    os.kill(pair.other.pid, signal.SIGCONT)
    assert pair.other.wait() == 4
    assert "another coordinator has taken over" in pair.other.log_path.read_text().splitlines()[-1]
    (pair.tally / "paused").touch()
    view = pair.ended(submission)
    assert view["state"] == "succeeded"
    pair.can_be_fetched(view)
    assert {worker["name"] for worker in pair.farm.api("workers") if worker["state"] == "online"} == {"left", "right"}
    runs = pair.runs()
    assert {name: times for name, times in runs.items() if "paused-long" in name} == {
        f"{prefix}paused-long-{number}": 1 for prefix in ("", "behind-") for number in (1, 2)
    }


def test_two_coordinators_end_in_order_and_nothing_ran_twice_without_a_reason(pair: Pair) -> None:
    pair.stop()
    pair.until(lambda: not pair.processes_left())
    assert {times for name, times in pair.runs().items() if "-long-" in name} == {1}
    pair.nothing_ran_twice_without_a_reason()
