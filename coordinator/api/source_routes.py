"""The route of sources; `coordinator.api.routes` has it, and that of demand, among its own."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from coordinator.api.demand_routes import DEMAND
from coordinator.api.route import Query, Right, Route
from infra.records import record


class SourceTrouble(StrEnum):
    """Reasons why the farm cannot do without an address, or does not have a source."""

    #: Its address says that there is nothing.
    GONE = "gone"
    #: Its address does not answer, or fails.
    UNREACHABLE = "unreachable"
    #: Its address gave something else than the derivation promises.
    MISMATCH = "mismatch"
    #: Its fetch failed in another way.
    FAILED = "failed"
    #: It is yet to be fetched, and neither the cache nor an upstream nor a mirror has it.
    NETWORK_ONLY = "network only"


@record(frozen=True, slots=True, kw_only=True)
class SourceView:
    """A fixed output that the farm has not: why, and where it was looked for."""

    step: str
    name: str
    trouble: SourceTrouble
    #: Full store path, and content address `fixed:[r:]ALGORITHM:HASH`; empty where the derivation cannot be read.
    path: str = ""
    content: str = ""
    #: Addresses that its derivation names.
    urls: tuple[str, ...] = ()
    #: State of its step, and what its last fetch said.
    state: str
    message: str = ""
    #: A sentence for each upstream and mirror that was asked.
    answers: tuple[str, ...] = ()
    #: When its last fetch ended; 0 for none.
    at: float = 0.0


SOURCES: Final = Route(
    "GET",
    "/api/v1/sources",
    Right.API,
    answer=SourceView,
    many=True,
    summary="Sources that the farm could not do without: fixed outputs that are not here, and what became of them.",
    query=(Query("trouble", "Only sources with these troubles.", words=tuple(SourceTrouble)),),
)

#: What people wait for, and what the farm lacks itself.
WANTED_ROUTES: Final[tuple[Route[Any], ...]] = (DEMAND, SOURCES)
