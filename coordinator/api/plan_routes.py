"""The route of plans; `coordinator.api.routes` has it among its own."""

from __future__ import annotations

from typing import Any, Final

from coordinator.api.plan_models import PlanView
from coordinator.api.route import Right, Route

PLAN: Final = Route(
    "POST",
    "/api/v1/plan",
    Right.API,
    body="PlanQuery",
    answer=PlanView,
    errors=(408, 413, 422),
    repeats=True,
    summary="What each package and system of a wish list could be fetched from, or would be built as. Changes nothing.",
)

#: All of this room.
PLAN_ROUTES: Final[tuple[Route[Any], ...]] = (PLAN,)
