"""The route table of the pages: what a browser asks, each record with its right.

Pages are answered in HTML, errors too. `coordinator.http.web` has their handlers. A change is a form that comes from
one of these pages; its answer leads back to one (303).
"""

from __future__ import annotations

from typing import Any, Final

from coordinator.api.routes import Content, Right, Route

#: A named thing is not there; a form of another origin or without its CSRF token; the body is refused.
_NAMED: Final = (404,)
_FORM: Final = (403, 408, 413, 415)

FARM_PAGE: Final = Route[None]("GET", "/", Right.PAGE, answer=Content.PAGE)
#: The parts of the farm's page that change, as server-sent events.
FARM_LIVE: Final = Route[None]("GET", "/live/farm", Right.PAGE, answer=Content.PARTS, head=False)

LOGIN_PAGE: Final = Route[None]("GET", "/login", Right.NONE, answer=Content.PAGE)
#: Takes the API token; the answer sets the cookie.
LOGIN: Final = Route[None]("POST", "/login", Right.NONE, body=Content.FORM, status=303, errors=_FORM)
LOGOUT: Final = Route[None]("POST", "/logout", Right.CHANGE, body=Content.FORM, status=303, errors=_FORM)
#: Script, style and icon: the same for everybody.
ASSET: Final = Route[None]("GET", "/static/{file}", Right.NONE, answer=Content.ASSET, errors=_NAMED)

WEB_ROUTES: Final[tuple[Route[Any], ...]] = (
    FARM_PAGE,
    FARM_LIVE,
    LOGIN_PAGE,
    LOGIN,
    LOGOUT,
    ASSET,
)
