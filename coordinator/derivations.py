"""The derivations that the coordinator has verified, and which of them are recipes of which step.

A row is written only when the derivation's whole input closure is stored and verified, so whoever reads a derivation
here may rely on everything below it. Rows never change. A member of a step gets its recipe index (`ordinal`) when it is
first submitted and keeps it for ever: the journal names recipes by that index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from scheduler.model import StepKey


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """What a worker needs to build one recipe of a step: see `workers.protocol.LeaseOrder`."""

    #: Full store path of the .drv.
    drv_path: str
    #: The .drv's bytes.
    derivation: bytes
    #: Full store paths: input sources and the chosen outputs of input derivations, sorted.
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepInfo:
    """A step as people see it; taken from its first recipe."""

    key: StepKey
    name: str
    system: str
    features: tuple[str, ...]
    #: Full store path of the .drv.
    drv: str
    #: Output name and full store path, sorted by name.
    outputs: tuple[tuple[str, str], ...]


class DerivationStore:
    """The tables `derivations` and `members`; one instance on one engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def prepare(self) -> None:
        """Create the tables where they are missing."""
        raise NotImplementedError

    async def orders(self, wanted: Sequence[tuple[StepKey, int]]) -> Mapping[tuple[StepKey, int], BuildOrder]:
        """Return what to send for each (step, recipe index); unknown pairs are absent. One query."""
        raise NotImplementedError

    async def steps(self, keys: Sequence[StepKey]) -> Mapping[StepKey, StepInfo]:
        """Return what people want to know of each step; unknown keys are absent. One query."""
        raise NotImplementedError
