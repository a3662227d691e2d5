"""The route table of the HTTP API as data: routing, the rights check and the client's addresses follow from it.

One record a route; `coordinator.api.cache_routes` has those below a cache's prefix, `coordinator.api.web_routes` the
pages. `coordinator.http.routing` refuses to serve a handler without a record, and a record cannot be made without a
right.

Rules: 1. Times in bodies and answers are Unix seconds. 2. An answer of status 4xx or 5xx is an `ErrorView`:
`{"error": {"code": "...", "message": "one sentence and what to do"}}`. 3. A list (`many`) comes in pages: it takes
`?limit=` (100, at most 1000) and `?after=`; where there is more, a header `Link: <…>; rel="next"` has the address of
the next page, which has the same filters. A page of a filtered list may be short or empty although more follow.
4. `errors` lists what a route adds to `EVERY_ROUTE`; an answer that is in neither is logged as a fault.

Clients import this module for one short question, so it imports no pydantic (`coordinator.api.route`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, get_args

from coordinator.api import models
from coordinator.api.capacity_routes import FURTHER_ROUTES
from coordinator.api.environment_routes import ENVIRONMENT_ROUTES
from coordinator.api.evaluation_routes import EVALUATION_ROUTES
from coordinator.api.mirror_routes import MIRROR_ROUTES
from coordinator.api.route import Content, Late, Query, Right, Route
from coordinator.api.source_routes import WANTED_ROUTES
from coordinator.api.submission_filters import SUBMISSION_FILTERS

if TYPE_CHECKING:
    from coordinator.api.cache_models import CacheRootView, CacheView, CollectView, ResignView, VerifyView, WhyView
    from coordinator.api.difference_models import DifferenceView
    from coordinator.api.estimates import SubmissionEtaView, ThroughputView
    from coordinator.api.questions import ActivityView, CompletionsView, StepReasonsView
    from coordinator.api.rebuild_models import ComparedOutputsView, ForecastView, RebuildCausesView
    from coordinator.api.timeline_models import AttemptView, HistoryView

#: Where the API begins. An address below it that no record has wants the token too: strangers learn nothing of it.
API_PREFIX: Final = "/api/"
_V1: Final = "/api/v1"

#: The token is an owner's, and this takes the farm's own; the submission is another owner's.
_OPERATED: Final = (403,)
_OWNED: Final = (403,)
#: An idempotency key that belongs to another wish.
_CONFLICT: Final = (409,)
#: A named thing is not there; the body of a request comes too slowly, or is too large.
_NAMED: Final = (404,)
_BODY: Final = (408, 413)
#: Well formed, but derivations, sources or a graph that the farm does not take.
_GRAPH: Final = (422,)
#: Streams have bounds of their own, which are 400.
_STREAM: Final = (408, *_GRAPH)

_IN_STATES: Final = Query("state", "Only steps in these states.", words=tuple(models.StepStatus))

MISSING: Final = Route(
    "POST",
    f"{_V1}/intake/missing",
    Right.API,
    body="IntakeQuery",
    answer=models.IntakeMissing,
    errors=(*_BODY, *_GRAPH),
    repeats=True,
    summary="What must be sent of the closure of derivations and sources that a submission stands on.",
)
PUT_DERIVATIONS: Final = Route[None](
    "PUT",
    f"{_V1}/intake/derivations",
    Right.API,
    body=Content.DERIVATIONS,
    status=204,
    errors=_STREAM,
    summary="Send derivations, each after its inputs.",
)
PUT_SOURCES: Final = Route[None](
    "PUT",
    f"{_V1}/intake/sources",
    Right.API,
    body=Content.SOURCES,
    status=204,
    errors=_STREAM,
    summary="Send sources as NARs.",
)
SUBMIT: Final = Route(
    "POST",
    f"{_V1}/submissions",
    Right.API,
    body="SubmitRequest",
    answer=models.SubmissionView,
    status=201,
    errors=(*_CONFLICT, *_BODY, *_GRAPH),
    # The client gives each a key.
    repeats=True,
    summary="Submit derivations that the coordinator has. The answer names three of the roots.",
)
SUBMISSIONS: Final = Route(
    "GET",
    f"{_V1}/submissions",
    Right.API,
    answer=models.SubmissionView,
    many=True,
    errors=_NAMED,
    summary="All submissions, the newest first, with three roots of each.",
    query=(Query("after", "Name of the last submission of the page before."), *SUBMISSION_FILTERS),
)
SUBMISSION: Final = Route(
    "GET",
    f"{_V1}/submissions/{{id}}",
    Right.API,
    answer=models.SubmissionView,
    errors=_NAMED,
    summary="One submission, with its first 500 roots.",
)
CANCEL: Final = Route(
    "POST",
    f"{_V1}/submissions/{{id}}/cancel",
    Right.API,
    answer=models.SubmissionView,
    errors=(*_OWNED, *_NAMED),
    repeats=True,
    summary="Withdraw a submission; builds that another one wants go on. A repeat changes nothing.",
)
BUMP: Final = Route(
    "POST",
    f"{_V1}/submissions/{{id}}/bump",
    Right.API,
    body="BumpRequest",
    answer=models.SubmissionView,
    errors=(*_OWNED, *_NAMED, *_BODY),
    repeats=True,
    summary="Give a submission another priority among those of its owner.",
)
RETRY: Final = Route(
    "POST",
    f"{_V1}/submissions/{{id}}/retry",
    Right.API,
    answer=models.SubmissionView,
    errors=(*_OWNED, *_NAMED, *_GRAPH),
    repeats=True,
    summary="Run again what failed of a submission; a repeat changes nothing.",
)
ROOTS: Final = Route(
    "GET",
    f"{_V1}/submissions/{{id}}/roots",
    Right.API,
    answer=models.RootView,
    many=True,
    errors=_NAMED,
    summary="The roots of a submission.",
    query=(_IN_STATES,),
)
GROW: Final = Route(
    "POST",
    f"{_V1}/submissions/{{id}}/roots",
    Right.API,
    body="GrowRequest",
    answer=models.SubmissionView,
    errors=(*_OWNED, *_NAMED, *_CONFLICT, *_BODY, *_GRAPH),
    repeats=True,
    summary="Give an open submission further roots, or none to say that they still come. A repeat changes nothing.",
)
SEAL: Final = Route(
    "POST",
    f"{_V1}/submissions/{{id}}/seal",
    Right.API,
    body="SealRequest",
    answer=models.SubmissionView,
    errors=(*_OWNED, *_NAMED, *_CONFLICT, *_BODY),
    repeats=True,
    summary="End the growth of an open submission; it ends with its last step. A repeat changes nothing.",
)
STEPS: Final = Route(
    "GET",
    f"{_V1}/submissions/{{id}}/steps",
    Right.API,
    answer=models.StepView,
    many=True,
    errors=_NAMED,
    summary="The steps of a submission.",
    query=(_IN_STATES,),
)
SUBMISSION_TIMELINE: Final[Route[AttemptView]] = Route(
    "GET",
    f"{_V1}/submissions/{{id}}/timeline",
    Right.API,
    answer=Late("timeline_models", "AttemptView"),
    many=True,
    errors=_NAMED,
    summary="Attempts of the steps of a submission since it came. A page is of `limit` steps and may be empty.",
    query=(
        Query("outcome", "Only attempts that ended so.", words=get_args(models.AttemptOutcome)),
        Query("worker", "Only attempts on this worker."),
    ),
)
EVENTS: Final = Route[None](
    "GET",
    f"{_V1}/submissions/{{id}}/events",
    Right.API,
    answer=Content.EVENTS,
    errors=_NAMED,
    head=False,
    summary="Changes of a submission as server-sent events: `snapshot`, then `step` and `counts`, at last `end`; with "
    "`Last-Event-ID` those behind what has come.",
)
STEP: Final = Route(
    "GET",
    f"{_V1}/steps/{{key}}",
    Right.API,
    answer=models.StepView,
    errors=_NAMED,
    summary="One step, by its key or any unique part of it.",
)
TIMELINE: Final[Route[AttemptView]] = Route(
    "GET",
    f"{_V1}/steps/{{key}}/timeline",
    Right.API,
    answer=Late("timeline_models", "AttemptView"),
    many=True,
    errors=_NAMED,
    summary="Attempts of a step, the first one first; also of a step that is forgotten, by its whole key.",
)
RETRY_STEP: Final = Route(
    "POST",
    f"{_V1}/steps/{{key}}/retry",
    Right.API,
    answer=models.RetryView,
    errors=(*_OWNED, *_NAMED, *_GRAPH),
    repeats=True,
    summary="Build a failed step again, for the submissions of the client's owner that it made fail (the farm: all).",
)
LOG: Final = Route[None](
    "GET",
    f"{_V1}/steps/{{key}}/log",
    Right.API,
    answer=Content.LOG,
    errors=_NAMED,
    head=False,
    summary="The build log of an attempt, as raw bytes.",
    query=(
        Query("follow", "Go on until the build ends.", "boolean"),
        Query("attempt", "The last one if left out.", "integer", minimum=1),
    ),
)
HISTORY: Final[Route[HistoryView]] = Route(
    "GET",
    f"{_V1}/history/{{name}}",
    Right.API,
    answer=Late("timeline_models", "HistoryView"),
    errors=_NAMED,
    summary="Builds of a package over time, by the name of its derivations, with or without version.",
    query=(Query("system", "Only builds for this system."),),
)
DIFFERENCE: Final[Route[DifferenceView]] = Route(
    "GET",
    f"{_V1}/steps/{{key}}/difference",
    Right.API,
    answer=Late("difference_models", "DifferenceView"),
    errors=_NAMED,
    summary="What differs from the last build of its name, or from another one.",
    query=(Query("with", "Another step, .drv or output to compare with."),),
)
WHY: Final[Route[StepReasonsView]] = Route(
    "GET",
    f"{_V1}/steps/{{key}}/why",
    Right.API,
    answer=Late("questions", "StepReasonsView"),
    errors=_NAMED,
    summary="Why a step waits or failed or ran, and who wants it.",
)
ACTIVITY: Final[Route[ActivityView]] = Route(
    "GET",
    f"{_V1}/activity",
    Right.API,
    answer=Late("questions", "ActivityView"),
    summary="What every worker does, and what each queue waits for.",
)
COMPLETIONS: Final[Route[CompletionsView]] = Route(
    "GET",
    f"{_V1}/completions",
    Right.API,
    answer=Late("questions", "CompletionsView"),
    summary="Names that begin with a text.",
    query=(
        Query("of", "Kinds of names; all of them if left out.", words=("steps", "submissions", "workers")),
        Query("beginning", "The beginning of the names."),
    ),
)
WORKERS: Final = Route(
    "GET",
    f"{_V1}/workers",
    Right.API,
    answer=models.WorkerView,
    many=True,
    summary="All workers, by name.",
    query=(
        Query("state", "Only workers in these states.", words=get_args(models.WorkerState)),
        Query("system", "Only workers that build for this system, native or emulated."),
    ),
)
FARM: Final = Route(
    "GET",
    f"{_V1}/farm",
    Right.API,
    answer=models.FarmView,
    summary="How to use the farm and its cache, and what is wrong with it.",
)
ETA: Final[Route[SubmissionEtaView]] = Route(
    "GET",
    f"{_V1}/submissions/{{id}}/eta",
    Right.API,
    answer=Late("estimates", "SubmissionEtaView"),
    errors=_NAMED,
    summary="When a submission ends, what bounds that, and what has bounded it so far.",
)
THROUGHPUT: Final[Route[ThroughputView]] = Route(
    "GET",
    f"{_V1}/throughput",
    Right.API,
    answer=Late("estimates", "ThroughputView"),
    summary="Builds that ended, by minute of the last hour or by hour of the last day.",
    query=(Query("span", "The stretch of time; an hour if left out.", pattern="^(hour|day)$"),),
)
FORECAST: Final[Route[ForecastView]] = Route(
    "POST",
    f"{_V1}/forecast",
    Right.API,
    body="ForecastQuery",
    answer=Late("rebuild_models", "ForecastView"),
    errors=(*_BODY, *_GRAPH),
    summary="The size of a submission of derivations that the coordinator has: steps, what is cached, times.",
)
COMPARE_OUTPUTS: Final[Route[ComparedOutputsView]] = Route(
    "POST",
    f"{_V1}/outputs/compare",
    Right.API,
    body="PairsQuery",
    answer=Late("rebuild_models", "ComparedOutputsView"),
    errors=(*_BODY, *_GRAPH),
    summary="Whether outputs in the cache are equal but for store-path hashes, and their sizes; 500 pairs at most.",
)
REBUILD_CAUSES: Final[Route[RebuildCausesView]] = Route(
    "POST",
    f"{_V1}/derivations/causes",
    Right.API,
    body="PairsQuery",
    answer=Late("rebuild_models", "RebuildCausesView"),
    errors=(*_BODY, *_GRAPH),
    summary="What many changed derivations follow from, each cause once.",
)
DRAIN: Final = Route[None](
    "POST",
    f"{_V1}/workers/{{name}}/drain",
    Right.OPERATE,
    body="DrainRequest",
    status=204,
    errors=(*_OPERATED, *_NAMED, *_BODY),
    repeats=True,
    summary="Give a worker no new builds, or give it some again; those that run there finish.",
)
CACHE: Final[Route[CacheView]] = Route(
    "GET",
    f"{_V1}/caches/{{cache}}",
    Right.API,
    answer=Late("cache_models", "CacheView"),
    errors=_NAMED,
    summary="What is stored in a cache; the one at /cache is `default`.",
)
CACHE_ROOTS: Final[Route[CacheRootView]] = Route(
    "GET",
    f"{_V1}/caches/{{cache}}/roots",
    Right.API,
    answer=Late("cache_models", "CacheRootView"),
    many=True,
    errors=_NAMED,
    summary="What a cache keeps and why, the last used first.",
    query=(Query("kind", "Only roots of this kind, such as `pin`, `push` or `submission`."),),
)
CACHE_WHY: Final[Route[WhyView]] = Route(
    "GET",
    f"{_V1}/caches/{{cache}}/why",
    Right.API,
    answer=Late("cache_models", "WhyView"),
    errors=_NAMED,
    summary="Which roots keep a path.",
    query=(Query("path", "A store path of the cache."),),
)
PIN: Final = Route[None](
    "PUT",
    f"{_V1}/caches/{{cache}}/pins/{{pin}}",
    Right.OPERATE,
    body="PinRequest",
    status=204,
    errors=(*_OPERATED, *_NAMED, *_BODY),
    summary="Keep paths and all that they refer to.",
)
UNPIN: Final = Route[None](
    "DELETE",
    f"{_V1}/caches/{{cache}}/pins/{{pin}}",
    Right.OPERATE,
    status=204,
    errors=(*_OPERATED, *_NAMED),
    summary="End a pin.",
)
COLLECT: Final[Route[CollectView]] = Route(
    "POST",
    f"{_V1}/caches/{{cache}}/collect",
    Right.OPERATE,
    body="CollectRequest",
    answer=Late("cache_models", "CollectView"),
    errors=(*_OPERATED, *_NAMED, *_BODY),
    summary="Collect the garbage of a cache.",
)
VERIFY: Final[Route[VerifyView]] = Route(
    "POST",
    f"{_V1}/caches/{{cache}}/verify",
    Right.OPERATE,
    body="VerifyRequest",
    answer=Late("cache_models", "VerifyView"),
    errors=(*_OPERATED, *_NAMED, *_BODY),
    summary="Prove a cache: narinfo, NAR and references, and repair it if asked to.",
)
RESIGN: Final[Route[ResignView]] = Route(
    "POST",
    f"{_V1}/caches/{{cache}}/resign",
    Right.OPERATE,
    answer=Late("cache_models", "ResignView"),
    errors=(*_OPERATED, *_NAMED),
    summary="Sign everything with the present keys.",
)
HEALTH: Final = Route[None](
    "GET", "/healthz", Right.NONE, answer=Content.HEALTH, summary="Whether the engine runs; 503 where it does not."
)
OPENAPI: Final = Route[None](
    "GET", f"{_V1}/openapi.json", Right.NONE, answer=Content.OPENAPI, summary="This description, as OpenAPI 3.1."
)
#: Prometheus asks without a token: there are numbers in it and the names of caches.
METRICS: Final = Route[None](
    "GET", "/metrics", Right.NONE, answer=Content.METRICS, summary="Metrics as Prometheus reads them."
)

#: Every route that is not below a cache's prefix.
ROUTES: Final[tuple[Route[Any], ...]] = (
    MISSING,
    PUT_DERIVATIONS,
    PUT_SOURCES,
    SUBMIT,
    SUBMISSIONS,
    SUBMISSION,
    CANCEL,
    BUMP,
    RETRY,
    GROW,
    SEAL,
    ROOTS,
    STEPS,
    EVENTS,
    STEP,
    TIMELINE,
    SUBMISSION_TIMELINE,
    HISTORY,
    RETRY_STEP,
    LOG,
    WHY,
    DIFFERENCE,
    ETA,
    THROUGHPUT,
    FORECAST,
    COMPARE_OUTPUTS,
    REBUILD_CAUSES,
    ACTIVITY,
    COMPLETIONS,
    *WANTED_ROUTES,
    WORKERS,
    FARM,
    DRAIN,
    CACHE,
    CACHE_ROOTS,
    CACHE_WHY,
    PIN,
    UNPIN,
    COLLECT,
    VERIFY,
    RESIGN,
    *EVALUATION_ROUTES,
    *MIRROR_ROUTES,
    *FURTHER_ROUTES,
    *ENVIRONMENT_ROUTES,
    OPENAPI,
    HEALTH,
    METRICS,
)
