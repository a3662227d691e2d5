"""Counts and times of an engine's turns: plain numbers, which `coordinator.observability` reads.

Only what happens is counted: facts that a replay takes in are history of an earlier process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, get_args

from infra.histogram import SECONDS, Histogram
from scheduler.facts import Fact, LeaseRevoked, StepDone, StepFailed, StepFellBack
from scheduler.model import FailureKind

#: Parts of a turn: decisions of the core, commit of the journal, folding into the views.
TurnPart = Literal["core", "journal", "views"]
_COUNTED: Final = frozenset({StepDone, StepFailed, LeaseRevoked, StepFellBack})


class EngineMeter:
    """Numbers of one engine since the start of its process."""

    def __init__(self) -> None:
        #: Events that the core took in, and facts that the journal took.
        self.events = 0
        self.durable_facts = 0
        #: Attempts that did not succeed, by kind; all kinds are there, so that a first failure shows as an increase.
        self.failures: Counter[str] = Counter({kind.value: 0 for kind in FailureKind})
        #: Steps that ended by a build, "done" or "failed".
        self.ended: Counter[str] = Counter({"done": 0, "failed": 0})
        #: Wall time of each part of a turn.
        self.parts: dict[str, Histogram] = {part: Histogram(SECONDS) for part in get_args(TurnPart)}

    def count(self, facts: Sequence[Fact]) -> None:
        """Count what new facts say."""
        for fact in facts:
            # A large submission has ten thousands of facts that are not counted.
            if type(fact) in _COUNTED:
                self._count(fact)

    def _count(self, fact: Fact) -> None:
        match fact:
            case StepDone():
                self.ended["done"] += 1
            case StepFailed():
                self.ended["failed"] += 1
                self.failures[fact.failure.kind] += 1
            case LeaseRevoked() | StepFellBack():
                self.failures[fact.failure.kind] += 1
            case _:
                pass

    @contextmanager
    def timing(self, part: TurnPart) -> Iterator[None]:
        """Measure the block as a part of a turn."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part].add(time.perf_counter() - began_s)
