"""Words of a rebuild: what differs between two evaluations, and what was built of both.

Every text may come from a stranger; renderings make it harmless in their own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from coordinator.api.rebuild_models import ForecastView, RebuildCausesView


@dataclass(frozen=True, slots=True)
class Package:
    """A derivation that an attribute of one side stands for."""

    attr: str
    system: str
    #: Full store path.
    drv: str
    #: Name and full path of each output that is wanted, sorted by name.
    outputs: tuple[tuple[str, str], ...] = ()
    maintainers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SetSide:
    """One side: packages by attribute, and the attributes that cannot be evaluated with why."""

    name: str
    packages: Mapping[str, Package]
    failed: Mapping[str, str] = field(default_factory=dict)


class SetChange(StrEnum):
    """Ways in which an attribute differs between the sides."""

    CHANGED = "changed"
    ADDED = "added"
    REMOVED = "removed"
    #: It evaluates at the base alone, at the head alone, at neither.
    NO_LONGER_EVALUATES = "no longer evaluates"
    EVALUATES_AGAIN = "evaluates again"
    NEVER_EVALUATES = "evaluates at neither"


#: Those that every system counts.
_SETS: Final = (SetChange.CHANGED, SetChange.ADDED, SetChange.REMOVED)


class RebuildVerdict(StrEnum):
    """Result of an attribute."""

    NEWLY_FAILING = "newly failing"
    #: It fails, and the base's result is not known.
    FAILING = "failing"
    STILL_FAILING = "still failing"
    FIXED = "fixed"
    BUILT = "built"
    #: Cancelled, or not built yet.
    NOT_BUILT = "not built"
    #: Nothing of the head is to be built.
    NOTHING = ""


class OutputChange(StrEnum):
    """Likeness of the outputs of two builds of one attribute."""

    NO_OP = "no-op"
    DIFFERENT = "different"
    UNKNOWN = ""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on both sides; None where that is not known."""

    before: int | None = None
    after: int | None = None

    @property
    def delta(self) -> int | None:
        """The growth."""
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True, slots=True)
class AttrReport:
    """One attribute that differs."""

    attr: str
    system: str
    change: SetChange
    verdict: RebuildVerdict = RebuildVerdict.NOTHING
    #: Places in the report's causes; the first MAX_REASONS.
    causes: tuple[int, ...] = ()
    #: Full paths of the derivations.
    before: str = ""
    after: str = ""
    content: OutputChange = OutputChange.UNKNOWN
    nar: Sizes = Sizes()
    closure: Sizes = Sizes()
    #: Key of the step that is the root cause of a failure.
    root_cause: str = ""
    #: Why it cannot be evaluated.
    error: str = ""


@dataclass(frozen=True, slots=True)
class RootCause:
    """A step that failed, and the attributes that fail because of it."""

    step: str
    name: str
    system: str
    kind: str
    message: str
    attrs: tuple[str, ...]
    log_tail: str = ""
    has_log: bool = True


@dataclass(frozen=True, slots=True)
class SideReport:
    """One side of a report."""

    name: str
    attributes: int
    not_evaluated: int
    submission: str = ""


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """All that a rebuild found. Attributes are in the order of their names."""

    base: SideReport
    head: SideReport
    attributes: tuple[AttrReport, ...]
    unchanged: int
    #: Attributes that differ and were left out by `--only` and its like.
    left_out: int = 0
    causes: RebuildCausesView = field(default_factory=RebuildCausesView)
    forecast: ForecastView | None = None
    base_forecast: ForecastView | None = None
    failures: tuple[RootCause, ...] = ()
    #: False of a dry run.
    is_built: bool = False
    #: Sentences about what was not taken or not compared.
    notes: tuple[str, ...] = ()

    def of_verdict(self, verdict: RebuildVerdict) -> list[AttrReport]:
        """Return the attributes with this result."""
        return [each for each in self.attributes if each.verdict is verdict]

    def of_change(self, change: SetChange) -> list[AttrReport]:
        """Return the attributes that differ in this way."""
        return [each for each in self.attributes if each.change is change]

    @property
    def no_ops(self) -> list[AttrReport]:
        """Attributes that were rebuilt for nothing."""
        return [each for each in self.attributes if each.content is OutputChange.NO_OP]

    @property
    def really_changed(self) -> list[AttrReport]:
        """Attributes whose outputs differ in more than hashes."""
        return [each for each in self.attributes if each.content is OutputChange.DIFFERENT]

    @property
    def fails_newly(self) -> bool:
        """True where something fails that did not before, as far as that is known, or was not built."""
        bad = {RebuildVerdict.NEWLY_FAILING, RebuildVerdict.FAILING, RebuildVerdict.NOT_BUILT}
        return any(each.verdict in bad for each in self.attributes)

    @property
    def is_incomplete(self) -> bool:
        """True where an attribute evaluates on one side only."""
        one_sided = {SetChange.NO_LONGER_EVALUATES, SetChange.EVALUATES_AGAIN}
        return any(each.change in one_sided for each in self.attributes)

    @property
    def systems(self) -> dict[str, dict[SetChange, int]]:
        """Attributes by system and by how they differ."""
        counts: dict[str, dict[SetChange, int]] = {}
        for each in self.attributes:
            if each.system:
                its = counts.setdefault(each.system, dict.fromkeys(_SETS, 0))
                its[each.change] = its.get(each.change, 0) + 1
        return dict(sorted(counts.items()))
