"""Middlewares that refuse requests: those to the API without its token, and those of foreign web pages to any route.

`coordinator.api.routes` says which route wants the API token. A cache checks its own readers and writers
(`coordinator.http.binary_cache.access`).

A head that two readers may understand differently is refused (`require_plain_head`): several or malformed `Host`s,
several `Authorization`s.

A page in a browser can make the browser ask a loopback address under the page's own host name (DNS rebinding). While
the coordinator listens on loopback only, requests whose `Host` is not a loopback name or the public URL's are refused.
"""

from __future__ import annotations

import ipaddress
import re
from typing import ClassVar, Final
from urllib.parse import urlsplit

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from coordinator.api.route import Right
from coordinator.errors import BadRequestError, CoordinatorError, ForbiddenError
from coordinator.http.bodies import refuse_encoding
from coordinator.http.connections import mark_known
from coordinator.http.routing import right_of
from coordinator.security.clients import Client, ClientTokens

MAX_PORT: Final = 65535
#: Whose token a request has, at the routes of the farm.
CLIENT: Final[web.RequestKey[Client]] = web.RequestKey("drover.client", Client)
#: Names as DNS and hosts files have them; no user part, no zone of an IPv6 address.
_HOST: Final = re.compile(
    r"(?:\[(?P<address>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})))(?::(?P<port>[0-9]{1,5}))?"
)


class UnauthorizedError(CoordinatorError):
    """The request has no token, or another one."""

    code: ClassVar[str] = "unauthorized"
    status: ClassVar[int] = 401


class ForbiddenHostError(CoordinatorError):
    """The request was made under a name that is not the coordinator's."""

    code: ClassVar[str] = "forbidden_host"
    status: ClassVar[int] = 421


def require_token(tokens: ClientTokens) -> Middleware:
    """Return a middleware that lets only holders of `tokens` at the routes whose right is the farm's.

    A handler finds in `request[CLIENT]` whom the token belongs to.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        right = right_of(request)
        if right in {Right.API, Right.OPERATE}:
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            client = tokens.find(token.strip())
            if scheme.lower() != "bearer" or client is None:
                raise UnauthorizedError(
                    "the request has no valid token; it is in the file api-token of the coordinator's state directory "
                    "(set DROVER_TOKEN_FILE)."
                )
            if right is Right.OPERATE and not client.is_operator:
                raise ForbiddenError(
                    f"the token of {client.owner} does not give this right; the farm's own token does."
                )
            request[CLIENT] = client
            mark_known(request)
        return await handler(request)

    return check


@web.middleware
async def require_plain_head(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests whose `Host` or `Authorization` could be read in two ways, and compressed bodies.

    A middleware. Raises `BadRequestError` or `BodyEncodedError`.
    """
    hosts = request.headers.getall("Host", ())
    if len(hosts) > 1 or (not hosts and request.version >= HttpVersion11) or not all(map(is_host, hosts)):
        raise BadRequestError("the request must have one Host header: a name or an address, and perhaps a port.")
    if len(request.headers.getall("Authorization", ())) > 1:
        raise BadRequestError("the request has more than one Authorization header.")
    refuse_encoding(request)
    return await handler(request)


def require_host(public_url: str) -> Middleware:
    """Return a middleware that refuses host names other than loopback ones and that of `public_url`."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_own_host(request.headers.get("Host", ""), public_url):
            raise ForbiddenHostError("this coordinator listens on loopback only and does not answer under that name.")
        return await handler(request)

    return check


def is_own_host(host: str, public_url: str) -> bool:
    """Return whether a `Host` header (with or without a port) names loopback, or the host of `public_url`."""
    found = _HOST.fullmatch(host)
    if found is None or not is_host(host):
        return False
    host = (found["address"] or found["name"]).lower()
    return host == (urlsplit(public_url).hostname or "") or _is_loopback(host)


def is_host(host: str) -> bool:
    """Return whether a `Host` header is `name`, `address` or `[IPv6 address]`, with or without `:port` (1 to 65535)."""
    found = _HOST.fullmatch(host)
    if found is None or not 0 < int(found["port"] or 1) <= MAX_PORT:
        return False
    if found["address"] is None:
        return True
    try:
        ipaddress.IPv6Address(found["address"])
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
