"""The local fleet: it does what a farm does, and is gone without a trace however it ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fleet.place import CHECKOUT, LOCK, PREFIX, clear_dead
from tests.fleet.undertaker import members
from tests.support.patience import PATIENCE_S

#: Only ends a test that hangs.
ENDED_WITHIN_S = PATIENCE_S


class Run:
    """A run of the program, whose output is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output = ""
        self.root = Path(self.read_until("starting a fleet").split()[4].rstrip(";"))

    def read_until(self, text: str) -> str:
        """Read until a line has the text; return that line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return line
        pytest.fail(f"it ended before it said {text!r}:\n{self.output}")

    def read_all(self) -> int:
        """Read to the end; return the exit status."""
        assert self.process.stdout is not None
        self.output += self.process.stdout.read()
        return self.process.wait(ENDED_WITHIN_S)

    def left(self) -> list[str]:
        """Return what is left of it."""
        return [*members(self.root).values(), *(str(self.root) for _ in range(self.root.exists()))]


@contextmanager
def running(*words: str) -> Iterator[Run]:
    """Start the program with one Linux worker."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fleet", "--workers", "1", *words],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield Run(process)
        finally:
            process.send_signal(signal.SIGTERM)


@pytest.mark.e2e
def test_it_builds_on_both_systems_is_scraped_shows_its_pages_and_leaves_nothing() -> None:
    with running("--check") as run:
        assert run.read_all() == 0, run.output
        checks = [line.strip() for line in run.output.partition("\nchecks\n")[2].splitlines()]
        assert [line.split()[:2] for line in checks[:5]] == [
            ["35", "steps"],
            ["a", "plain"],
            ["the", "coordinator"],
            ["Prometheus", "finds"],
            ["6", "pages"],
        ]
        assert run.left() == []


@pytest.mark.e2e
def test_a_fleet_whose_keeper_is_killed_while_workers_join_is_gone_within_seconds() -> None:
    with running() as run:
        run.read_until("Prometheus")
        records = [record.read_text().strip() for record in (run.root / "farm" / "ray").iterdir()]
        # A node's record may be there and not written yet.
        nodes = [Path(record) for record in records if record]
        assert nodes
        with (run.root / LOCK).open() as lock:
            run.process.kill()
            # The undertaker holds it until it ends.
            fcntl.flock(lock, fcntl.LOCK_SH)
        assert run.left() == []
        assert [node for node in nodes if node.exists()] == []


@pytest.mark.e2e
def test_a_closed_terminal_ends_it_while_it_starts() -> None:
    with running() as run:
        run.read_until("PostgreSQL")
        assert run.process.stdout is not None
        # Nothing can be written any more.
        run.process.stdout.close()
        run.process.send_signal(signal.SIGHUP)
        assert run.process.wait(ENDED_WITHIN_S) == 0
        assert run.left() == []


def test_a_fleet_whose_undertaker_was_killed_too_is_cleared_by_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / f"{PREFIX}dead"
    root.mkdir()
    (root / LOCK).touch()
    (root / "closed").mkdir()
    (root / "closed" / "file").touch()
    (root / "closed").chmod(0o500)
    young = tmp_path / f"{PREFIX}young"
    young.mkdir()
    environment = {**os.environ, "DROVER_TEST_MARK": str(root)}
    # A person who reads a fleet's log is none of its parts.
    with (
        subprocess.Popen(["sleep", "600"], env=environment) as part,
        subprocess.Popen(["tail", "-f", root / "closed" / "file"]) as reader,
    ):
        assert list(members(root)) == [part.pid]
        assert clear_dead(tmp_path) == [root]
        assert part.wait(ENDED_WITHIN_S) == -signal.SIGKILL
        assert reader.poll() is None
        reader.kill()
    assert list(tmp_path.iterdir()) == [young]
