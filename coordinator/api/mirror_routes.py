"""The routes of paths from upstreams; `coordinator.api.routes` has them among its own."""

from __future__ import annotations

from typing import Any, Final

from coordinator.api.mirroring import KnownDerivationsView, MirrorState, MirrorView
from coordinator.api.route import Query, Right, Route

_V1: Final = "/api/v1"

MIRROR: Final = Route(
    "POST",
    f"{_V1}/mirrorings",
    Right.API,
    body="MirrorRequest",
    answer=MirrorView,
    status=201,
    errors=(408, 413, 422),
    summary="Have store paths, with all that they refer to, from the farm's upstreams; what is here is not fetched.",
)
MIRRORING: Final = Route(
    "GET",
    f"{_V1}/mirrorings/{{id}}",
    Right.API,
    answer=MirrorView,
    errors=(404,),
    summary="One run of mirroring, as it stands.",
    query=(Query("seen", "Answer once its state is another one, 2 s later at most.", words=tuple(MirrorState)),),
)
CANCEL_MIRRORING: Final = Route(
    "POST",
    f"{_V1}/mirrorings/{{id}}/cancel",
    Right.API,
    answer=MirrorView,
    errors=(404,),
    summary="End a run of mirroring; what it has published stays. A repeat changes nothing.",
)
KNOWN_DERIVATIONS: Final = Route(
    "POST",
    f"{_V1}/derivations/known",
    Right.API,
    body="KnownDerivationsQuery",
    answer=KnownDerivationsView,
    errors=(408, 413),
    repeats=True,
    summary="Which derivations the farm has, and which of them make some store paths: it can build these.",
)
MIRROR_ROUTES: Final[tuple[Route[Any], ...]] = (MIRROR, MIRRORING, CANCEL_MIRRORING, KNOWN_DERIVATIONS)
