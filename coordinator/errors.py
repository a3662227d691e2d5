"""The root of everything the coordinator and its clients raise on purpose.

Every message is one sentence for a person, says what to do where something can be done, and holds nothing secret: it is
shown by the command line and sent to HTTP clients as it stands.
"""

from __future__ import annotations

from typing import ClassVar


class CoordinatorError(Exception):
    """One sentence for a person (`str()`), one word for a program (`code`), and the HTTP status of the answer."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500


class IntakeError(CoordinatorError):
    """A request is well formed, but its derivations, sources or graph are not what this farm takes, and why."""

    code: ClassVar[str] = "bad_request"
    status: ClassVar[int] = 422


class MissingMemberError(IntakeError):
    """A member of the graph was not sent, not before what needs it, or is not here any more; sending it helps."""

    code: ClassVar[str] = "missing_member"


class BadRequestError(CoordinatorError):
    """A request cannot be understood."""

    code: ClassVar[str] = "bad_request"
    status: ClassVar[int] = 400


class NotFoundError(CoordinatorError):
    """A request names something that does not exist."""

    code: ClassVar[str] = "not_found"
    status: ClassVar[int] = 404


class ConflictError(CoordinatorError):
    """A request contradicts an earlier one, or comes too late: what it names has moved on."""

    code: ClassVar[str] = "conflict"
    status: ClassVar[int] = 409


class OtherWishError(ConflictError):
    """A request has the idempotency key of a submission that wishes something else."""

    code: ClassVar[str] = "other_wish"


class HeldError(ConflictError):
    """Another client grows the submission of an idempotency key; the same request may be taken later."""

    code: ClassVar[str] = "held"


class ForbiddenError(CoordinatorError):
    """The token of a request does not give the right to do this."""

    code: ClassVar[str] = "forbidden"
    status: ClassVar[int] = 403


class UnavailableError(CoordinatorError):
    """The coordinator is stopping or cannot take more now; trying again later helps."""

    code: ClassVar[str] = "unavailable"
    status: ClassVar[int] = 503


class StoppedError(CoordinatorError):
    """A part of the farm ended that it cannot live without."""

    code: ClassVar[str] = "stopped"
