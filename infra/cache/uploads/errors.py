"""Errors that end an upload."""

from __future__ import annotations

from infra.objects.errors import CacheError


class UploadError(CacheError):
    """An upload cannot go on so. `code` is for programs."""

    code = "upload_failed"


class UnknownUploadError(UploadError):
    """No such upload: it ended, expired, or the coordinator began anew. Begin again; what had arrived is found."""

    code = "unknown_upload"


class ForbiddenPathError(UploadError):
    """The sender may not upload this path."""

    code = "forbidden_path"


class BadUploadError(UploadError):
    """The message makes no sense."""

    code = "bad_upload"


class TooManyUploadsError(UploadError):
    """As much is under way as this coordinator takes; try again later."""

    code = "too_many_uploads"


class WrongOffsetError(UploadError):
    """A piece does not begin where the object ends; `offset` says where that is."""

    code = "wrong_offset"

    def __init__(self, offset: int) -> None:
        super().__init__(f"the object has {offset} bytes so far: go on there")
        self.offset = offset
