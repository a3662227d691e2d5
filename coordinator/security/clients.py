"""Clients of the API by their tokens: each has an owner, whose share of the farm its submissions count for.

The farm's own token is the operator's: it may do everything, and its owner is `api`. The tokens of an owner
(`[[owners]]`) may submit and ask. An owner follows from the token alone, never from what a client says.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from coordinator.defaults import OPERATOR
from coordinator.security.tokens import TokenError, read_tokens


@dataclass(frozen=True, slots=True)
class Client:
    """Holder of a token."""

    owner: str
    #: It holds the farm's own token.
    is_operator: bool = False

    def may_change(self, owner: str) -> bool:
        """Return whether it may change a submission of that owner."""
        return self.is_operator or owner == self.owner


class ClientTokens:
    """Tokens of the API; compares a text with all of them, in a time that does not depend on which."""

    def __init__(self, farm: str, owners: Mapping[str, Iterable[str]] | None = None) -> None:
        """`farm` is the farm's own token. Raises `TokenError` where two owners have the same one."""
        self._clients = {_digest(farm): Client(OPERATOR, is_operator=True)}
        for owner, tokens in (owners or {}).items():
            for digest in map(_digest, tokens):
                other = self._clients.setdefault(digest, Client(owner))
                if other.owner != owner:
                    raise TokenError(f"the owners {other.owner} and {owner} have the same token; make one for each.")

    def find(self, token: str) -> Client | None:
        """Return whose token it is; None for one that is unknown."""
        found: Client | None = None
        digest = _digest(token)
        for known, client in self._clients.items():
            if hmac.compare_digest(digest, known):
                found = client
        return found


def load_clients(farm: str, owners: Mapping[str, Sequence[str]]) -> ClientTokens:
    """Return the tokens of the farm and of its owners, whose sources are as in `read_tokens`. Raises `TokenError`."""
    return ClientTokens(farm, {owner: read_tokens(sources) for owner, sources in owners.items()})


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()
