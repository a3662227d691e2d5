"""Errors of the journal: it cannot be used, it is another coordinator's by now, or its bytes are not understood."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from sqlalchemy.exc import SQLAlchemyError

from coordinator.errors import CoordinatorError
from infra.database import reason


class JournalError(CoordinatorError):
    """The journal cannot be read or written; the coordinator must not go on."""

    code: ClassVar[str] = "journal"


class FencedError(JournalError):
    """Another coordinator has taken over; nothing was written, and this one must end."""

    code: ClassVar[str] = "fenced"


class CodecError(CoordinatorError):
    """Stored bytes are not in a format that this version of drover reads."""

    code: ClassVar[str] = "damaged"


def journal_error(verb: str, error: BaseException) -> JournalError:
    """Return the error to raise where the database failed: one sentence without statement and parameters."""
    return JournalError(f"cannot {verb} the journal: {reason(error)}; the farm stops so that nothing is lost.")


@contextmanager
def translated(verb: str) -> Iterator[None]:
    """Turn database errors into `journal_error` while the block runs."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise journal_error(verb, error) from None
