"""The rows of the read model: a step, a submission; and how a step's move shows in its submissions.

`coordinator.readmodel.views` alone writes them; the modules that render answers read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from coordinator.api.models import StepStatus, SubmissionState, TransferView
from scheduler.model import Failure, Requirements, StepKey, SubmissionId
from scheduler.terms import NO_TERMS, Terms, Withdrawal

OPEN = frozenset({StepStatus.WAITING, StepStatus.READY, StepStatus.RUNNING, StepStatus.PUBLISHING})
ACTIVE = frozenset({StepStatus.RUNNING, StepStatus.PUBLISHING})
NOTHING = Requirements("")
#: State of a submission by the reason why it was withdrawn.
WITHDRAWN = {
    Withdrawal.CANCELLED: SubmissionState.CANCELLED,
    Withdrawal.SUPERSEDED: SubmissionState.SUPERSEDED,
    Withdrawal.DEADLINE: SubmissionState.EXPIRED,
    Withdrawal.FAIL_FAST: SubmissionState.FAILED,
}


class Listener(Protocol):
    """Port of a watcher of one submission."""

    def step_changed(self, row: StepRow) -> None:
        """A step of the submission changed."""

    def submission_changed(self) -> None:
        """Something about the submission as a whole changed."""

    def bytes_moved(self, row: StepRow, now: float) -> None:
        """The transfer of a step of the submission came on; nothing else changed."""


@dataclass(slots=True, eq=False)
class Life:
    """History of a step. Most steps of a large submission wait and share one empty history."""

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
    #: Whether that was because the cache has lost an input; not known after a restart, until it is tried again.
    lost_input: bool = False
    #: Class of the isolation that it was built in.
    isolation: str = ""
    #: The phase that the builder had announced last when it failed; not known after a restart.
    failed_in: str = ""
    #: As its worker sent it last; of the moment, so it is in no fact and no snapshot.
    transfer: TransferView | None = None

    def clear_builder(self) -> None:
        """Record that no builder has the step any more."""
        self.builder = self.stage = self.phase = ""
        self.transfer = None


#: Of every step to which nothing has happened; never written.
_UNTOUCHED = Life()


@dataclass(slots=True, eq=False)
class StepRow:
    """A step as folded so far."""

    key: StepKey
    state: StepStatus = StepStatus.WAITING
    #: What the recipe in use required when the step last became ready.
    requires: Requirements = NOTHING
    #: Submissions that had the step open when they arrived and have not ended. Steps share one tuple
    #: (`SharedMemberships`).
    submissions: tuple[SubmissionRow, ...] = ()
    #: When the step last became ready; 0 where that is not known.
    ready_at: float = 0.0
    _life: Life | None = None

    @property
    def life(self) -> Life:
        """History of the step, for reading only."""
        return self._life or _UNTOUCHED

    def mutable_life(self) -> Life:
        """Return what happened to it, for writing."""
        if self._life is None:
            self._life = Life()
        return self._life


@dataclass(slots=True, eq=False)
class SubmissionRow:
    """A submission as folded so far."""

    id: SubmissionId
    created_at: float
    #: Grows while it is open.
    roots: set[StepKey]
    #: Grows while it is open, and where a member falls back to a recipe with other needs.
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
    #: Why it was withdrawn, and by which one where it was superseded.
    why: Withdrawal = Withdrawal.CANCELLED
    by: str = ""
    terms: Terms = NO_TERMS
    #: Time of the last fact that moved a member.
    touched_at: float = 0.0
    ended: bool = False
    #: Its client may send further roots: it does not end before it is sealed.
    is_open: bool = False
    #: Why it was sealed although more may have been meant to come; empty where its client sealed it.
    incomplete: str = ""
    watchers: list[Listener] = field(default_factory=list)

    def begin(self, members: list[StepKey], at: float) -> None:
        """Start over with these members, none of which is counted yet."""
        self.members, self.touched_at, self.ended = members, at, False
        self.held = self.joined = self.open = self.done_roots = 0
        self.counts = dict.fromkeys(StepStatus, 0)
        self.ready, self.active, self.failed = {}, {}, {}

    @property
    def has_nothing_left(self) -> bool:
        """True if no step is open any more, or none that a root needs, and no root is to come."""
        return not self.is_open and (self.open == 0 or self.done_roots == len(self.roots))

    @property
    def state(self) -> SubmissionState:
        """Derived, never stored."""
        if self.withdrawn:
            return WITHDRAWN[self.why]
        if not self.ended:
            return SubmissionState.RUNNING
        return SubmissionState.SUCCEEDED if self.done_roots == len(self.roots) else SubmissionState.FAILED


class SharedMemberships:
    """Adds and removes one submission in `StepRow.submissions`.

    Steps with equal membership share one tuple, which saves 110 bytes a step.
    """

    __slots__ = ("_sub", "_with", "_without")

    def __init__(self, sub: SubmissionRow) -> None:
        self._sub = sub
        self._with: dict[tuple[SubmissionRow, ...], tuple[SubmissionRow, ...]] = {}
        self._without: dict[tuple[SubmissionRow, ...], tuple[SubmissionRow, ...]] = {}

    def add(self, row: StepRow) -> None:
        """Count a member that was not done at arrival."""
        memberships = self._with.get(row.submissions)
        if memberships is None:
            memberships = self._with[row.submissions] = (*row.submissions, self._sub)
        row.submissions = memberships
        add_member(self._sub, row)

    def remove(self, row: StepRow) -> None:
        """Remove a step, which need not be in the submission."""
        memberships = self._without.get(row.submissions)
        if memberships is None:
            others = tuple([sub for sub in row.submissions if sub is not self._sub])
            memberships = self._without[row.submissions] = others
        row.submissions = memberships


def add_member(sub: SubmissionRow, row: StepRow) -> None:
    """Count a member that was not done at arrival."""
    sub.counts[row.state] += 1
    sub.open += row.state in OPEN
    index_member(sub, row, row.state)


def move_member(sub: SubmissionRow, row: StepRow, old: StepStatus, new: StepStatus) -> None:
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
    index_member(sub, row, new)


def index_member(sub: SubmissionRow, row: StepRow, state: StepStatus) -> None:
    """Put a member in the index of the state that it has come into."""
    if state in ACTIVE:
        sub.active[row.key] = row
    elif state is StepStatus.READY:
        sub.ready[row.requires] = sub.ready.get(row.requires, 0) + 1
    elif state is StepStatus.FAILED:
        sub.failed[row.key] = row


def notify_step_changed(row: StepRow) -> None:
    """Notify the watchers of the step's submissions that the step changed."""
    for sub in row.submissions:
        for watcher in sub.watchers:
            watcher.step_changed(row)


def notify_bytes_moved(row: StepRow, now: float) -> None:
    """Notify the watchers of the step's submissions that its transfer came on."""
    for sub in row.submissions:
        for watcher in sub.watchers:
            watcher.bytes_moved(row, now)


def notify_submission_changed(sub: SubmissionRow) -> None:
    """Notify the watchers of a submission that it changed as a whole."""
    for watcher in sub.watchers:
        watcher.submission_changed()
