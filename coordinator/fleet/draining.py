"""Drain of a worker by its name, as people ask for it."""

from __future__ import annotations

from typing import Protocol

from coordinator.errors import NotFoundError, UnavailableError
from coordinator.readmodel.views import Views
from workers.wire.fleet import FleetError


class Drain(Protocol):
    """`Fleet.drain`."""

    async def __call__(self, worker: str, *, on: bool) -> None:
        """Give a worker no new leases, or again. Raises `FleetError`."""


async def drain_worker(views: Views, drain: Drain, name: str, *, on: bool) -> None:
    """Give a worker no new leases from now on, or again. Raises `NotFoundError`, `UnavailableError`."""
    if name not in {worker.name for worker in views.workforce.views()}:
        raise NotFoundError(f"there is no worker {name[:80]!r}; `drover workers` lists them.")
    try:
        await drain(name, on=on)
    except FleetError as error:
        raise UnavailableError(f"worker {name} was not reached: {error}; try again once it answers.") from None
