"""Errors of the sending side."""

from __future__ import annotations

from infra.objects.errors import CacheError


class UploadFailedError(CacheError):
    """An upload came to an end without success; trying again may help, and goes on where it was."""


class SenderRefusedError(UploadFailedError):
    """The coordinator refused; `code` is its reason for programs, `status` that of HTTP."""

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class BehindError(UploadFailedError):
    """The other side has less of an object than it confirmed: it must be sent again from the start."""
