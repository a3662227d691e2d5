"""The port through which the coordinator reaches its workers, whatever carries the messages.

A fleet finds agents, greets them, polls each with one outstanding call and passes events to its sink **in order per
worker**. Events repeat until the sink returns: only then does the adapter acknowledge the batch, so the agent drops it.
A sink raises `NotKnownError` for a `WorkerSpoke` of an incarnation that is not the one it knows (a greeting came late,
after that of the next incarnation); the adapter then sends `hello` again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.errors import WorkerError
from workers.wire.messages import Batch, Hello, InputHint, Lease, LeaseOrder, Output


@dataclass(frozen=True, slots=True)
class WorkerConnected:
    """An agent answered `hello` (first contact, a new incarnation, or back after silence)."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class WorkerSpoke:
    """A batch arrived; an empty one is a heartbeat."""

    worker: str
    batch: Batch
    #: Seconds from the call to its answer; None where that was not measured.
    took_s: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerSilent:
    """The agent does not answer; unknown, not lost."""

    worker: str
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """The transport has confirmed the death of this incarnation."""

    worker: str
    incarnation: str
    reason: str


FleetEvent = WorkerConnected | WorkerSpoke | WorkerSilent | WorkerGone
Sink = Callable[[FleetEvent], Awaitable[None]]


class FleetError(WorkerError):
    """A call to a worker did not get through; the coordinator's view heals with the next heartbeat."""


class NotKnownError(FleetError):
    """A sink received `WorkerSpoke` from an incarnation that it does not know: the sender must greet again."""


class Fleet(Protocol):
    """Port of the coordinator to a transport."""

    @property
    def trouble(self) -> str:
        """Reason that workers cannot be found at the moment, "" while all is well."""

    async def run(self, sink: Sink) -> None:
        """Serve until cancelled: discover, greet, poll, report losses."""

    async def start_many(self, worker: str, orders: Sequence[LeaseOrder]) -> None:
        """Hand over leases. Raises `FleetError` where the worker could not be reached in time."""

    async def cancel(self, worker: str, leases: Sequence[Lease]) -> None:
        """Stop builds. Raises `FleetError` where the worker could not be reached in time."""

    async def drain(self, worker: str, *, on: bool) -> None:
        """Set or clear "no new work". Raises `FleetError`."""

    async def fetch_ahead(self, worker: str, hint: InputHint) -> None:
        """Let a worker that takes hints fetch inputs ahead of their lease. Raises `FleetError`."""

    async def provide(self, worker: str, paths: Sequence[str], token: str) -> tuple[Output, ...]:
        """Have those of the full paths that are valid in the worker's store uploaded again. Raises `FleetError`."""
