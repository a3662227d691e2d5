"""The routes of tracked environments; `coordinator.api.routes` has them among its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from coordinator.api.route import Content, Late, Query, Right, Route

if TYPE_CHECKING:
    from coordinator.api.environments import CoverageView, EnvironmentView

_V1: Final = "/api/v1"
_ENVIRONMENTS: Final = f"{_V1}/environments"
_ENVIRONMENT: Final = f"{_ENVIRONMENTS}/{{environment}}"
#: It is another owner's, or this takes the farm's own token; it is not there; the body is refused.
_OWNED: Final = (403,)
_NAMED: Final = (404,)
_BODY: Final = (408, 413)
_MARK: Final = Query("mark", "What the source calls this content, such as a commit; its digest if left out.")

ENVIRONMENTS: Final[Route[EnvironmentView]] = Route(
    "GET",
    _ENVIRONMENTS,
    Right.API,
    answer=Late("environments", "EnvironmentView"),
    many=True,
    summary="The tracked environments, by name.",
)
ENVIRONMENT: Final[Route[EnvironmentView]] = Route(
    "GET",
    _ENVIRONMENT,
    Right.API,
    answer=Late("environments", "EnvironmentView"),
    errors=_NAMED,
    summary="One environment, with the revisions that are remembered.",
)
TRACK: Final[Route[EnvironmentView]] = Route(
    "PUT",
    _ENVIRONMENT,
    Right.API,
    body="TrackRequest",
    answer=Late("environments", "EnvironmentView"),
    errors=(*_OWNED, 409, *_BODY, 422),
    summary="Track an environment, or give one another source or other owners; its history stays.",
)
FORGET_ENVIRONMENT: Final = Route[None](
    "DELETE",
    _ENVIRONMENT,
    Right.API,
    status=204,
    errors=(*_OWNED, *_NAMED),
    summary="Forget an environment, its history, and that its paths are kept.",
)
LOOK: Final[Route[EnvironmentView]] = Route(
    "POST",
    f"{_ENVIRONMENT}/look",
    Right.API,
    answer=Late("environments", "EnvironmentView"),
    errors=(*_OWNED, *_NAMED, 422),
    repeats=True,
    summary="Look at the source of an environment now: what a webhook calls.",
)
PUSH_CONTENT: Final[Route[EnvironmentView]] = Route(
    "PUT",
    f"{_ENVIRONMENT}/content",
    Right.API,
    body=Content.WISHES,
    answer=Late("environments", "EnvironmentView"),
    errors=(*_OWNED, *_NAMED, 409, *_BODY, 422),
    summary="Send what an environment consists of: a lock file, a list of store paths, or lines of nix-eval-jobs.",
    query=(
        Query("file", "Name of the file that it is from, which says its form."),
        Query("system", "System of store paths that do not say theirs; the coordinator's if left out."),
        _MARK,
    ),
)
PUSH_SUBMISSION: Final[Route[EnvironmentView]] = Route(
    "POST",
    f"{_ENVIRONMENT}/revisions",
    Right.API,
    body="PushSubmissionRequest",
    answer=Late("environments", "EnvironmentView"),
    errors=(*_OWNED, *_NAMED, 409, *_BODY, 422),
    repeats=True,
    summary="Let an environment consist of the roots of a submission.",
)
ROLL_BACK: Final[Route[EnvironmentView]] = Route(
    "POST",
    f"{_ENVIRONMENT}/rollback",
    Right.API,
    body="RollbackRequest",
    answer=Late("environments", "EnvironmentView"),
    errors=(*_OWNED, *_NAMED, 409, *_BODY, 422),
    summary="Move `stable` back, for some systems or all; it stays there until a newer revision is whole.",
)
COVERAGES: Final[Route[CoverageView]] = Route(
    "GET",
    f"{_V1}/coverage",
    Right.API,
    answer=Late("environments", "CoverageView"),
    many=True,
    summary="How much of each environment can be fetched on each system.",
)
COVERAGE: Final[Route[CoverageView]] = Route(
    "GET",
    f"{_ENVIRONMENT}/coverage",
    Right.API,
    answer=Late("environments", "CoverageView"),
    errors=_NAMED,
    summary="How much of an environment can be fetched on each system, what cannot and why, and how that was before.",
)

#: In the order of the API's description.
ENVIRONMENT_ROUTES: Final[tuple[Route[Any], ...]] = (
    ENVIRONMENTS,
    ENVIRONMENT,
    TRACK,
    FORGET_ENVIRONMENT,
    LOOK,
    PUSH_CONTENT,
    PUSH_SUBMISSION,
    ROLL_BACK,
    COVERAGES,
    COVERAGE,
)
