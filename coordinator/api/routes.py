"""The route table of the HTTP API as data: routing, the rights check and the client's addresses follow from it.

One record a route; `coordinator.api.cache_routes` has those below a cache's prefix, `coordinator.api.web_routes` the
pages. `coordinator.http.routing` refuses to serve a handler without a record, and a record cannot be made without a
right.

Rules: 1. Times in bodies and answers are Unix seconds. 2. An answer of status 4xx or 5xx is an `ErrorView`:
`{"error": {"code": "...", "message": "one sentence and what to do"}}`. 3. A list (`many`) comes in pages: it takes
`?limit=` (100, at most 1000) and `?after=`; where there is more, a header `Link: <…>; rel="next"` has the address of
the next page. 4. `errors` lists what a route adds to `EVERY_ROUTE`; an answer that is in neither is logged as a fault.

Clients import this module for one short question, so it imports no pydantic: requests are named, not imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote

from coordinator.api.difference_models import DifferenceView
from coordinator.api.estimates import SubmissionEtaView, ThroughputView
from coordinator.api.models import (
    CacheRootView,
    CacheView,
    CollectView,
    FarmView,
    IntakeMissing,
    ResignView,
    RetryView,
    RootView,
    StepView,
    SubmissionView,
    VerifyView,
    WhyView,
    WorkerView,
)
from coordinator.api.questions import ActivityView, CompletionsView, StepReasonsView
from coordinator.api.timeline_models import AttemptView, HistoryView

if TYPE_CHECKING:
    from pydantic import BaseModel

#: Where the API begins. An address below it that no record has wants the token too: strangers learn nothing of it.
API_PREFIX: Final = "/api/"
_V1: Final = "/api/v1"
#: Refusals that any route may answer: malformed, no right, a compressed body, a foreign host name, a fault of ours, not
#: now.
EVERY_ROUTE: Final = (400, 401, 415, 421, 500, 503)
#: A dynamic part of a path, `{name}` or `{name:pattern}`, whose pattern may hold a repetition such as `{32}`.
_PART: Final = re.compile(r"\{(\w+)(?::(?:[^{}]|\{[^{}]*\})+)?\}")

_Answer = TypeVar("_Answer")


class Right(StrEnum):
    """Rights that a request must prove by `Authorization`: `Bearer TOKEN`, or the password of `Basic`."""

    #: Nothing.
    NONE = "none"
    #: The API token, as `Bearer`.
    API = "api"
    #: The cookie of a browser's session, or the API token as `Bearer`.
    PAGE = "page"
    #: The cookie of a session, its CSRF token in the form, and an `Origin` that is the coordinator's own.
    CHANGE = "change"
    #: A reader's or a writer's token of the cache; nothing where the cache is public.
    READ = "read"
    #: A writer's token of the cache.
    WRITE = "write"
    #: A writer's token of the cache, or the token of one lease of it (for that lease's outputs alone).
    UPLOAD = "upload"


class Content(StrEnum):
    """Content type of a body or an answer that is no model."""

    #: Framing: `coordinator.api.streams`.
    DERIVATIONS = "application/x-drover-derivations"
    SOURCES = "application/x-drover-sources"
    #: Server-sent `WatchEvent`s: `snapshot`, then `step` and `counts`, at last `end`.
    EVENTS = "text/event-stream"
    #: Raw bytes of a build log, chunked while it is followed.
    LOG = "text/plain"
    PAGE = "text/html"
    #: Server-sent events: `parts` (JSON: name of a part of the page -> its HTML), at last `end`.
    PARTS = "text/event-stream; parts"
    FORM = "application/x-www-form-urlencoded"
    ASSET = "text/css, text/javascript, image/svg+xml"
    HEALTH = "application/json; status"
    METRICS = "text/plain; version=0.0.4"
    #: What Nix defines.
    CACHE_INFO = "text/x-nix-cache-info"
    NARINFO = "text/x-nix-narinfo"
    NAR = "application/x-nix-nar"
    LISTING = "application/json; listing"
    REALISATION = "application/json; realisation"
    #: `{"narinfos": [text], "missing": [base name]}`
    NARINFOS = "application/json; narinfos"
    #: Any bytes, which are dropped.
    DROPPED = "application/octet-stream"


#: Classes of `coordinator.api.requests`.
RequestName: TypeAlias = Literal[
    "IntakeQuery", "SubmitRequest", "DrainRequest", "PinRequest", "CollectRequest", "VerifyRequest"
]


@dataclass(frozen=True)
class Route(Generic[_Answer]):
    """One method of one address. `path` begins with `/`, or, below a cache's prefix, with `{prefix}/`."""

    method: Literal["GET", "PUT", "POST", "DELETE"]
    path: str
    right: Right
    #: The request's body: a model (by its name where clients send it), or bytes of that content.
    body: RequestName | Content | type[BaseModel] | None = None
    #: The answer's body; None: there is none.
    answer: type[_Answer] | Content | None = None
    #: The answer is a page of a list of these.
    many: bool = False
    status: int = 200
    #: Statuses of refusals beside `EVERY_ROUTE`.
    errors: tuple[int, ...] = ()
    #: HEAD is answered wherever GET is, except for streams that do not end by themselves.
    head: bool = True

    def below(self, prefix: str) -> str:
        """Return the path as a router takes it, for a cache at `prefix`."""
        return prefix + self.path.removeprefix("{prefix}")

    def address(self, prefix: str = "", /, **parts: str) -> str:
        """Return the path with its parts filled in, each as one segment.

        Names in `parts` that the path lacks are passed over. Raises `KeyError` for a part that is not given.
        """
        return _PART.sub(lambda found: quote(parts[found[1]], safe=""), self.below(prefix))


