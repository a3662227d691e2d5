"""Standings of packages, from the verdicts of a plan: the same answer for coverage, pointers and `drover plan`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from coordinator.api.plan_models import PlanState, PlanView, WishPlan
from coordinator.environments.coverage import PackageStanding, Way
from coordinator.wishes.model import WishList

#: Packages of one plan: people who ask for plans get their turn in between.
PLANNED_AT_ONCE: Final = 5_000
#: Further plans where the time for upstreams was over before all was looked up: each goes on where that one was.
PLANS_MORE: Final = 8
#: What a user's Nix does, and the word for why a package is not fetched.
WAYS: Final[Mapping[PlanState, tuple[Way, str]]] = {
    "here": (Way.HERE, ""),
    "upstream": (Way.UPSTREAM, ""),
    "building": (Way.LOCAL, "building"),
    "buildable": (Way.LOCAL, "not tried"),
    "no_worker": (Way.LOCAL, "no worker"),
    "unevaluated": (Way.LOCAL, "not tried"),
    "unknown": (Way.LOCAL, "unknown"),
    # It would be built on the user's machine too, and fail there.
    "failed": (Way.IMPOSSIBLE, "failed"),
    "unfree": (Way.IMPOSSIBLE, "unfree"),
    "insecure": (Way.IMPOSSIBLE, "insecure"),
    "broken": (Way.IMPOSSIBLE, "broken"),
    "unsupported": (Way.IMPOSSIBLE, "unsupported"),
    "gone": (Way.IMPOSSIBLE, "nowhere"),
}


class PlannedStandings:
    """Finds how packages stand, by plans of them."""

    def __init__(self, plan: Callable[[WishList], Awaitable[PlanView]]) -> None:
        self._plan = plan

    async def of(self, content: WishList) -> Sequence[PackageStanding]:
        """Return how each package stands. Raises `IntakeError`, `UnavailableError` as a plan does."""
        found: list[PackageStanding] = []
        for start in range(0, len(content.wishes), PLANNED_AT_ONCE):
            part = replace(content, wishes=content.wishes[start : start + PLANNED_AT_ONCE])
            plan = await self._plan(part)
            for _ in range(PLANS_MORE):
                if not plan.unfollowed:
                    break
                plan = await self._plan(part)
            found += standings(plan)
        return found


def standings(plan: PlanView) -> Iterator[PackageStanding]:
    """Yield how each wish of a plan stands."""
    away = [each.url for each in plan.upstreams if each.state != "answered"]
    for wish in plan.wishes:
        way, reason = WAYS[wish.state]
        if wish.state == "building" and wish.because:
            reason = "no worker"
        if way.is_fetched:
            yield PackageStanding(wish.system, wish.name, way)
        else:
            detail = _detail(wish)
            if away:
                detail = "; ".join(filter(None, (detail, f"{away[0]} does not answer, so it may be there")))
            yield PackageStanding(wish.system, wish.name, way, reason, detail)


def _detail(wish: WishPlan) -> str:
    if wish.state == "failed" and wish.cause:
        if wish.cause == wish.step:
            return "its own build fails"
        return f"because {wish.cause_name or wish.cause} fails"
    return wish.because
