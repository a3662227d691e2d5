"""Errors of intake: what a client sent is false, incomplete, too large, or of another store."""

from __future__ import annotations

from typing import ClassVar

from coordinator.errors import IntakeError


class DerivationRefusedError(IntakeError):
    """A derivation is not what it claims, or of a kind that the farm does not build."""

    code: ClassVar[str] = "bad_derivation"


class TooLargeError(IntakeError):
    """The graph is larger than a limit; the sentence has both numbers."""

    code: ClassVar[str] = "too_large"
    status: ClassVar[int] = 413


class StoreDirError(IntakeError):
    """The client's store directory is not the farm's."""

    code: ClassVar[str] = "store_dir"
