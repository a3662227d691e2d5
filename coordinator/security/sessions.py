"""Sessions of browsers: cookies that stand for the API token, and the CSRF tokens that belong to them.

    drs1.<expiry>.<nonce>.<base64url of HMAC-SHA256 over what stands before>

A cookie is signed with a key that is derived from two secrets of the farm (`farm_secrets`), so it needs no memory and
holds at the coordinator that takes over. A new API token ends every session. The CSRF token is a MAC of the session's
nonce: a page of another origin can make a browser send the cookie, and cannot read that.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

#: Version and first part of every cookie.
COOKIE_VERSION: Final = "drs1"
#: Seconds that a session lasts: a working day, and the night of a long build.
SESSION_S: Final = 24 * 3600
#: A longer text is no cookie of ours.
MAX_COOKIE: Final = 256
_NONCE_BYTES: Final = 18


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that has shown the API token; `expires_at` in Unix seconds."""

    nonce: str
    expires_at: int


class Sessions:
    """Makes and checks cookies and CSRF tokens."""

    def __init__(self, upload_secret: str, api_token: str) -> None:
        self._key = hmac.digest(upload_secret.encode(), b"drover sessions 1\0" + api_token.encode(), sha256)
        self._api_token = sha256(api_token.encode()).digest()
        #: A name of its own for each farm: browsers share cookies between all ports of a host.
        self.cookie_name = f"drover-{self._mac('name')[:8]}"

    def is_api_token(self, text: str) -> bool:
        """Return whether a text is the API token, in constant time."""
        return hmac.compare_digest(sha256(text.encode("utf-8", "surrogateescape")).digest(), self._api_token)

    def begin(self, now: float) -> str:
        """Return the cookie of a new session."""
        body = f"{COOKIE_VERSION}.{int(now) + SESSION_S}.{secrets.token_urlsafe(_NONCE_BYTES)}"
        return f"{body}.{self._mac(body)}"

    def check(self, cookie: str, now: float) -> Session | None:
        """Return the session of a cookie, None where it is not one of ours or has expired."""
        if len(cookie) > MAX_COOKIE or not cookie.isascii():
            return None
        body, _, mac = cookie.rpartition(".")
        if not hmac.compare_digest(self._mac(body), mac):
            return None
        # Only what was signed here comes this far.
        version, _, rest = body.partition(".")
        expiry, _, nonce = rest.partition(".")
        if version != COOKIE_VERSION or now >= int(expiry):
            return None
        return Session(nonce, int(expiry))

    def csrf_token(self, session: Session) -> str:
        """Return what a form of the session's pages must send back."""
        return self._mac(f"csrf {session.nonce}")

    def is_csrf_token(self, session: Session, field: str) -> bool:
        """Return whether a form came from a page of the session."""
        return field.isascii() and hmac.compare_digest(self.csrf_token(session), field)

    def _mac(self, text: str) -> str:
        digest = hmac.digest(self._key, text.encode(), sha256)
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")
