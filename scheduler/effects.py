"""Effects: commands to the shell, in the imperative. Every effect ends in exactly one event and may be run twice.

But for `FetchAhead`, which is a hint: it ends in no event, and may be lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.model import BuilderId, LeaseId, StepKey
from scheduler.values import quick


@quick
@dataclass(frozen=True, slots=True)
class StartBuild:
    """Hand the lease to the builder; ends in `BuildSucceeded` or `BuildFailed`."""

    lease: LeaseId
    builder: BuilderId
    recipe: int
    #: Leases of the same builder that it follows: it begins once these are built there, published or not.
    after: tuple[LeaseId, ...] = ()


@quick
@dataclass(frozen=True, slots=True)
class CancelBuild:
    """Stop the build if it still runs there; a builder that does not know the lease has nothing to do."""

    lease: LeaseId
    builder: BuilderId


@quick
@dataclass(frozen=True, slots=True)
class PublishOutputs:
    """Verify, sign and publish what `evidence` names; ends in `OutputsPublished` or `PublishFailed`."""

    lease: LeaseId
    evidence: bytes


@quick
@dataclass(frozen=True, slots=True)
class FetchAhead:
    """Let the builder fetch the inputs of a step that it should have next, while its slots build."""

    step: StepKey
    recipe: int
    builder: BuilderId


Effect = StartBuild | CancelBuild | PublishOutputs | FetchAhead
