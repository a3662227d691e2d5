"""Answers about what differs between two builds, and why a step ran, as JSON. Plain records.

Every text is printable and of bounded length, whatever a derivation holds (`infra.nix.difference`).
"""

from __future__ import annotations

from typing import Literal

from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class ChangeView:
    """A field of a derivation that differs; null on the side that lacks it. Long values are cut around the place."""

    field: Literal["system", "builder", "argument", "environment", "feature", "output", "source", "input"]
    #: Of the variable, source, input or output, or the place of the argument; "" where a field is one thing.
    name: str
    before: str | None
    after: str | None


@record(frozen=True, slots=True, kw_only=True)
class CauseView:
    """A derivation whose own fields differ, or that could not be compared."""

    name: str
    previous_name: str
    #: Base names.
    drv: str
    previous_drv: str
    #: Names from an input of the step down to this one; empty for the step itself.
    way: tuple[str, ...]
    #: The first of `change_count`.
    changes: tuple[ChangeView, ...]
    change_count: int
    #: Other derivations of the package that differ in the same way.
    alike: int
    #: Why there are no changes: the farm lacks one of the derivations, or they are too large.
    uncompared: Literal["", "unknown", "too large"] = ""


@record(frozen=True, slots=True, kw_only=True)
class ComparedView:
    """A build that is compared."""

    step: str
    name: str
    system: str
    #: Base name.
    drv: str
    #: Of its last attempt that ended; "" and 0 where none is remembered.
    outcome: str = ""
    ended_at: float = 0.0


@record(frozen=True, slots=True, kw_only=True)
class DifferenceView:
    """The difference of a step from another build, by default the last one of its name, down to the first causes."""

    step: ComparedView
    #: None where there is nothing to compare with; `note` says so.
    other: ComparedView | None = None
    #: The first of `cause_count`, those next to the step first.
    causes: tuple[CauseView, ...] = ()
    cause_count: int = 0
    #: Pairs of derivations that were compared, and that were seen and left out.
    compared: int = 0
    unfollowed: int = 0
    #: A sentence about what is missing from the answer, or that nothing differs.
    note: str = ""


@record(frozen=True, slots=True, kw_only=True)
class RunReasonView:
    """The reason why an attempt was made."""

    attempt: int
    #: Of its lease; 0 where that is not known.
    at: float
    reason: str
