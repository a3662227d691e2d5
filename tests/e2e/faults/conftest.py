"""Farms that are hurt on purpose, and what must be true of each when the dust has settled.

Every builder appends its name to a tally that lies outside its sandbox, so what really ran is known and not only what
the farm believes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.journal.journal import Journal
from infra.database import open_engine
from scheduler import facts
from scheduler.facts import Fact
from tests.support import patience
from tests.support.farm import Farm, WorkerSpec

#: Only ends a test that hangs.
PATIENCE_S = patience.PATIENCE_S


class FarmUnderFault:
    """A farm, the graphs that are built on it, and the judgement at the end."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        *,
        slots: int = 2,
        settings: str = "",
        journal_url: str = "",
        min_free_mb: int = 512,
    ) -> None:
        """`journal_url` is where the journal lies if `settings` say so."""
        self._prepare(root, journal_url, names)
        options = {"sandbox-paths": self.sandbox_paths}
        self.farm = Farm(
            root,
            [WorkerSpec(name, slots=slots, nix_options=options, min_free_mb=min_free_mb) for name in names],
            settings=settings,
        )

    def _prepare(self, root: Path, journal_url: str, names: Sequence[str] = ()) -> None:
        self.root = root
        self.names = tuple(names)
        self.journal_url = journal_url
        self.tally = root / "tally"
        self.tally.mkdir()
        self.tally.chmod(0o777)
        # Builders are users of their own, each worker's others.
        (self.tally / "log").touch()
        (self.tally / "log").chmod(0o666)

    @property
    def sandbox_paths(self) -> str:
        """Return the paths of this machine that builders see."""
        return f"/bin/sh=/bin/busybox /bin/busybox /tally={self.tally}"

    def graph(self, text: str) -> Path:
        """A file of derivations; `step name inputs script` makes one that tallies itself and echoes its inputs."""
        file = self.root / "graph.nix"
        file.write_text(
            f"""
            let
              step = name: inputs: script: derivation {{
                inherit name; system = "x86_64-linux"; builder = "/bin/sh"; salt = "{self.root}";
                args = [ "-c" "echo ${{name}} >> /tally/log; ${{script}}; echo ${{toString inputs}} $salt > $out" ];
              }};
              range = first: last: if first > last then [ ] else [ first ] ++ range (first + 1) last;
            in rec {{ {text} }}
            """
        )
        return file

    def submit(self, file: Path, attr: str, *arguments: str) -> str:
        """Submit one attribute; returns the submission's id."""
        done = self.farm.build(file, "-A", attr, "--detach", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        submission: str = json.loads(done.stdout.splitlines()[-1])["id"]
        return submission

    def ended(self, submission: str) -> dict[str, Any]:
        """Wait for the end of a submission."""
        self.until(lambda: self.view(submission)["state"] != "running")
        return self.view(submission)

    def view(self, submission: str) -> dict[str, Any]:
        view: dict[str, Any] = self.farm.api(f"submissions/{submission}")
        return view

    def building(self) -> list[dict[str, Any]]:
        """The workers that build something now."""
        return [w for w in self.farm.api("workers") if any(stage == "building" for _, stage in w["leases"])]

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.farm.log_path.read_text(errors="replace")[-4000:]
            time.sleep(0.1)

    def leader(self, record: str) -> int:
        """Process id of a Ray node of the coordinator's: `head`, `coordinator` or `worker-NAME`."""
        return self.node(self.farm.state, record)

    def node(self, state: Path, record: str) -> int:
        """Process id of a Ray node whose owner has the state directory `state`."""
        directory = Path((state / "ray" / record).read_text().strip())
        leader: int = json.loads((directory / "node.json").read_text())["node"][0]
        return leader

    def runs(self, prefix: str = "") -> Counter[str]:
        """Count how often each builder really ran, by name, of those whose name begins so."""
        log = self.tally / "log"
        names = log.read_text().split() if log.exists() else []
        return Counter(name for name in names if name.startswith(prefix))

    def can_be_fetched(self, view: dict[str, Any]) -> None:
        """Everything that is reported done reaches a plain Nix client."""
        paths = [p for root in view["roots"] if root["state"] == "done" for p in root["outputs"].values()]
        if paths:
            fetched = self.farm.fetch(self.root / f"plain-{view['id']}", *paths)
            assert fetched.returncode == 0, fetched.stderr

    def nothing_ran_twice_without_a_reason(self) -> None:
        """After the farm has stopped: the journal has a reason for every lease after a step's first, and no build
        ran without a lease of its own."""
        leases: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for fact in self.journal():
            match fact:
                case facts.StepLeased():
                    leases[fact.lease.step] += 1
                case facts.LeaseRevoked():
                    assert fact.failure.message
                    reasons[fact.lease.step] += 1
                case _:
                    pass
        for step, count in leases.items():
            assert count <= 1 + reasons[step], step
        by_name = Counter[str]()
        for step, count in leases.items():
            by_name[_name_of(step)] += count
        for name, count in self.runs().items():
            assert count <= by_name[name], name

    def ended_early(self) -> list[facts.LeaseRevoked]:
        """Return what ended leases without a result, but for those that ended with a build which they followed."""
        found = [fact for fact in self.journal() if isinstance(fact, facts.LeaseRevoked)]
        return [fact for fact in found if not fact.failure.message.startswith("it followed ")]

    def journal(self) -> list[Fact]:
        async def read() -> list[Fact]:
            file = self.farm.state / "journal.sqlite3"
            engine = open_engine(self.journal_url or f"sqlite+aiosqlite:///{file}")
            try:
                return [fact async for piece in Journal(engine).load() for fact in piece.facts]
            finally:
                await engine.dispose()

        return asyncio.run(read())

    def put_right(self) -> None:
        """After a test of a farm that others use too: it runs, nothing is built, and all its workers take work."""
        if not self.farm.runs:
            self.farm.start()
        for view in self.farm.api("submissions"):
            if view["state"] == "running":
                self.farm.drover("cancel", view["id"])
        for worker in self.farm.api("workers"):
            if worker["state"] == "draining":
                self.farm.drover("drain", worker["name"], "--off")
        self.farm.wait_for_workers(len(self.names))

    def is_whole_at_the_end(self) -> None:
        """The last that is asserted of a farm: it ends in order, and its journal has a reason for all that it did."""
        assert self.farm.stop() == 0
        assert self.farm.processes_left() == {}
        self.nothing_ran_twice_without_a_reason()


def _name_of(step: str) -> str:
    """The derivation's name in a step's key, which is made of its outputs' base names."""
    return step.partition("-")[2]


@contextmanager
def running_farm(root: Path, *names: str, **told: Any) -> Iterator[FarmUnderFault]:
    """A farm for several tests, with all its workers; ended with the block."""
    one = FarmUnderFault(root, names, **told)
    try:
        one.farm.start().wait_for_workers(len(names))
        yield one
    finally:
        one.farm.stop()
        one.farm.clear()


def running_phases(one: FarmUnderFault, submission: str) -> list[str]:
    """Return the phase of each running step of a submission."""
    return [step["phase"] for step in one.farm.api(f"submissions/{submission}/steps?state=running")]


MakeFarm = Callable[..., FarmUnderFault]


@pytest.fixture
def hurt(tmp_path: Path) -> Iterator[MakeFarm]:
    """Makes and starts one farm; `hurt("a", "b", slots=2)`."""
    made: list[FarmUnderFault] = []

    def make(*names: str, **told: Any) -> FarmUnderFault:
        one = FarmUnderFault(tmp_path, names, **told)
        made.append(one)
        one.farm.start().wait_for_workers(len(names))
        return one

    yield make
    for one in made:
        one.farm.stop()
        one.farm.clear()
