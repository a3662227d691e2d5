"""The routes of remote evaluation; `coordinator.api.routes` has them among its own."""

from __future__ import annotations

from typing import Any, Final

from coordinator.api.evaluations import EvaluationState, EvaluationView
from coordinator.api.route import Content, Query, Right, Route

_V1: Final = "/api/v1"

PUT_TREE: Final = Route[None](
    "PUT",
    f"{_V1}/trees/{{tree}}",
    Right.API,
    body=Content.TREE,
    status=204,
    errors=(408, 422),
    summary="Send a tree of files for a remote evaluation, named by the SHA-256 of its NAR in hexadecimal.",
)
EVALUATE: Final = Route(
    "POST",
    f"{_V1}/evaluations",
    Right.API,
    body="RemoteEvaluationRequest",
    answer=EvaluationView,
    status=201,
    errors=(404, 408, 409, 413, 422),
    summary="Evaluate a tree that was sent, or a git revision, on the coordinator's machine, and submit what is found.",
)
EVALUATION: Final = Route(
    "GET",
    f"{_V1}/evaluations/{{id}}",
    Right.API,
    answer=EvaluationView,
    errors=(404,),
    summary="One remote evaluation of the token's owner, as it stands.",
    query=(Query("seen", "Answer once its state is another one, 20 s later at most.", words=tuple(EvaluationState)),),
)
CANCEL_EVALUATION: Final = Route(
    "POST",
    f"{_V1}/evaluations/{{id}}/cancel",
    Right.API,
    answer=EvaluationView,
    errors=(404,),
    summary="End a remote evaluation; what it has submitted goes on. A repeat changes nothing.",
)
EVALUATION_ROUTES: Final[tuple[Route[Any], ...]] = (PUT_TREE, EVALUATE, EVALUATION, CANCEL_EVALUATION)