#: A named thing is not there; the body of a request comes too slowly, or is too large.
_NAMED: Final = (404,)
_BODY: Final = (408, 413)
#: Streams have bounds of their own, which are 400.
_STREAM: Final = (408,)

MISSING: Final = Route(
    "POST", f"{_V1}/intake/missing", Right.API, body="IntakeQuery", answer=IntakeMissing, errors=_BODY
)
PUT_DERIVATIONS: Final = Route[None](
    "PUT", f"{_V1}/intake/derivations", Right.API, body=Content.DERIVATIONS, status=204, errors=_STREAM
)
PUT_SOURCES: Final = Route[None](
    "PUT", f"{_V1}/intake/sources", Right.API, body=Content.SOURCES, status=204, errors=_STREAM
)
#: Names three of the roots, as the answers to cancel and retry do.
SUBMIT: Final = Route(
    "POST", f"{_V1}/submissions", Right.API, body="SubmitRequest", answer=SubmissionView, status=201, errors=_BODY
)
#: Newest first, three roots of each.
SUBMISSIONS: Final = Route("GET", f"{_V1}/submissions", Right.API, answer=SubmissionView, many=True)
#: With its first 500 roots.
SUBMISSION: Final = Route("GET", f"{_V1}/submissions/{{id}}", Right.API, answer=SubmissionView, errors=_NAMED)
CANCEL: Final = Route("POST", f"{_V1}/submissions/{{id}}/cancel", Right.API, answer=SubmissionView, errors=_NAMED)
#: Runs again what failed; a repeat changes nothing.
RETRY: Final = Route("POST", f"{_V1}/submissions/{{id}}/retry", Right.API, answer=SubmissionView, errors=_NAMED)
ROOTS: Final = Route("GET", f"{_V1}/submissions/{{id}}/roots", Right.API, answer=RootView, many=True, errors=_NAMED)
#: `?state=failed,running…` chooses.
STEPS: Final = Route("GET", f"{_V1}/submissions/{{id}}/steps", Right.API, answer=StepView, many=True, errors=_NAMED)
#: Attempts of its steps since it came; a page is of `limit` steps, in the submission's order, and may be empty.
SUBMISSION_TIMELINE: Final = Route(
    "GET", f"{_V1}/submissions/{{id}}/timeline", Right.API, answer=AttemptView, many=True, errors=_NAMED
)
EVENTS: Final = Route[None](
    "GET", f"{_V1}/submissions/{{id}}/events", Right.API, answer=Content.EVENTS, errors=_NAMED, head=False
)
#: `key`: a step's key, or any unique part of it.
STEP: Final = Route("GET", f"{_V1}/steps/{{key}}", Right.API, answer=StepView, errors=_NAMED)
#: Attempts, the first one first; also of a step that is forgotten, by its whole key.
TIMELINE: Final = Route("GET", f"{_V1}/steps/{{key}}/timeline", Right.API, answer=AttemptView, many=True, errors=_NAMED)
RETRY_STEP: Final = Route("POST", f"{_V1}/steps/{{key}}/retry", Right.API, answer=RetryView, errors=_NAMED)
#: `?follow=1&attempt=N`
LOG: Final = Route[None]("GET", f"{_V1}/steps/{{key}}/log", Right.API, answer=Content.LOG, errors=_NAMED, head=False)
#: Of a package by the name of its derivations, with or without version; `?system=` chooses.
HISTORY: Final = Route("GET", f"{_V1}/history/{{name}}", Right.API, answer=HistoryView, errors=_NAMED)
#: What differs from the last build of its name, or from `?with=` another step, .drv or output.
DIFFERENCE: Final = Route("GET", f"{_V1}/steps/{{key}}/difference", Right.API, answer=DifferenceView, errors=_NAMED)
#: Why it waits or failed or ran, and who wants it.
WHY: Final = Route("GET", f"{_V1}/steps/{{key}}/why", Right.API, answer=StepReasonsView, errors=_NAMED)
#: What every worker does, and what each queue waits for.
ACTIVITY: Final = Route("GET", f"{_V1}/activity", Right.API, answer=ActivityView)
#: When it ends, what bounds that, and what has bounded it so far.
ETA: Final = Route("GET", f"{_V1}/submissions/{{id}}/eta", Right.API, answer=SubmissionEtaView, errors=_NAMED)
#: `?span=hour|day`: builds that ended, by minute or by hour.
THROUGHPUT: Final = Route("GET", f"{_V1}/throughput", Right.API, answer=ThroughputView)
#: `?of=steps,submissions,workers&beginning=…`, one of these words or several.
COMPLETIONS: Final = Route("GET", f"{_V1}/completions", Right.API, answer=CompletionsView)
WORKERS: Final = Route("GET", f"{_V1}/workers", Right.API, answer=WorkerView, many=True)
FARM: Final = Route("GET", f"{_V1}/farm", Right.API, answer=FarmView)
#: While drained a worker gets no new leases; running builds finish.
DRAIN: Final = Route[None](
    "POST", f"{_V1}/workers/{{name}}/drain", Right.API, body="DrainRequest", status=204, errors=(*_NAMED, *_BODY)
)

