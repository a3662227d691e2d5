"""Answers about wish lists: what each package and system could be fetched from, or would be built as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from infra.records import record

#: States of a wish. `here`, `upstream`: its whole closure can be fetched. `gone`: no cache has it, and it cannot be
#: built. `unknown`: its closure was not looked up in time.
PlanState: TypeAlias = Literal[
    "here",
    "upstream",
    "building",
    "buildable",
    "failed",
    "no_worker",
    "unfree",
    "insecure",
    "broken",
    "unsupported",
    "gone",
    "unevaluated",
    "unknown",
]
UpstreamState: TypeAlias = Literal["answered", "slow", "away"]


@record(frozen=True, slots=True, kw_only=True)
class WishPlan:
    """One wish, as it stands."""

    name: str
    system: str
    state: PlanState
    #: It is on the asker's machine already.
    present: bool = False
    #: Paths of its runtime closure and bytes to download, where it can be fetched.
    paths: int = 0
    bytes: int = 0
    #: Steps that would be built for it, itself included, seconds of builds as far as they are known, and the steps
    #: without history. `steps` is 0 where the farm does not have its derivation: then its own history alone counts.
    steps: int = 0
    build_s: float = 0.0
    unknown: int = 0
    #: Key of its step, "" where it has none.
    step: str = ""
    #: Where it is known to fail: the step whose own failure is the root cause, its name, and Unix seconds of that.
    cause: str = ""
    cause_name: str = ""
    since: float = 0.0
    #: One sentence where the state says too little.
    because: str = ""


@record(frozen=True, slots=True, kw_only=True)
class SystemPlan:
    """All wishes for one system together; what is shared counts once."""

    system: str
    #: Wishes by state, without those that are on the asker's machine.
    counts: Mapping[PlanState, int]
    present: int
    #: Paths and bytes that Nix would fetch of what can be fetched, from here and from upstreams; bytes unpacked.
    here_paths: int = 0
    here_bytes: int = 0
    upstream_paths: int = 0
    upstream_bytes: int = 0
    unpacked_bytes: int = 0
    #: Steps that would be built, seconds of builds as far as they are known, steps without history, and wishes whose
    #: derivations the farm does not have, so that more may be below them.
    steps: int = 0
    build_s: float = 0.0
    unknown: int = 0
    ungraphed: int = 0
    #: Builds that workers do at one time for the system now.
    slots: int = 0


@record(frozen=True, slots=True, kw_only=True)
class UpstreamPlan:
    """An upstream, and paths that would come from it; one that is `slow` or `away` counts as having nothing."""

    url: str
    state: UpstreamState
    paths: int


@record(frozen=True, slots=True, kw_only=True)
class PlanView:
    """Plan of a wish list."""

    digest: str
    #: In the order of the list.
    wishes: tuple[WishPlan, ...]
    systems: tuple[SystemPlan, ...]
    upstreams: tuple[UpstreamPlan, ...] = ()
    notes: tuple[str, ...] = ()
    #: Paths that were not looked up in time; a plan that is made again finds more.
    unfollowed: int = 0
