"""The route of plans; `coordinator.api.routes` has it among its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from coordinator.api.route import Late, Right, Route

if TYPE_CHECKING:
    from coordinator.api.plan_models import PlanView

PLAN: Final[Route[PlanView]] = Route(
    "POST",
    "/api/v1/plan",
    Right.API,
    body="PlanQuery",
    answer=Late("plan_models", "PlanView"),
    errors=(408, 413, 422),
    repeats=True,
    summary="What each package and system of a wish list could be fetched from, or would be built as. Changes nothing.",
)

#: All of this room.
PLAN_ROUTES: Final[tuple[Route[Any], ...]] = (PLAN,)
