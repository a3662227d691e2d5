"""The words of the core: keys, requirements, steps, builders, leases.

The scheduler knows no Nix. A step is an opaque key with one or more recipes; every recipe of a step makes the same
result, so any one of them is enough. Everything here is an immutable value and can be compared, hashed and stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType


class ImpossibleError(Exception):
    """An input or fact that cannot occur unless another part has a bug; the root of this package's exceptions.

    The state may be half changed when it is raised from `evolve`: the engine must stop and replay its journal.
    """


class SubmissionRefusedError(ImpossibleError):
    """A graph that intake must have rejected. Raised before any fact: the state is as it was and may be used on."""


StepKey = NewType("StepKey", str)
BuilderId = NewType("BuilderId", str)
SubmissionId = NewType("SubmissionId", str)
#: Seconds since the epoch, as the engine's one clock tells them; the core only compares and adds.
Instant = NewType("Instant", float)


#: "Not set", before every real instant; and after every real instant.
NO_INSTANT = Instant(0.0)
FAR_OFF = Instant(float("inf"))
#: Steps that ask for this system run on any builder (Nix's own pseudo-system of `builtins`).
ANY_SYSTEM = "builtin"


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a builder must offer: one system, and every named feature (sorted, without repeats)."""

    system: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to make a step: what the builder must offer and which steps must be done before."""

    requirements: Requirements
    needs: tuple[StepKey, ...] = ()


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step and its recipes, preferred first; more than one only where different recipes give one result."""

    key: StepKey
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True)
class BuilderSpec:
    """What a builder offers. One with mandatory features takes only steps that ask for all of them."""

    id: BuilderId
    #: Changes whenever the builder's process starts anew; reports of an earlier incarnation are stale.
    incarnation: str
    systems: frozenset[str]
    features: frozenset[str] = frozenset()
    mandatory: frozenset[str] = frozenset()

    def offers(self, wanted: Requirements) -> bool:
        """Whether a step with these requirements may run here."""
        return (
            (wanted.system == ANY_SYSTEM or wanted.system in self.systems)
            and self.features.issuperset(wanted.features)
            and self.mandatory.issubset(wanted.features)
        )


@dataclass(frozen=True, slots=True, order=True)
class LeaseId:
    """The right to build one step once. `attempt` counts from 1 and never repeats for a step: it is the fence."""

    step: StepKey
    attempt: int


class FailureKind(StrEnum):
    """Why a lease ended without a result; `decide` holds the one table of what follows."""

    #: The builder ran and said no (exit status, output check). The next recipe is tried, else the step fails.
    PERMANENT = "permanent"
    #: The farm's fault (daemon gone, missing input, upload failed, worker lost). Tried again, elsewhere first.
    INFRASTRUCTURE = "infrastructure"
    #: The worker hands the lease back without having started it. Costs no attempt budget.
    RETURNED = "returned"
    #: The build was stopped on the coordinator's wish.
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Failure:
    """The kind decides, the message is for people and never parsed."""

    kind: FailureKind
    message: str
