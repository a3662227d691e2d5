"""The route of the capacity that the farm could use; `coordinator.api.routes` has it and those of plans."""

from __future__ import annotations

from typing import Any, Final

from coordinator.api.plan_routes import PLAN_ROUTES
from coordinator.api.route import Right, Route
from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class CapacityClassView:
    """Open work that requires the same of a worker."""

    system: str
    features: tuple[str, ...]
    #: Memory of one build, a power of two; 0 where nothing is said of it.
    memory_bytes: int
    #: Steps that could begin now, that run, and that wait for others.
    ready: int
    running: int
    waiting: int
    #: Slots that are worth having now: no more than steps that can run, each with a minute of work at least.
    slots: int
    #: Slots of the workers that could take these steps now; other classes may want the same.
    slots_present: int
    #: Hours of one usual slot that all of it should take.
    hours: float


@record(frozen=True, slots=True, kw_only=True)
class CapacityView:
    """The capacity that the farm could use, as of `at`."""

    at: float
    classes: tuple[CapacityClassView, ...] = ()


CAPACITY: Final = Route(
    "GET",
    "/api/v1/capacity",
    Right.API,
    answer=CapacityView,
    summary="The slots and hours that the farm's open work could use, by system, features and memory.",
)

#: Routes of tables that `coordinator.api.routes` has no room for.
FURTHER_ROUTES: Final[tuple[Route[Any], ...]] = (*PLAN_ROUTES, CAPACITY)
