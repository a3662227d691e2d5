"""Open work of the farm by what it requires, in steps and in time: what a farm that grows and shrinks goes by.

Memory is what a build is expected to take (`Step.memory_bytes`), up to the next power of two; 0: that is not known.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from scheduler.model import Requirements, StepState
from scheduler.pauses import PAUSE, PIECE, Pause
from scheduler.records import Step
from scheduler.state import FarmState

#: A slot is worth having for so much work that can begin now: a machine takes as long to come.
WORTH_MS: Final = 60_000


@dataclass(slots=True)
class Workload:
    """Open steps that require the same. Works are milliseconds on a builder of speed 1."""

    requirements: Requirements
    memory_bytes: int = 0
    #: Steps that could begin now, those that run, and those that wait for others.
    ready: int = 0
    running: int = 0
    waiting: int = 0
    #: Work of what is ready or runs, and of all.
    ready_ms: int = 0
    work_ms: int = 0

    @property
    def slots(self) -> int:
        """Return the slots that are worth having: one for each step that can run now, and enough work for each."""
        enough = -(-self.ready_ms // WORTH_MS)
        return max(self.running, min(self.ready + self.running, enough))


def workloads(state: FarmState) -> Generator[Pause, None, tuple[Workload, ...]]:
    """Return the open work by requirements and memory, sorted, with pauses between which the farm may go on."""
    found: dict[tuple[Requirements, int], Workload] = {}
    for count, step in enumerate(list(state.steps.values()), 1):
        if step.engaged and step.recipes and step.state in (StepState.WAITING, StepState.READY, StepState.LEASED):
            key = step.recipe.requirements, _memory(step)
            load = found.get(key)
            if load is None:
                load = found[key] = Workload(*key)
            _count(load, step)
        if not count % PIECE:
            yield PAUSE
    order = sorted(found, key=lambda key: (key[0].system, key[0].features, key[1]))
    return tuple([found[key] for key in order])


def _count(load: Workload, step: Step) -> None:
    load.work_ms += step.work_ms
    if step.state is StepState.WAITING:
        load.waiting += 1
        return
    load.ready_ms += step.work_ms
    if step.state is StepState.LEASED:
        load.running += 1
    else:
        load.ready += 1


def _memory(step: Step) -> int:
    return 1 << (step.memory_bytes - 1).bit_length() if step.memory_bytes else 0