#: What is stored; the cache at /cache is `default`.
CACHE: Final = Route("GET", f"{_V1}/caches/{{cache}}", Right.API, answer=CacheView, errors=_NAMED)
CACHE_ROOTS: Final = Route(
    "GET", f"{_V1}/caches/{{cache}}/roots", Right.API, answer=CacheRootView, many=True, errors=_NAMED
)
#: `?path=…`: which roots keep a path.
CACHE_WHY: Final = Route("GET", f"{_V1}/caches/{{cache}}/why", Right.API, answer=WhyView, errors=_NAMED)
#: Keeps paths and all that they refer to.
PIN: Final = Route[None](
    "PUT",
    f"{_V1}/caches/{{cache}}/pins/{{pin}}",
    Right.API,
    body="PinRequest",
    status=204,
    errors=(*_NAMED, *_BODY),
)
UNPIN: Final = Route[None]("DELETE", f"{_V1}/caches/{{cache}}/pins/{{pin}}", Right.API, status=204, errors=_NAMED)
#: Garbage collection.
COLLECT: Final = Route(
    "POST",
    f"{_V1}/caches/{{cache}}/collect",
    Right.API,
    body="CollectRequest",
    answer=CollectView,
    errors=(*_NAMED, *_BODY),
)
#: narinfo -> NAR -> references, and repair.
VERIFY: Final = Route(
    "POST",
    f"{_V1}/caches/{{cache}}/verify",
    Right.API,
    body="VerifyRequest",
    answer=VerifyView,
    errors=(*_NAMED, *_BODY),
)
#: Signs everything with the present keys.
RESIGN: Final = Route("POST", f"{_V1}/caches/{{cache}}/resign", Right.API, answer=ResignView, errors=_NAMED)

#: `{"status": "ok"}` while the engine runs, else 503.
HEALTH: Final = Route[None]("GET", "/healthz", Right.NONE, answer=Content.HEALTH)
#: Prometheus asks without a token: there are numbers in it and the names of caches.
METRICS: Final = Route[None]("GET", "/metrics", Right.NONE, answer=Content.METRICS)

#: Every route that is not below a cache's prefix.
ROUTES: Final[tuple[Route[Any], ...]] = (
    MISSING,
    PUT_DERIVATIONS,
    PUT_SOURCES,
    SUBMIT,
    SUBMISSIONS,
    SUBMISSION,
    CANCEL,
    RETRY,
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
    ACTIVITY,
    COMPLETIONS,
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
    HEALTH,
    METRICS,
)
