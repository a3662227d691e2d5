"""Error of an evaluation as a whole."""

from __future__ import annotations

from typing import ClassVar

from coordinator.errors import CoordinatorError


class EvaluationError(CoordinatorError):
    """There is no derivation to build; the sentence has Nix's own first error line and what to do."""

    code: ClassVar[str] = "evaluation"
