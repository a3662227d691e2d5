"""Answers about caches as JSON: plain records, as those of `coordinator.api.models`."""

from __future__ import annotations

from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class CacheView:
    """Statistics of one cache. Sizes are bytes; `saved_bytes` are those that objects shared by several paths save."""

    name: str
    paths: int
    tombstoned: int
    nar_bytes: int
    file_bytes: int
    saved_bytes: int
    realisations: int
    conflicts: int
    leases: int
    #: Roots by kind.
    roots: dict[str, int]
    public_keys: tuple[str, ...]


@record(frozen=True, slots=True, kw_only=True)
class CacheRootView:
    """A root: `kind` is `pin`, `submission`, `push` or another; 0 for times that there are none of."""

    kind: str
    name: str
    paths: int
    created_at: float
    expires_at: float = 0.0
    used_at: float = 0.0


@record(frozen=True, slots=True, kw_only=True)
class KeeperView:
    """A root that keeps a path: `chain` leads from a path of the root to it, each referring to the next."""

    kind: str
    name: str
    expires_at: float = 0.0
    chain: tuple[str, ...]


@record(frozen=True, slots=True, kw_only=True)
class WhyView:
    """Roots that keep a path."""

    path: str
    published: bool
    keepers: tuple[KeeperView, ...]


@record(frozen=True, slots=True, kw_only=True)
class CollectView:
    """Report of a collection, done or only planned. Sizes are bytes, times seconds."""

    dry_run: bool
    reachable: int
    tombstoned: int
    deleted_paths: int
    deleted_objects: int
    deleted_bytes: int
    orphans: int
    expired_roots: tuple[str, ...]
    phase_seconds: dict[str, float]


@record(frozen=True, slots=True, kw_only=True)
class FaultView:
    """A path that is not as promised, and what was done about it."""

    path: str
    fault: str
    outcome: str


@record(frozen=True, slots=True, kw_only=True)
class VerifyView:
    """Report of a verification; `faults` are at most some hundreds, `broken` counts all."""

    checked: int
    broken: int
    repaired: int
    hidden: int
    faults: tuple[FaultView, ...]
    seconds: float


@record(frozen=True, slots=True, kw_only=True)
class ResignView:
    """Report of signing anew."""

    narinfos: int
    realisations: int
    public_keys: tuple[str, ...]
