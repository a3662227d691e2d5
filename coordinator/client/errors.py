"""Errors of the client: what a command shows where the coordinator does not answer, or refuses."""

from __future__ import annotations

import os
from typing import ClassVar, Final

import orjson

from coordinator.errors import CoordinatorError, UnavailableError


class ClientError(CoordinatorError):
    """Talking to the coordinator failed; the sentence says what to do."""

    code: ClassVar[str] = "client"


class BadArgumentError(ClientError):
    """The command was called with something that cannot be meant; calling it otherwise helps."""

    code: ClassVar[str] = "bad_argument"


class UnreachableError(ClientError):
    """No coordinator answers at the address, or no longer."""

    code: ClassVar[str] = "unreachable"

    def __init__(self, url: str, why: str = "") -> None:
        reason = f" ({why})" if why else ""
        super().__init__(f"cannot reach the coordinator at {url}{reason}; start one with `drover up` or set DROVER_URL")


#: Codes of refusals that pass by themselves: it can take no more just now, or another coordinator leads.
PASSING: Final = frozenset({UnavailableError.code, "standby"})


class RefusedError(ClientError):
    """The coordinator answered, and the answer is no.

    Attributes:
        http_status: Of the answer.
        reason: The coordinator's own code for it, such as `not_found`.
    """

    code: ClassVar[str] = "refused"

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.http_status = status
        self.reason = reason

    @property
    def is_passing(self) -> bool:
        """True where the same request may be taken in a moment."""
        return self.reason in PASSING


def refusal(status: int, raw: bytes, url: str) -> RefusedError:
    """Return the error for an answer that is not a success; `raw` is its body, an `ErrorView` or a stranger's."""
    try:
        body = orjson.loads(raw)["error"]
        reason, message = str(body["code"]), str(body["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        reason, message = "http", f"{url} answered with status {status}; is that a drover coordinator?"
    if status == 401:
        message = (
            f"the coordinator at {url} did not accept the API token; name its file with --token-file "
            "or DROVER_TOKEN_FILE (`drover up` writes it as api-token into its state directory)"
        )
    return RefusedError(status, reason, message)


def reason_of(error: BaseException) -> str:
    """Return why a connection failed, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.errno:
        # Those of name resolution are negative.
        return (os.strerror(error.errno) if error.errno > 0 else error.strerror or "connection failed").lower()
    return str(error) or type(error).__name__
