"""Answers about paths that the farm has from its upstreams, as plain records."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from infra.records import record

#: Beginning of the name of every run of mirroring.
MIRROR_PREFIX: Final = "mirror-"


class MirrorState(StrEnum):
    """States of a run, in the order in which it has them; the last three are ends."""

    QUEUED = "queued"
    #: The closure is looked for in the upstreams.
    SEARCHING = "searching"
    FETCHING = "fetching"
    DONE = "done"
    FAILED = "failed"
    #: What was published before stays.
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True for an end."""
        return self in {MirrorState.DONE, MirrorState.FAILED, MirrorState.CANCELLED}


class MirroredOutcome(StrEnum):
    """Outcomes for a path that was wanted."""

    #: It was in the cache before, with all that it refers to.
    HERE = "here"
    #: Its bytes were fetched, verified and published, as were those of all that it refers to.
    MIRRORED = "mirrored"
    #: An upstream has it whole, and only that is known here: as that upstream is configured.
    RECORDED = "recorded"
    #: No upstream has it.
    NOWHERE = "nowhere"
    #: What the upstreams sent does not count, or they do not answer; `reason` says why.
    REFUSED = "refused"


@record(frozen=True, slots=True, kw_only=True)
class MirroredPathView:
    """A full store path that was wanted."""

    path: str
    outcome: MirroredOutcome
    #: Address of the upstream that has it; empty where none counts.
    upstream: str = ""
    #: One clause about why it is not here, or what is odd about it.
    reason: str = ""


@record(frozen=True, slots=True, kw_only=True)
class KnownDerivationView:
    """A derivation that the farm has, with all that it needs."""

    #: Full paths of its .drv and of its outputs by name, "" for one that only a build says.
    path: str
    system: str
    outputs: Mapping[str, str]


@record(frozen=True, slots=True, kw_only=True)
class KnownDerivationsView:
    """Derivations of a question that the farm has, those of outputs included."""

    derivations: tuple[KnownDerivationView, ...]
    #: Output of the question -> its derivation, which is among `derivations`.
    makers: Mapping[str, str]


@record(frozen=True, slots=True, kw_only=True)
class MirrorView:
    """One run, as it stands."""

    id: str
    state: MirrorState
    #: Why it failed: one sentence.
    error: str = ""
    #: Paths that were asked for.
    wanted: int = 0
    #: Of their closure so far: here before, found in upstreams with so many bytes of NARs, and found nowhere.
    here: int = 0
    found: int = 0
    nar_bytes: int = 0
    nowhere: int = 0
    #: Published by this run, fetched for that, recorded, and not had although they were found.
    taken: int = 0
    fetched_bytes: int = 0
    recorded: int = 0
    failed: int = 0
    #: The paths that were asked for; empty before the end.
    paths: tuple[MirroredPathView, ...] = ()
