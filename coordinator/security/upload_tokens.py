"""Tokens with which a worker uploads the outputs of one lease, and nothing else.

    drl1.<base64url of the claims>.<base64url of HMAC-SHA256 over "drl1." and the encoded claims>

The claims are canonical JSON (sorted keys, no spaces): the cache `c`, the step `s` and attempt `a` of the lease, the
base names `p` of its outputs, and when it expires, `e`, in Unix seconds. The coordinator makes and checks them with one
secret (`farm_secrets`), so a token needs no memory and outlives a restart, also that by another coordinator. Its
holder can put bytes where that lease's outputs are expected: what they are, and whether the lease still stands, is
decided when they are published.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from coordinator.config import DEFAULT_CACHE
from infra.clock import Clock
from infra.nix.store_path import base_name_of
from scheduler.model import LeaseId

#: Version and first part of every token.
VERSION: Final = "drl1"
#: Seconds that a token is good for beside the time that the build may take.
TOKEN_S: Final = 3 * 24 * 3600
#: A longer text is no token of ours.
MAX_TOKEN: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class UploadGrant:
    """Grant that a token proves: base names of paths of one lease, in one cache, until then (Unix seconds)."""

    cache: str
    step: str
    attempt: int
    paths: tuple[str, ...]
    expires_at: int


class UploadTokens:
    """Makes and checks tokens."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, cache: str, step: str, attempt: int, paths: Iterable[str], expires_at: float) -> str:
        """Return a token for the base names `paths`."""
        claims = {"c": cache, "s": step, "a": attempt, "p": sorted(paths), "e": int(expires_at)}
        body = _encode(json.dumps(claims, sort_keys=True, separators=(",", ":")).encode())
        return f"{VERSION}.{body}.{_encode(self._mac(body))}"

    def for_lease(self, clock: Clock) -> Callable[[LeaseId, Iterable[str]], str]:
        """Return what makes the token of a lease in the farm's cache from the full paths of its outputs."""

        def make(lease: LeaseId, outputs: Iterable[str]) -> str:
            names = [base_name_of(path) for path in outputs]
            return self.make(DEFAULT_CACHE, lease.step, lease.attempt, names, clock.now() + TOKEN_S)

        return make

    def for_path(self, clock: Clock) -> Callable[[str], str]:
        """Return what makes a token for one path (base name) of the farm's cache, for a worker that is to repair it."""

        def make(base_name: str) -> str:
            return self.make(DEFAULT_CACHE, f"repair {base_name}", 0, [base_name], clock.now() + TOKEN_S)

        return make

    def check(self, token: str, now: float) -> UploadGrant | None:
        """Return what the token allows now, None if it is not one of ours or has expired."""
        if len(token) > MAX_TOKEN or not token.isascii():
            return None
        version, _, rest = token.partition(".")
        body, _, mac = rest.partition(".")
        if version != VERSION or not hmac.compare_digest(_encode(self._mac(body)), mac):
            return None
        # Only what we wrote ourselves gets here.
        try:
            claims = json.loads(base64.urlsafe_b64decode(body))
        except (binascii.Error, ValueError):
            return None
        grant = UploadGrant(claims["c"], claims["s"], claims["a"], tuple(claims["p"]), claims["e"])
        return grant if now < grant.expires_at else None

    def _mac(self, body: str) -> bytes:
        return hmac.digest(self._secret, f"{VERSION}.{body}".encode(), sha256)


def _encode(data: bytes) -> str:
    # With its padding: one value has one text.
    return base64.urlsafe_b64encode(data).decode()
