"""Guards of the pages: each lets in what has its right, answers refusals in HTML and says what a browser may load.

Rules: 1. A page is shown to a session, or to the API token as `Bearer`. Anybody else gets the login form, with status
401. 2. A change needs the session, its CSRF token in the form, and an `Origin` that is this coordinator's. 3. No answer
may hold a script or a style of its own, be framed, or be stored. 4. Nothing else than pages looks at the cookie.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api.route import Right
from coordinator.errors import CoordinatorError
from coordinator.http.connections import mark_known
from coordinator.http.web.forms import read_form
from coordinator.http.web.rendering import PageRenderer
from coordinator.security.sessions import Session, Sessions
from coordinator.security.tokens import told_token
from infra.cache.errors import MetadataError
from infra.clock import Clock
from infra.objects.errors import ObjectStoreError

_log = logging.getLogger(__name__)

#: What a browser may do with a page, for every answer of this package.
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not `no-referrer`: browsers would send forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
#: The fields of the form that a change came with.
FORM: Final[web.RequestKey[dict[str, str]]] = web.RequestKey("drover.form", dict)


class ForgeryError(CoordinatorError):
    """A form that did not come from a page of this session."""

    code: ClassVar[str] = "forgery"
    status: ClassVar[int] = 403


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whom a page is shown to; `csrf` is empty for the API token, whose pages have no forms."""

    csrf: str = ""


#: Whom a request comes from.
VISITOR: Final[web.RequestKey[Visitor]] = web.RequestKey("drover.visitor", Visitor)


class Guards:
    """Makes the guards for the rights of pages, and begins and ends sessions."""

    def __init__(self, sessions: Sessions, renderer: PageRenderer, clock: Clock, public_url: str) -> None:
        self._sessions = sessions
        self._renderer = renderer
        self._clock = clock
        own = urlsplit(public_url)
        self._origin = f"{own.scheme}://{own.netloc}".lower()
        self._secure = own.scheme == "https"

    def by_right(self) -> dict[Right, Callable[[Handler], Handler]]:
        """Return the guard for each right of a page."""
        return {Right.NONE: self._open, Right.PAGE: self._shown, Right.CHANGE: self._changed}

    async def login_page(self, request: web.Request) -> web.Response:
        """Show the form that takes the token."""
        return await self._login_form(request, 200)

    async def login(self, request: web.Request) -> web.StreamResponse:
        """Begin a session for the holder of the API token."""
        self._require_own_origin(request)
        form = await read_form(request)
        if not self._sessions.is_api_token(form.get("token", "").strip()):
            wrong = "That is not this farm's API token."
            return await self._login_form(request, ForgeryError.status, wrong=wrong, back=form.get("next", ""))
        answer = seen_elsewhere(local_address(form.get("next", "")))
        cookie = self._sessions.begin(self._clock.now())
        answer.set_cookie(
            self._sessions.cookie_name, cookie, path="/", httponly=True, samesite="Strict", secure=self._secure
        )
        return answer

    async def logout(self, _request: web.Request) -> web.StreamResponse:
        """End the session in this browser."""
        answer = seen_elsewhere("/login")
        answer.del_cookie(self._sessions.cookie_name, path="/", httponly=True, samesite="Strict", secure=self._secure)
        return answer

    def _open(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            return await self._answered(request, handler)

        return guarded

    def _shown(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            visitor = self._visitor(request)
            if visitor is None:
                return secured(await self._login_form(request, 401))
            request[VISITOR] = visitor
            mark_known(request)
            return await self._answered(request, handler)

        return guarded

    def _changed(self, handler: Handler) -> Handler:
        async def change(request: web.Request) -> web.StreamResponse:
            self._require_own_origin(request)
            form = await read_form(request)
            session = self._session(request)
            if session is None or not self._sessions.is_csrf_token(session, form.get("csrf", "")):
                raise ForgeryError("this form is not from a page of your session; reload the page and try again.")
            request[FORM] = form
            return await handler(request)

        async def guarded(request: web.Request) -> web.StreamResponse:
            session = self._session(request)
            if session is None:
                return secured(await self._login_form(request, 401))
            request[VISITOR] = Visitor(self._sessions.csrf_token(session))
            mark_known(request)
            return await self._answered(request, change)

        return guarded

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer, also where that fails; whatever is no refusal of ours is left to the application."""
        try:
            answer = await handler(request)
        except CoordinatorError as error:
            answer = await self._error_page(request, error.status, str(error))
        except (ObjectStoreError, MetadataError) as error:
            _log.warning("a page failed: %s: %s", request.path, error)
            answer = await self._error_page(request, 503, f"{error}.")
        return answer if answer.prepared else secured(answer)

    async def _error_page(self, request: web.Request, status: int, sentence: str) -> web.Response:
        visitor = request.get(VISITOR)
        return html(await self._renderer.page("error.html", visitor=visitor, status=status, sentence=sentence), status)

    async def _login_form(
        self, request: web.Request, status: int, *, wrong: str = "", back: str | None = None
    ) -> web.Response:
        """Show the form; the browser comes back to the page that it requested."""
        if back is None:
            back = request.path_qs if request.method == "GET" and request.path != "/login" else "/"
        body = await self._renderer.page("login.html", visitor=None, wrong=wrong, back=local_address(back))
        return html(body, status)

    def _visitor(self, request: web.Request) -> Visitor | None:
        session = self._session(request)
        if session is not None:
            return Visitor(self._sessions.csrf_token(session))
        scheme, _, _ = request.headers.get("Authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and self._sessions.is_api_token(told_token(request.headers))
        return Visitor() if known else None

    def _session(self, request: web.Request) -> Session | None:
        return self._sessions.check(request.cookies.get(self._sessions.cookie_name, ""), self._clock.now())

    def _require_own_origin(self, request: web.Request) -> None:
        """Raise `ForgeryError` for a form of another page than this coordinator's, or of no page at all."""
        origin = request.headers.get("Origin", "").lower()
        own = request.headers.get("Host", "").lower()
        if origin not in {self._origin, f"http://{own}", f"https://{own}"}:
            raise ForgeryError("this form does not come from a page of this farm; open the farm's own page.")


def html(body: bytes, status: int = 200) -> web.Response:
    """Return a page as an answer."""
    return web.Response(body=body, status=status, content_type="text/html", charset="utf-8")


def seen_elsewhere(address: str) -> web.Response:
    """Return the answer that leads a browser to another page after a change."""
    return web.Response(status=303, headers={"Location": address})


def secured(answer: web.StreamResponse) -> web.StreamResponse:
    """Give an answer the headers of rule 3, unless it sets how long it may be stored."""
    answer.headers.update(HEADERS)
    answer.headers.setdefault("Cache-Control", "no-store")
    return answer


def local_address(address: str) -> str:
    """Return the address if it is one of this farm, `/` for anything that a browser may take for another host's."""
    if (
        address.startswith("/")
        and not address.startswith("//")
        and address.isascii()
        and address.isprintable()
        and "\\" not in address
    ):
        return address
    return "/"
