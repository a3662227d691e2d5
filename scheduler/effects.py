"""Effects: commands to the shell, in the imperative. Every effect ends in exactly one event and may be run twice."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.model import BuilderId, LeaseId
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


Effect = StartBuild | CancelBuild | PublishOutputs
