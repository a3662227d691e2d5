"""Error of a bisection."""

from __future__ import annotations

from typing import ClassVar

from coordinator.errors import CoordinatorError


class BisectError(CoordinatorError):
    """The bisection cannot be done as it is asked for; the sentence says what to do."""

    code: ClassVar[str] = "bad_argument"
