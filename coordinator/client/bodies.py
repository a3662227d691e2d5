"""Bodies of the requests of a build, as a client makes them: without pydantic, whose import takes longer.

Each has the fields and defaults of the model of `coordinator.api.requests` that it names, which a test compares. The
coordinator checks them, as it does those of any stranger; what it refuses comes back as one sentence.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from coordinator.api.root_limits import RootLimits
from infra.records import record


@record(frozen=True, slots=True, kw_only=True)
class RootBody:
    """`RootRequest`."""

    attr: str
    drv: str
    outputs: tuple[str, ...] = ()
    limits: RootLimits | None = None


@record(frozen=True, slots=True, kw_only=True)
class StageBody:
    """`ClientStage`."""

    name: Literal["evaluate", "closure", "upload"]
    begin: float
    end: float


@record(frozen=True, slots=True, kw_only=True)
class SubmitBody:
    """`SubmitRequest`."""

    roots: tuple[RootBody, ...]
    open: bool = False
    client: str = ""
    evaluates: str = ""
    label: str = ""
    retry_failed: bool = False
    wait_s: int | None = None
    makers: tuple[str, ...] = ()
    traceparent: str = ""
    stages: tuple[StageBody, ...] = ()
    branch: str = ""
    pull: str = ""
    commit: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    supersede: bool = False
    deadline_s: int = 0
    deadline_at: float = 0.0
    fail_fast: bool = False
    idempotency_key: str = ""


@record(frozen=True, slots=True, kw_only=True)
class GrowBody:
    """`GrowRequest`."""

    roots: tuple[RootBody, ...] = ()
    makers: tuple[str, ...] = ()
    retry_failed: bool = False
    client: str = ""


@record(frozen=True, slots=True, kw_only=True)
class UnevaluatedBody:
    """`UnevaluatedAttr`."""

    attr: str = ""
    kind: str = "error"
    message: str = ""


@record(frozen=True, slots=True, kw_only=True)
class SealBody:
    """`SealRequest`."""

    not_evaluated: tuple[UnevaluatedBody, ...] = ()
    unevaluated: int = 0
    incomplete: str = ""
    stages: tuple[StageBody, ...] = ()
    client: str = ""
    drv_count: int | None = None


@record(frozen=True, slots=True, kw_only=True)
class MembersBody:
    """`IntakeQuery`."""

    store_dir: str
    derivations: tuple[str, ...]
    sources: tuple[str, ...]
    built: tuple[str, ...] = ()
