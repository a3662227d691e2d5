"""Who may use a cache, as Nix can say it: a token in the password of `Authorization: Basic`, any user name.

Nix sends what netrc holds for the host, on every request; it cannot send a bearer token, but CI scripts can, so both
are taken. A cache without readers is public. Writers may read. Tokens come from files of mode 0600 or from the
environment, are kept as digests and compared in constant time.

A private cache asks for the token at every address, `nix-cache-info` included: a client whose netrc is wrong then says
so at once ("does not appear to be a binary cache", or the 401 itself from Nix 2.35), whereas a cache whose first answer
is good and whose narinfos are 401 looks to Nix before 2.35 like one that is empty.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from aiohttp import web

from coordinator.http.auth import LEAST_TOKEN_CHARACTERS, TokenError
from coordinator.http.connections import mark_known

#: Content of a token file: some thousand tokens.
MAX_TOKEN_FILE_BYTES = 256 * 1024
#: An `Authorization` that is longer holds no token of ours.
MAX_CREDENTIALS = 4096
ENVIRONMENT = "env:"


class TokenSet:
    """Some tokens; can tell whether a text is one of them, in a time that does not depend on which."""

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._digests = tuple(sha256(token.encode()).digest() for token in tokens)

    def __contains__(self, told: str) -> bool:
        digest = sha256(told.encode("utf-8", "surrogateescape")).digest()
        known = False
        for each in self._digests:
            known |= hmac.compare_digest(each, digest)
        return known

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __or__(self, other: TokenSet) -> TokenSet:
        both = TokenSet()
        both._digests = self._digests + other._digests
        return both


class CacheAccess:
    """Answers who may read and who may write. Without `readers` everybody may read; without `writers` nobody writes."""

    def __init__(self, readers: TokenSet | None = None, writers: TokenSet | None = None) -> None:
        self._writers = writers or TokenSet()
        self._readers = (readers | self._writers) if readers else TokenSet()

    @property
    def public(self) -> bool:
        """Whether everybody may read."""
        return not self._readers

    @property
    def writable(self) -> bool:
        """Whether anybody may write."""
        return bool(self._writers)

    def may_read(self, request: web.BaseRequest) -> bool:
        """Tell whether the request may be answered at all."""
        return self.public or _holds(request, self._readers)

    def may_write(self, request: web.BaseRequest) -> bool:
        """Tell whether the request may change the cache."""
        return bool(self._writers) and _holds(request, self._writers)


def _holds(request: web.BaseRequest, tokens: TokenSet) -> bool:
    known = told_token(request.headers) in tokens
    if known:
        mark_known(request)
    return known


def told_token(headers: Mapping[str, str]) -> str:
    """Return the token of a request, "" if there is none: the password of Basic, or what follows Bearer."""
    scheme, _, credentials = headers.get("Authorization", "").partition(" ")
    credentials = credentials.strip()
    if len(credentials) > MAX_CREDENTIALS:
        return ""
    match scheme.lower():
        case "bearer":
            return credentials
        case "basic":
            try:
                decoded = base64.b64decode(credentials, validate=True).decode("utf-8", "surrogateescape")
            except (binascii.Error, ValueError):
                return ""
            return decoded.partition(":")[2]
        case _:
            return ""


def challenge(realm: str) -> web.Response:
    """Ask for a token. The answer to a request that has none, or another cache's."""
    return web.Response(
        status=401,
        text="this cache wants a token; in netrc it is the password for this host\n",
        headers={"WWW-Authenticate": f'Basic realm="drover cache {realm}"', "Cache-Control": "no-store"},
    )


def load_tokens(sources: Sequence[str]) -> TokenSet:
    """Read all tokens of the sources: files with one token a line, or `env:NAME` with the same content.

    Empty lines and lines that start with `#` do not count.

    Raises:
        TokenError: a file cannot be read, or others than its owner can read it, a variable is not set, there is no
            token in a source or one is too short to be a secret. Never quotes a token.
    """
    tokens: list[str] = []
    for source in sources:
        lines = [line.strip() for line in read_source(source).splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise TokenError(f"there is no token in {source}.")
        if min(len(token) for token in found) < LEAST_TOKEN_CHARACTERS:
            raise TokenError(
                f"a token in {source} has fewer than {LEAST_TOKEN_CHARACTERS} characters: make a longer one."
            )
        tokens += found
    return TokenSet(tokens)


def read_source(source: str) -> str:
    """Return what a file of mode 0600, or `env:NAME`, holds. Raises `TokenError`, which never quotes it."""
    if source.startswith(ENVIRONMENT):
        name = source.removeprefix(ENVIRONMENT)
        if name not in os.environ:
            raise TokenError(f"the environment variable {name}, which should hold tokens, is not set.")
        return os.environ[name]
    path = Path(source).expanduser()
    try:
        with path.open("rb") as file:
            # Asked of the open file, not of the path, which might be swapped in between.
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise TokenError(f"the token file {path} is not a regular file.")
            if mode & 0o077:
                raise TokenError(
                    f"others can read the token file {path}; run `chmod 600 {path}` and replace its tokens."
                )
            data = file.read(MAX_TOKEN_FILE_BYTES + 1)
    except OSError as error:
        raise TokenError(f"cannot read the token file {path}: {error.strerror}.") from None
    if len(data) > MAX_TOKEN_FILE_BYTES:
        raise TokenError(f"the token file {path} is larger than {MAX_TOKEN_FILE_BYTES} bytes.")
    return data.decode("utf-8", "replace")
