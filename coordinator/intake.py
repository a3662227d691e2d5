"""From a client's closure to steps: what is missing, is it true, what must be built.

The only module that turns derivations into steps. The three requests of a client, in order: `missing`, the two streams,
`submit`. Every error is an `IntakeError` whose sentence names the member that is at fault.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass

from infra.cache.objects import ObjectStore
from infra.nix.store_path import StoreDir

from coordinator.derivations import DerivationStore, StepInfo
from coordinator.schema import IntakeMissing, IntakeQuery, SubmitRequest
from infra.cache import Cache
from scheduler.events import SubmissionReceived
from scheduler.model import StepKey, StepSpec, SubmissionId


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request; an error names the limit and the count."""

    max_derivations: int = 200_000
    max_sources: int = 100_000
    max_derivation_bytes: int = 16 * 1024 * 1024
    max_stream_bytes: int = 4 * 1024 * 1024 * 1024
    max_recipes: int = 8


@dataclass(frozen=True, slots=True)
class PlannedRoot:
    """A wish and the step that it stands on; `outputs` are the wanted (name, full path), sorted by name."""

    attr: str
    drv: str
    step: StepKey
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """A submission as steps. `infos` has one entry for each of `steps` and each of `held`."""

    roots: tuple[PlannedRoot, ...]
    steps: tuple[StepSpec, ...]
    #: Steps that the cache holds and at which the graph ends; not in `steps`.
    held: tuple[StepKey, ...]
    infos: tuple[StepInfo, ...]
    #: Derivations of the submission that stand behind `steps` and `held`.
    derivations: int = 0

    def event(self, submission: SubmissionId) -> SubmissionReceived:
        """Return the core's event for this plan."""
        return SubmissionReceived(
            submission=submission,
            roots=tuple(dict.fromkeys(root.step for root in self.roots)),
            steps=self.steps,
            held=self.held,
        )


class Intake:
    """Verifies and stores what clients send, and plans submissions."""

    def __init__(
        self,
        derivations: DerivationStore,
        cache: Cache,
        objects: ObjectStore,
        store_dir: StoreDir,
        limits: Limits | None = None,
    ) -> None:
        self._derivations = derivations
        self._cache = cache
        self._objects = objects
        self._store_dir = store_dir
        self._limits = limits or Limits()

    async def missing(self, query: IntakeQuery) -> IntakeMissing:
        """Return the part of the query that must be sent."""
        raise NotImplementedError

    async def add_derivations(self, body: AsyncIterable[bytes]) -> int:
        """Verify and store a derivations stream (coordinator.framing), all or nothing; returns how many it held."""
        raise NotImplementedError

    async def add_sources(self, body: AsyncIterable[bytes]) -> int:
        """Verify, upload and publish a sources stream, in order; returns how many it held."""
        raise NotImplementedError

    async def submit(self, request: SubmitRequest) -> Planned:
        """Plan a submission of derivations that are stored: steps, and which of them the cache holds."""
        raise NotImplementedError
