"""Checks of a request against the readers and writers of a cache, and the 401 of a cache that is not public.

A private cache wants the token at every address, `nix-cache-info` included: a client whose netrc is wrong then fails
at once ("does not appear to be a binary cache", or the 401 itself from Nix 2.35), whereas a cache whose first answer
is good and whose narinfos are 401 looks to Nix before 2.35 like one that is empty.
"""

from __future__ import annotations

from aiohttp import web

from coordinator.http.connections import mark_known
from coordinator.security.tokens import CacheAccess, told_token


def may_read(request: web.BaseRequest, access: CacheAccess) -> bool:
    """Return whether the request may be answered at all."""
    allowed = access.may_read(told_token(request.headers))
    if allowed and not access.public:
        mark_known(request)
    return allowed


def may_write(request: web.BaseRequest, access: CacheAccess) -> bool:
    """Return whether the request may change the cache."""
    allowed = access.may_write(told_token(request.headers))
    if allowed:
        mark_known(request)
    return allowed


def challenge(realm: str) -> web.Response:
    """Ask for a token. The answer to a request that has none, or another cache's."""
    return web.Response(
        status=401,
        text="this cache wants a token; in netrc it is the password for this host\n",
        headers={"WWW-Authenticate": f'Basic realm="drover cache {realm}"', "Cache-Control": "no-store"},
    )
