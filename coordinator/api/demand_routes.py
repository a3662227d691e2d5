"""The route of demand; `coordinator.api.routes` has it among its own."""

from __future__ import annotations

from typing import Final

from coordinator.api.route import Right, Route
from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class DemandView:
    """A path that clients of the cache asked for and did not get.

    `people` is how many asked, roughly, within the last days; nothing is known about them. Texts are empty, and `known`
    is false, where no submitted derivation makes the path.
    """

    hash_part: str
    known: bool = False
    path: str = ""
    name: str = ""
    system: str = ""
    #: Full path of a .drv that makes it.
    drv: str = ""
    people: int
    requests: int
    first_at: float
    last_at: float
    #: State of its step; empty where no submission that is remembered wants it.
    state: str = ""
    #: What the farm did about it, and the submission that builds it.
    note: str = ""
    submission: str = ""


DEMAND: Final = Route(
    "GET",
    "/api/v1/demand",
    Right.API,
    answer=DemandView,
    many=True,
    summary="What people wait for: paths that clients of the cache asked for and did not get, the most wanted first.",
)
