"""Tokens: read from files and the environment, kept as digests, and compared in constant time.

The farm's own token is made on the first start and lies in the state directory. Tokens of a cache are those of its
readers and its writers. Nix sends what netrc holds for the host: a token in the password of `Authorization: Basic`,
with any user name. It cannot send a bearer token, but CI scripts can, so both are taken. A cache without readers is
public. Writers may read. A token file that others than its owner can read is refused.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from coordinator.errors import CoordinatorError

#: Content of a token file: some thousand tokens.
MAX_TOKEN_FILE_BYTES = 256 * 1024
#: An `Authorization` that is longer holds no token of ours.
MAX_CREDENTIALS = 4096
ENVIRONMENT = "env:"
#: Random bytes of a token that is made here.
_TOKEN_BYTES = 32
#: A shorter text is no secret.
LEAST_TOKEN_CHARACTERS = 16


class TokenError(CoordinatorError):
    """The token file cannot be used."""

    code: ClassVar[str] = "token"


class TokenSet:
    """Some tokens; compares a text with all of them, in a time that does not depend on which."""

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self._digests = tuple(sha256(token.encode()).digest() for token in tokens)

    def __contains__(self, token: str) -> bool:
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
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
    """Access to a cache by tokens. Without `readers` every client may read; without `writers` none may write."""

    def __init__(self, readers: TokenSet | None = None, writers: TokenSet | None = None) -> None:
        self._writers = writers or TokenSet()
        self._readers = (readers | self._writers) if readers else TokenSet()

    @property
    def public(self) -> bool:
        """True if everybody may read."""
        return not self._readers

    @property
    def writable(self) -> bool:
        """True if some token may write."""
        return bool(self._writers)

    def may_read(self, token: str) -> bool:
        """Return whether a request with `token`, "" if it has none, may be answered at all."""
        return self.public or token in self._readers

    def may_write(self, token: str) -> bool:
        """Return whether a request with `token` may change the cache."""
        return token in self._writers


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


def load_token(path: Path) -> str:
    """Return the token in `path`, made if it is not there (mode 0600). Raises `TokenError`."""
    try:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return read_token(path)
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(token + "\n")
        except OSError:
            # Half a token would be in the way of the next start.
            path.unlink()
            raise
    except OSError as error:
        raise TokenError(f"cannot use the token file {path}: {error.strerror}.") from None
    return token


def read_token(path: Path) -> str:
    """Return the token in `path`. Raises `TokenError` or `OSError`."""
    if path.stat().st_mode & 0o077:
        raise TokenError(
            f"others can read the token file {path}; remove it (a new one is made) or set its mode to 600."
        )
    token = path.read_bytes().decode("ascii", "replace").strip()
    if len(token) < LEAST_TOKEN_CHARACTERS:
        raise TokenError(f"the token file {path} holds no token; remove it, a new one is made.")
    return token


def load_tokens(sources: Sequence[str]) -> TokenSet:
    """Return the tokens of the sources. Raises `TokenError`, as `read_tokens`."""
    return TokenSet(read_tokens(sources))


def read_tokens(sources: Sequence[str]) -> list[str]:
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
    return tokens


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
