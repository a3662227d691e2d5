"""Errors of remote evaluation."""

from __future__ import annotations

from typing import ClassVar

from coordinator.errors import CoordinatorError, NotFoundError


class RemoteOffError(CoordinatorError):
    """Remote evaluation is off here, now and in a moment; the sentence says what is missing."""

    code: ClassVar[str] = "remote_off"
    status: ClassVar[int] = 422


class TreeMissingError(NotFoundError):
    """A tree is not here; send it."""

    code: ClassVar[str] = "tree_missing"


class RemoteFailedError(CoordinatorError):
    """A remote evaluation ended without a result; the sentence says why."""

    code: ClassVar[str] = "evaluation"
