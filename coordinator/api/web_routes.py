"""The route table of the pages: what a browser asks, each record with its right.

Pages are answered in HTML, errors too. `coordinator.http.web` has their handlers. A change is a form that comes from
one of these pages; its answer leads back to one (303).
"""

from __future__ import annotations

from typing import Any, Final

from coordinator.api.route import Content, Right, Route

#: A named thing is not there; a form of another origin or without its CSRF token; the body is refused.
_NAMED: Final = (404,)
_FORM: Final = (403, 408, 413)

FARM_PAGE: Final = Route[None]("GET", "/", Right.PAGE, answer=Content.PAGE)
#: The parts of the farm's page that change, as server-sent events.
FARM_LIVE: Final = Route[None]("GET", "/live/farm", Right.PAGE, answer=Content.PARTS, head=False)

SUBMISSIONS_PAGE: Final = Route[None]("GET", "/submissions", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
SUBMISSION_PAGE: Final = Route[None]("GET", "/submissions/{id}", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
SUBMISSION_LIVE: Final = Route[None](
    "GET", "/live/submissions/{id}", Right.PAGE, answer=Content.PARTS, errors=_NAMED, head=False
)
#: A page of the steps of a submission: `?state=failed&after=N`.
STEPS_PAGE: Final = Route[None]("GET", "/submissions/{id}/steps", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
#: What ran on each worker over time, on the farm and for a submission: `?from=…&to=…` in Unix seconds, `width=` pixels.
FARM_TIMELINE_PAGE: Final = Route[None]("GET", "/timeline", Right.PAGE, answer=Content.PAGE)
FARM_TIMELINE_LIVE: Final = Route[None]("GET", "/live/timeline", Right.PAGE, answer=Content.PARTS, head=False)
TIMELINE_PAGE: Final = Route[None]("GET", "/submissions/{id}/timeline", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
TIMELINE_LIVE: Final = Route[None](
    "GET", "/live/submissions/{id}/timeline", Right.PAGE, answer=Content.PARTS, errors=_NAMED, head=False
)
CANCEL_FORM: Final = Route[None](
    "POST", "/submissions/{id}/cancel", Right.CHANGE, body=Content.FORM, status=303, errors=(*_NAMED, *_FORM)
)
#: Builds again what failed.
RETRY_FORM: Final = Route[None](
    "POST", "/submissions/{id}/retry", Right.CHANGE, body=Content.FORM, status=303, errors=(*_NAMED, *_FORM)
)

#: `?find=`: leads to the only step whose key, name or .drv contains it.
FIND_STEP: Final = Route[None]("GET", "/steps", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
STEP_PAGE: Final = Route[None]("GET", "/steps/{key}", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
STEP_LIVE: Final = Route[None]("GET", "/live/steps/{key}", Right.PAGE, answer=Content.PARTS, errors=_NAMED, head=False)
RETRY_STEP_FORM: Final = Route[None](
    "POST", "/steps/{key}/retry", Right.CHANGE, body=Content.FORM, status=303, errors=(*_NAMED, *_FORM)
)

#: A page of the log of one attempt: `?attempt=N&line=N&find=TEXT`.
LOG_PAGE: Final = Route[None]("GET", "/steps/{key}/log", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
#: What is printed from `?after=` lines on, while the attempt runs.
LOG_LIVE: Final = Route[None](
    "GET", "/live/steps/{key}/log", Right.PAGE, answer=Content.PARTS, errors=_NAMED, head=False
)

#: Builds of a package, by its name with or without its version.
HISTORY_PAGE: Final = Route[None]("GET", "/packages/{name}", Right.PAGE, answer=Content.PAGE, errors=_NAMED)

WORKERS_PAGE: Final = Route[None]("GET", "/workers", Right.PAGE, answer=Content.PAGE)
WORKERS_LIVE: Final = Route[None]("GET", "/live/workers", Right.PAGE, answer=Content.PARTS, head=False)
#: `on`: yes or no.
DRAIN_FORM: Final = Route[None](
    "POST", "/workers/{name}/drain", Right.CHANGE, body=Content.FORM, status=303, errors=(*_NAMED, *_FORM)
)

#: `?path=…` asks why a path is kept.
CACHE_PAGE: Final = Route[None]("GET", "/caches/{cache}", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
PIN_FORM: Final = Route[None](
    "POST", "/caches/{cache}/pin", Right.CHANGE, body=Content.FORM, status=303, errors=(*_NAMED, *_FORM)
)
UNPIN_FORM: Final = Route[None](
    "POST", "/caches/{cache}/unpin", Right.CHANGE, body=Content.FORM, status=303, errors=(*_NAMED, *_FORM)
)

#: How much of each environment can be fetched; of one: `?system=…` shows the gaps of one system alone.
COVERAGES_PAGE: Final = Route[None]("GET", "/coverage", Right.PAGE, answer=Content.PAGE)
COVERAGES_LIVE: Final = Route[None]("GET", "/live/coverage", Right.PAGE, answer=Content.PARTS, head=False)
COVERAGE_PAGE: Final = Route[None]("GET", "/coverage/{name}", Right.PAGE, answer=Content.PAGE, errors=_NAMED)
COVERAGE_LIVE: Final = Route[None](
    "GET", "/live/coverage/{name}", Right.PAGE, answer=Content.PARTS, errors=_NAMED, head=False
)

LOGIN_PAGE: Final = Route[None]("GET", "/login", Right.NONE, answer=Content.PAGE)
#: Takes the API token; the answer sets the cookie.
LOGIN: Final = Route[None]("POST", "/login", Right.NONE, body=Content.FORM, status=303, errors=_FORM)
LOGOUT: Final = Route[None]("POST", "/logout", Right.CHANGE, body=Content.FORM, status=303, errors=_FORM)
#: Script, style and icon: the same for everybody.
ASSET: Final = Route[None]("GET", "/static/{file}", Right.NONE, answer=Content.ASSET, errors=_NAMED)

WEB_ROUTES: Final[tuple[Route[Any], ...]] = (
    FARM_PAGE,
    FARM_LIVE,
    SUBMISSIONS_PAGE,
    SUBMISSION_PAGE,
    SUBMISSION_LIVE,
    STEPS_PAGE,
    FARM_TIMELINE_PAGE,
    FARM_TIMELINE_LIVE,
    TIMELINE_PAGE,
    TIMELINE_LIVE,
    CANCEL_FORM,
    RETRY_FORM,
    FIND_STEP,
    STEP_PAGE,
    STEP_LIVE,
    RETRY_STEP_FORM,
    LOG_PAGE,
    LOG_LIVE,
    HISTORY_PAGE,
    WORKERS_PAGE,
    WORKERS_LIVE,
    DRAIN_FORM,
    CACHE_PAGE,
    PIN_FORM,
    UNPIN_FORM,
    COVERAGES_PAGE,
    COVERAGES_LIVE,
    COVERAGE_PAGE,
    COVERAGE_LIVE,
    LOGIN_PAGE,
    LOGIN,
    LOGOUT,
    ASSET,
)
