"""The rows of the read model: a step, a submission, a worker; and how a step's move shows in its submissions.

Written by `coordinator.views` alone, read by whoever renders them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from coordinator.schema import StepStatus, SubmissionState, WorkerView
from scheduler.model import Failure, Recipe, Requirements, StepKey, SubmissionId
from workers.protocol import HeldLease, Hello

OPEN = frozenset({StepStatus.WAITING, StepStatus.READY, StepStatus.RUNNING, StepStatus.PUBLISHING})
ACTIVE = frozenset({StepStatus.RUNNING, StepStatus.PUBLISHING})
NOTHING = Requirements("")


class Listener(Protocol):
    """Whoever watches a submission."""

    def note(self, row: StepRow) -> None:
        """A step of the submission changed."""

    def touch(self) -> None:
        """Something about the submission as a whole changed."""


@dataclass(slots=True, eq=False)
class StepRow:
    """A step as folded so far."""

    key: StepKey
    state: StepStatus = StepStatus.WAITING
    recipes: tuple[Recipe, ...] = ()
    #: Index of the active recipe.
    recipe: int = 0
    #: What the active recipe requires; changes only while the step is not ready.
    requires: Requirements = NOTHING
    #: Needs of the active recipe that are not done.
    pending: int = 0
    #: Steps of which any recipe needs this one.
    dependents: list[StepRow] = field(default_factory=list)
    #: Submissions that had the step open when they arrived and have not ended.
    submissions: list[SubmissionRow] = field(default_factory=list)
    attempt: int = 0
    builder: str = ""
    stage: str = ""
    phase: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0
    uploaded_bytes: int = 0
    failure: Failure | None = None
    cause: str = ""
    #: Why the last lease of this life ended without a verdict through the farm's fault.
    trouble: str = ""


@dataclass(slots=True, eq=False)
class SubmissionRow:
    """A submission as folded so far."""

    id: SubmissionId
    created_at: float
    roots: frozenset[StepKey]
    #: Grows where a member falls back to a recipe with other needs.
    members: list[StepKey]
    #: Members that were done at arrival.
    held: int = 0
    joined: int = 0
    #: The other members by state; the values sum up to `len(members) - held`.
    counts: dict[StepStatus, int] = field(default_factory=lambda: dict.fromkeys(StepStatus, 0))
    #: Members in one of the open states.
    open: int = 0
    done_roots: int = 0
    #: Ready members by what they require; no zeros.
    ready: dict[Requirements, int] = field(default_factory=dict)
    active: dict[StepKey, StepRow] = field(default_factory=dict)
    failed: dict[StepKey, StepRow] = field(default_factory=dict)
    uploaded_bytes: int = 0
    withdrawn: bool = False
    #: Time of the last fact that moved a member.
    touched_at: float = 0.0
    ended: bool = False
    watchers: list[Listener] = field(default_factory=list)

    def begin(self, members: list[StepKey], at: float) -> None:
        """Start over with these members, none of which is counted yet."""
        self.members, self.touched_at, self.ended = members, at, False
        self.held = self.joined = self.open = self.done_roots = 0
        self.counts = dict.fromkeys(StepStatus, 0)
        self.ready, self.active, self.failed = {}, {}, {}

    @property
    def state(self) -> SubmissionState:
        """Derived, never stored."""
        if self.withdrawn:
            return SubmissionState.CANCELLED
        if not self.ended:
            return SubmissionState.RUNNING
        return SubmissionState.SUCCEEDED if self.done_roots == len(self.roots) else SubmissionState.FAILED


@dataclass(slots=True, eq=False)
class WorkerRow:
    """A worker as it last spoke of itself."""

    hello: Hello
    state: str = "online"
    leases: tuple[HeldLease, ...] = ()
    built: int = 0
    last_seen: float = 0.0
    reason: str = ""
    #: Until when the farm gives it no work, and why; 0 where it does.
    quarantined_until: float = 0.0
    quarantine: str = ""

    @property
    def told_state(self) -> str:
        """The state as people see it."""
        return "quarantined" if self.quarantined_until and self.state in ("online", "draining") else self.state


def enter(sub: SubmissionRow, row: StepRow) -> None:
    """Count a member that was not done at arrival."""
    sub.counts[row.state] += 1
    sub.open += row.state in OPEN
    arrive(sub, row, row.state)


def place(sub: SubmissionRow, row: StepRow, old: StepStatus, new: StepStatus) -> None:
    """Keep the indexes of a submission in step with a member's move."""
    sub.open += (new in OPEN) - (old in OPEN)
    if row.key in sub.roots:
        sub.done_roots += (new is StepStatus.DONE) - (old is StepStatus.DONE)
    if old in ACTIVE:
        sub.active.pop(row.key, None)
    elif old is StepStatus.READY:
        left = sub.ready[row.requires] - 1
        if left:
            sub.ready[row.requires] = left
        else:
            del sub.ready[row.requires]
    elif old is StepStatus.FAILED:
        sub.failed.pop(row.key, None)
    arrive(sub, row, new)


def arrive(sub: SubmissionRow, row: StepRow, state: StepStatus) -> None:
    """Put a member in the index of the state that it has come into."""
    if state in ACTIVE:
        sub.active[row.key] = row
    elif state is StepStatus.READY:
        sub.ready[row.requires] = sub.ready.get(row.requires, 0) + 1
    elif state is StepStatus.FAILED:
        sub.failed[row.key] = row


def note(row: StepRow) -> None:
    """Tell whoever watches a submission of the step that it changed."""
    for sub in row.submissions:
        for watcher in sub.watchers:
            watcher.note(row)


def touch(sub: SubmissionRow) -> None:
    """Tell whoever watches a submission that it changed as a whole."""
    for watcher in sub.watchers:
        watcher.touch()


def worker_view(name: str, row: WorkerRow) -> WorkerView:
    """Render a worker."""
    return WorkerView(
        name=name,
        state=row.told_state,
        systems=row.hello.systems,
        emulated=row.hello.emulated,
        features=row.hello.features,
        slots=row.hello.slots,
        leases=tuple((lease.step, lease.stage.value) for lease in row.leases),
        nix_version=row.hello.nix_version,
        built=row.built,
        last_seen=row.last_seen,
        reason=row.reason or row.quarantine,
        until=row.quarantined_until,
    )
