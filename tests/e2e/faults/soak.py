"""A farm that is hurt at random for as long as you like: `./run soak --minutes 60`, for a night and not for CI.

Graphs of short builds are submitted, cancelled and drained while coordinator, Ray head, nodes, agents, daemons and
builders are killed. Then all is left in peace, and the judgement of the fault tests is passed: every submission ends,
every worker is back, nothing ran twice without a reason, everything that is done can be fetched, nothing is left over.

A seed gives the same order of hurts, but not the same moments: real processes have their own time.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from infra.process_tree import process_tree
from scheduler import facts
from tests.e2e.faults.conftest import FarmUnderFault

WORKERS = ("left", "middle", "right")
#: Steps of one graph.
STEPS = 60
#: Seconds that the farm has for becoming whole again, and for ending what was submitted.
HEAL_S = 180.0
END_S = 600.0
#: What is killed, by what its command line holds.
PARTS = {
    "agent": b"ray::AgentHost",
    "raylet": b"raylet/raylet\0",
    "raylet's agent": b"/bin/sh\0-ec",
    "daemon": b"nix-daemon",
    "builder": b"/bin/sh\0-c",
}
DEEDS = ("coordinator", "head", "node", "stop", "submit", "cancel", "drain", "undrain", "undrain", *PARTS)


class Soak:
    """One farm and what is done to it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.began = time.monotonic()
        self.submissions: list[str] = []
        self.complaints: list[str] = []
        self.hurt = FarmUnderFault(root, WORKERS, slots=2)
        self.hurt.farm.start().wait_for_workers(len(WORKERS))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:8.1f}  {text}", flush=True)

    def complain(self, text: str) -> None:
        self.complaints.append(text)
        self.say(f"WRONG: {text}")

    def submit(self) -> None:
        """A graph in which each step needs up to two of the ten before it."""
        number = len(self.submissions)
        names = [f"g{number}s{index}" for index in range(STEPS)]
        lines = []
        for index, name in enumerate(names):
            needs = " ".join(self.chance.sample(names[max(0, index - 10) : index], min(index, 2)))
            pause = self.chance.choice(["0", "0", "0.2", "1", "3"])
            lines.append(f'{name} = step "{name}" [ {needs} ] "/bin/busybox sleep {pause}";')
        lines.append(f'top = step "top{number}" [ {" ".join(names)} ] ":";')
        self.submissions.append(self.hurt.submit(self.hurt.graph("\n".join(lines)), "top"))

    def deed(self) -> None:
        """Do one thing; a client that meets a coordinator which is not there is no news."""
        what, worker = self.chance.choice(DEEDS), self.chance.choice(WORKERS)
        self.say(f"{what} ({worker})" if what in {"node", "drain", "undrain", *PARTS} else what)
        farm = self.hurt.farm
        match what:
            case "coordinator":
                farm.kill()
                time.sleep(self.chance.choice([0, 1, 4]))
                farm.start()
            case "stop":
                if status := farm.stop():
                    self.complain(f"the farm stopped with status {status}")
                farm.start()
            case "head":
                self.kill("head")
            case "node":
                self.kill(f"worker-{worker}")
            case "submit":
                with suppress(AssertionError):
                    self.submit()
            case "cancel":
                farm.drover("cancel", self.chance.choice(self.submissions))
            case "drain":
                farm.drover("drain", worker)
            case "undrain":
                farm.drover("drain", worker, "--off")
            case _:
                self.kill(f"worker-{worker}", PARTS[what])

    def kill(self, record: str, part: bytes = b"") -> None:
        """Kill all of a Ray node, or one process of it."""
        with suppress(OSError, ValueError):
            tree = [process.pid for process in process_tree(self.hurt.leader(record))]
            if part:
                fitting = [pid for pid in tree if part in _command(pid)]
                tree = [self.chance.choice(fitting)] if fitting else []
            for pid in tree:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def judge(self) -> None:
        """Leave the farm in peace, and say what is wrong with it afterwards."""
        self.say("peace")
        farm = self.hurt.farm
        for worker in WORKERS:
            self.within(HEAL_S, f"worker {worker} is back", partial(self.is_back, worker))
        self.submit()
        for submission in self.submissions:
            self.within(END_S, f"submission {submission} ends", partial(self.has_ended, submission))
            view = self.hurt.view(submission)
            self.say(f"{submission} {view['state']} { ({k: v for k, v in view['counts'].items() if v}) }")
            if view["state"] == "failed":
                self.complain(f"submission {submission} failed, and no builder did")
            with self.judging():
                self.hurt.can_be_fetched(view)
        if status := farm.stop():
            self.complain(f"the farm stopped with status {status}")
        with self.judging():
            self.hurt.nothing_ran_twice_without_a_reason()
        if left := farm.processes_left():
            self.complain(f"left over: {left}")
        reasons = Counter(f.failure.kind.value for f in self.hurt.journal() if isinstance(f, facts.LeaseRevoked))
        runs = self.hurt.runs()
        self.say(f"{sum(runs.values())} runs of {len(runs)} steps; leases ended early: {dict(reasons)}")

    def is_back(self, worker: str) -> bool:
        """Return whether a worker takes work."""
        self.hurt.farm.drover("drain", worker, "--off")
        return any(each["name"] == worker and each["state"] == "online" for each in self.hurt.farm.api("workers"))

    def has_ended(self, submission: str) -> bool:
        return bool(self.hurt.view(submission)["state"] != "running")

    def within(self, seconds: float, what: str, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.complain(f"not within {seconds:.0f} s: {what}")
                return
            time.sleep(1.0)

    @contextmanager
    def judging(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            self.complain(str(error)[:2000])


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run soak", description="Hurt a real farm at random, then judge it.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long it is hurt")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    told = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="drover-soak-"))
    root.chmod(0o755)
    print(f"seed {told.seed}, in {root}", flush=True)
    soak = Soak(root, told.seed)
    try:
        soak.submit()
        while time.monotonic() - soak.began < told.minutes * 60:
            time.sleep(soak.chance.uniform(0.5, 8.0))
            soak.deed()
        soak.judge()
    finally:
        soak.hurt.farm.stop()
    if soak.complaints:
        print(f"{len(soak.complaints)} things are wrong; the farm's log and state are kept in {root}", flush=True)
        return 1
    # A store's directories are read-only.
    for directory, _, _ in os.walk(root):
        Path(directory).chmod(0o755)
    shutil.rmtree(root)
    print("all is well", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
