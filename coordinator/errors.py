"""The root of everything the coordinator and its clients raise on purpose."""

from __future__ import annotations

from typing import ClassVar


class CoordinatorError(Exception):
    """One sentence for a person (`str()`) and one word for a program (`code`, used in HTTP answers)."""

    code: ClassVar[str] = "internal"


class IntakeError(CoordinatorError):
    """A client's request cannot be accepted, and why; `status` is that of the HTTP answer."""

    code: ClassVar[str] = "bad_request"
    status: ClassVar[int] = 400
