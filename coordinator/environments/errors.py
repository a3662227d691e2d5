"""Errors of tracked environments."""

from __future__ import annotations

from typing import ClassVar

from coordinator.errors import CoordinatorError


class EnvironmentSourceError(CoordinatorError):
    """A source of an environment is refused, cannot be looked at, or holds nothing that can be tracked."""

    code: ClassVar[str] = "environment_source"
    status: ClassVar[int] = 422
