"""Fold of facts into the rows of the read model, and of what workers send of their leases.

Rules:
1. No I/O, no clock, no asyncio. Times come out of facts; the same facts give the same rows, live or replayed.
2. A fact about a step costs O(1) for each running submission that has it; never O(submission).
3. A submission is frozen when it ends: its counts are history, and later facts no longer pay for it.
4. What concerns many steps is folded with pauses (`scheduler.pauses`), at which the rows may be read: counts of a
   submission that begins again are then of those members that are counted already.

The rows hold no edges: the core derives which steps are ready, and who stands on what, and sends it as facts
(`StepReady`, `StepWaiting`, `MembersJoined`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import cast

from coordinator.api.models import StepStatus
from coordinator.journal.codec import Record, SubmissionNote, evidence_shown
from coordinator.readmodel.lease_reports import LeaseReports
from coordinator.readmodel.rows import (
    ACTIVE,
    SharedMemberships,
    StepRow,
    SubmissionRow,
    move_member,
    notify_submission_changed,
)
from coordinator.readmodel.snapshot import restore_step, take_history, tell_history
from coordinator.readmodel.step_details import Details
from coordinator.readmodel.timeline import Timelines
from coordinator.readmodel.workers import Workforce
from coordinator.stores.derivations import StepInfo
from scheduler import facts
from scheduler.facts import Fact
from scheduler.failures import is_fault
from scheduler.model import FailureKind, Requirements, StepKey, SubmissionId
from scheduler.pauses import FACTS_PIECE, PAUSE, PIECE, Pause, whole
from workers.wire.messages import Stage

#: Details learnt between two pauses, some 20 µs each.
DETAILS_PIECE = 128
#: Facts that begin something new; a submission with nothing open by then has ended before it.
_BEGINNINGS = (
    facts.SubmissionAccepted,
    facts.SubmissionGrew,
    facts.SubmissionRetried,
    facts.StepAdded,
    facts.RecipeAdded,
    facts.StepCached,
    facts.StepRevived,
)


class FoldedRows(LeaseReports):
    """All rows. `fold` takes facts; `stage` and `readmodel.workers` take what is not worth a fact."""

    def __init__(self, timelines: Timelines | None = None) -> None:
        super().__init__()
        self.timelines = timelines or Timelines()
        #: How many steps are in each state: counting them all would hold the loop at each scrape of the metrics.
        self._by_state = dict.fromkeys(StepStatus, 0)
        #: Ready steps by what they require; no zeros.
        self._ready_by_class: dict[Requirements, int] = {}
        self._submissions: dict[SubmissionId, SubmissionRow] = {}
        self.workforce = Workforce(self._touch_all)
        self._details = Details()
        self._notes: dict[SubmissionId, SubmissionNote] = {}
        #: Submissions that may have ended; looked at before the next beginning and at the end of a batch.
        self._unsettled: dict[SubmissionId, SubmissionRow] = {}
        #: Time of the newest durable fact.
        self._at = 0.0
        #: Counts what moved: who keeps what follows from the rows knows whether it still does.
        self.moves = 0
        self._folders = cast(
            "Mapping[type, Callable[[Fact], Iterator[Pause] | None]]",
            {
                facts.SubmissionAccepted: self._accepted,
                facts.SubmissionGrew: self._grew,
                facts.SubmissionSealed: self._sealed,
                facts.SubmissionRetried: self._retried,
                facts.SubmissionWithdrawn: self._withdrawn,
                facts.SubmissionBumped: self._bumped,
                facts.SubmissionForgotten: self._submission_forgotten,
                facts.StepsForgotten: self._steps_forgotten,
                facts.StepAdded: self._added,
                facts.StepCached: self._held,
                facts.StepRevived: self._revived,
                facts.StepLost: self._lost,
                facts.StepLeased: self._leased,
                facts.LeaseRevoked: self._revoked,
                facts.StepBuilt: self._built,
                facts.StepDone: self._done,
                facts.StepFellBack: self._fell_back,
                facts.StepReady: self._ready,
                facts.StepWaiting: self._waits,
                facts.MembersJoined: self._members_joined,
                facts.StepFailed: self._failed,
                facts.StepDoomed: self._doomed,
                facts.StepAbandoned: self._abandoned,
                facts.StepRestored: self._step_restored,
                facts.BuilderQuarantined: self._quarantined,
                facts.BuildersRated: self._rated,
                facts.QuarantineEnded: self._trusted,
                facts.BuilderRemoved: self._trusted,
                facts.WorksRevised: self._only_moved,
            },
        )

    # What is folded in.

    def add_details(
        self, details: Mapping[StepKey, StepInfo], notes: Mapping[SubmissionId, SubmissionNote] | None = None
    ) -> None:
        """Learn names; may come before or after the facts they belong to."""
        whole(self.adding_details(details.values(), notes))

    def adding_details(
        self,
        details: Iterable[StepInfo],
        notes: Mapping[SubmissionId, SubmissionNote] | None = None,
        *,
        only_known: bool = False,
    ) -> Generator[Pause, None, None]:
        """Do the work of `add_details`, with pauses; `only_known` skips details of steps that no fact named."""
        for count, detail in enumerate(details, 1):
            row = self._steps.get(detail.key)
            if row is not None:
                # One string serves them all.
                self._details.learn(row.key, detail)
            elif not only_known:
                self._details.learn(detail.key, detail)
            if not count % DETAILS_PIECE:
                yield PAUSE
        self._notes.update(notes or {})

    def unknowing(self, details: Iterable[StepInfo], submission: SubmissionId) -> Generator[Pause, None, None]:
        """Forget the names of a submission that the core refused, with pauses: those of steps that are not known."""
        if submission not in self._submissions:
            self._notes.pop(submission, None)
        for count, detail in enumerate(details, 1):
            if detail.key not in self._steps:
                self._details.forget(detail.key)
            if not count % DETAILS_PIECE:
                yield PAUSE

    def fold(self, batch: Iterable[Fact], *, settle: bool = True) -> None:
        """Take facts in order. `settle` is off while a journal is replayed, whose frames may split a batch."""
        whole(self.folding(batch, settle=settle))

    def folding(self, batch: Iterable[Fact], *, settle: bool = True) -> Generator[Pause, None, None]:
        """Do the work of `fold`, with pauses."""
        until_pause = FACTS_PIECE
        for fact in batch:
            if self._unsettled and isinstance(fact, _BEGINNINGS):
                yield from self._settling()
            folder = self._folders.get(type(fact))
            if folder is not None:
                self.moves += 1
                rest = folder(fact)
                if rest is not None:
                    yield from rest
            until_pause -= 1
            if not until_pause:
                until_pause = FACTS_PIECE
                yield PAUSE
        if settle:
            yield from self._settling()

    def settle(self) -> None:
        """End the submissions that have nothing open."""
        whole(self._settling())

    def _settling(self) -> Generator[Pause, None, None]:
        for row in self._unsettled.values():
            if not row.ended and row.has_nothing_left:
                yield from self._leave_members(row)
                row.ended = True
                row.active.clear()
                notify_submission_changed(row)
        self._unsettled.clear()

    def records(self) -> list[Record]:
        """Return what to keep beside `Farm.snapshot` so that `restore` gives these views back (see `snapshot`)."""
        return list(tell_history(self._steps, self._submissions))

    def restore(self, records: Iterable[Record]) -> None:
        """Take in a snapshot's records, once its facts are folded and before any other."""
        take_history(records, self._steps, self._submissions)
        self._at = max((sub.touched_at for sub in self._submissions.values()), default=0.0)
        self._unsettled.update((sub.id, sub) for sub in self._submissions.values() if not sub.ended)

    # One method for each fact.

    def _accepted(self, fact: facts.SubmissionAccepted) -> Iterator[Pause]:
        sub = SubmissionRow(fact.submission, fact.at, set(fact.roots), [], is_open=fact.open)
        yield from self._fill(sub, fact)
        self._submissions[fact.submission] = sub

    def _retried(self, fact: facts.SubmissionRetried) -> Iterator[Pause]:
        sub = self._submissions[fact.submission]
        if not sub.ended:
            yield from self._leave_members(sub)
        sub.roots.update(fact.roots)
        yield from self._fill(sub, fact)
        notify_submission_changed(sub)

    def _grew(self, fact: facts.SubmissionGrew) -> Iterator[Pause]:
        sub = self._submissions[fact.submission]
        self._at = max(self._at, fact.at)
        sub.touched_at = max(sub.touched_at, fact.at)
        held, before, memberships = set(fact.held), set(fact.before), SharedMemberships(sub)
        for count, key in enumerate(fact.members, 1):
            if not count % PIECE:
                yield PAUSE
            row = self._row(key)
            if key not in before:
                sub.members.append(key)
            elif sub in row.submissions:
                continue
            else:
                sub.held -= 1
            if key in held or row.state is StepStatus.DONE:
                sub.held += 1
            else:
                memberships.add(row)
                if row.state is StepStatus.FAILED:
                    # It failed before: no change of it will come.
                    for watcher in sub.watchers:
                        watcher.step_changed(row)
        sub.joined += len(fact.joined)
        for count, root in enumerate(fact.roots, 1):
            sub.roots.add(root)
            sub.done_roots += root in held or self._row(root).state is StepStatus.DONE
            if not count % PIECE:
                yield PAUSE
        notify_submission_changed(sub)

    def _sealed(self, fact: facts.SubmissionSealed) -> None:
        sub = self._submissions[fact.submission]
        self._at = max(self._at, fact.at)
        sub.touched_at = max(sub.touched_at, fact.at)
        sub.is_open, sub.incomplete = False, fact.incomplete
        self._unsettled[sub.id] = sub
        notify_submission_changed(sub)

    def _fill(self, sub: SubmissionRow, fact: facts.SubmissionAccepted | facts.SubmissionRetried) -> Iterator[Pause]:
        """Count the members of a submission that begins, or begins again."""
        self._at = max(self._at, fact.at)
        sub.withdrawn, sub.terms = False, fact.terms
        sub.begin(list(fact.members), fact.at)
        held, memberships = set(fact.held), SharedMemberships(sub)
        for count, key in enumerate(fact.members, 1):
            if not count % PIECE:
                yield PAUSE
            row = self._row(key)
            if key in held or row.state is StepStatus.DONE:
                sub.held += 1
                continue
            memberships.add(row)
        done_roots = 0
        for count, root in enumerate(sub.roots, 1):
            done_roots += root in held or self._row(root).state is StepStatus.DONE
            if not count % PIECE:
                yield PAUSE
        sub.done_roots = done_roots
        sub.joined = len(fact.joined)
        self._unsettled[sub.id] = sub

    def _leave_members(self, sub: SubmissionRow) -> Iterator[Pause]:
        memberships = SharedMemberships(sub)
        for count, key in enumerate(sub.members, 1):
            memberships.remove(self._steps[key])
            if not count % PIECE:
                yield PAUSE

    def _withdrawn(self, fact: facts.SubmissionWithdrawn) -> None:
        self._at = max(self._at, fact.at)
        sub = self._submissions[fact.submission]
        # In a replay what has ended is settled later: the end came first all the same.
        if not sub.withdrawn and not sub.ended and not sub.has_nothing_left:
            sub.withdrawn, sub.is_open = True, False
            sub.why, sub.by = fact.why, fact.by or ""
            sub.touched_at = fact.at
            notify_submission_changed(sub)

    def _bumped(self, fact: facts.SubmissionBumped) -> None:
        sub = self._submissions[fact.submission]
        sub.terms = replace(sub.terms, priority=fact.priority)
        notify_submission_changed(sub)

    def _submission_forgotten(self, fact: facts.SubmissionForgotten) -> Iterator[Pause]:
        sub = self._submissions.pop(fact.submission)
        self._notes.pop(fact.submission, None)
        self._unsettled.pop(fact.submission, None)
        if not sub.ended:
            # Others keep some of its steps open.
            yield from self._leave_members(sub)

    def _steps_forgotten(self, fact: facts.StepsForgotten) -> None:
        for key in fact.steps:
            row = self._steps.pop(key)
            self._count(row, -1)
            self._details.forget(key)

    def _added(self, fact: facts.StepAdded) -> None:
        self._row(fact.spec.key)

    def _held(self, fact: facts.StepCached) -> None:
        self._finish(self._row(fact.step))

    def _revived(self, fact: facts.StepRevived) -> None:
        row = self._row(fact.step)
        life = row.mutable_life()
        life.failure, life.cause, life.trouble, life.ended_at = None, "", "", 0.0
        life.lost_input = False
        self._move(row, StepStatus.WAITING)

    def _lost(self, fact: facts.StepLost) -> None:
        row = self._row(fact.step)
        row.mutable_life().ended_at = 0.0
        self._move(row, StepStatus.WAITING)

    def _ready(self, fact: facts.StepReady) -> None:
        row = self._row(fact.step)
        row.requires, row.ready_at = fact.requirements, fact.at
        self._move(row, StepStatus.READY)

    def _waits(self, fact: facts.StepWaiting) -> None:
        self._move(self._row(fact.step), StepStatus.WAITING)

    def _leased(self, fact: facts.StepLeased) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.lease.step)
        life = row.mutable_life()
        life.attempt, life.builder = fact.lease.attempt, fact.builder
        life.started_at, life.ended_at, life.stage, life.phase = fact.at, 0.0, "queued", ""
        life.transfer = None
        submitted_at = min((sub.created_at for sub in row.submissions), default=0.0)
        # One that follows its needs did not wait for anything else.
        ready_at = row.ready_at if row.state is StepStatus.READY else fact.at
        self.timelines.leased(row.key, fact.lease.attempt, fact.recipe, fact.builder, fact.at, submitted_at, ready_at)
        self._move(row, StepStatus.RUNNING)

    def _revoked(self, fact: facts.LeaseRevoked) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.lease.step)
        self.timelines.revoked(row.key, fact.at, fact.failure, _wanted_by(row), moved=fact.moved)
        life = row.mutable_life()
        life.clear_builder()
        if is_fault(fact.failure.kind) or fact.failure.kind is FailureKind.INPUT_LOST:
            life.trouble = fact.failure.message
            life.lost_input = fact.failure.kind is FailureKind.INPUT_LOST
        self._move(row, StepStatus.WAITING)

    def _built(self, fact: facts.StepBuilt) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.lease.step)
        life = row.mutable_life()
        life.uploaded_bytes, life.isolation = evidence_shown(fact.evidence)
        self.timelines.built(row.key, fact.lease.attempt, fact.at, life.isolation)
        life.stage, life.phase, life.transfer = "", "", None
        self.workforce.has_built(fact.builder)
        self._move(row, StepStatus.PUBLISHING)

    def _done(self, fact: facts.StepDone) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.lease.step)
        row.mutable_life().ended_at = fact.at
        self.timelines.done(row.key, fact.at, _wanted_by(row))
        for sub in row.submissions:
            sub.uploaded_bytes += row.life.uploaded_bytes
        self._finish(row)

    def _fell_back(self, fact: facts.StepFellBack) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.step)
        self.timelines.failed(row.key, fact.at, fact.failure, _wanted_by(row))
        row.mutable_life().clear_builder()
        self._move(row, StepStatus.WAITING)

    def _members_joined(self, fact: facts.MembersJoined) -> Iterator[Pause]:
        for sub in self._row(fact.step).submissions:
            memberships = SharedMemberships(sub)
            for count, key in enumerate(fact.members, 1):
                row = self._row(key)
                if row.state is not StepStatus.DONE and sub not in row.submissions:
                    memberships.add(row)
                    sub.members.append(key)
                if not count % PIECE:
                    yield PAUSE

    def _failed(self, fact: facts.StepFailed) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.step)
        life = row.mutable_life()
        life.failed_in = life.phase if life.stage == Stage.BUILDING else ""
        life.clear_builder()
        life.failure, life.ended_at, life.builder = fact.failure, fact.at, fact.builder
        self.timelines.failed(row.key, fact.at, fact.failure, _wanted_by(row))
        self._move(row, StepStatus.FAILED)

    def _doomed(self, fact: facts.StepDoomed) -> None:
        row = self._row(fact.step)
        row.mutable_life().cause = fact.cause
        self._move(row, StepStatus.DOOMED)

    def _abandoned(self, fact: facts.StepAbandoned) -> None:
        row = self._row(fact.step)
        row.mutable_life().clear_builder()
        self._move(row, StepStatus.ABANDONED)

    def _rated(self, fact: facts.BuildersRated) -> None:
        self.workforce.rated(fact.speeds, fact.fetch_rates)

    def _quarantined(self, fact: facts.BuilderQuarantined) -> None:
        self.workforce.quarantine(fact.builder, fact.until, fact.reason)

    def _trusted(self, fact: facts.QuarantineEnded | facts.BuilderRemoved) -> None:
        self.workforce.quarantine(fact.builder, 0.0, "")

    def _step_restored(self, fact: facts.StepRestored) -> None:
        row = self._row(fact.step)
        self._count(row, -1)
        restore_step(row, fact)
        self._count(row, 1)
        if row.state in ACTIVE and fact.past is not None:
            self.timelines.restored(row.key, fact.attempt, fact.past.active, fact.past.builder)

    # The parts they share.

    def _row(self, key: StepKey) -> StepRow:
        row = self._steps.get(key)
        if row is None:
            row = self._steps[key] = StepRow(key)
            self._count(row, 1)
        return row

    def _count(self, row: StepRow, by: int) -> None:
        """Count a step in its state, or no longer (`by` -1)."""
        self._by_state[row.state] += by
        if row.state is StepStatus.READY:
            left = self._ready_by_class.get(row.requires, 0) + by
            if left:
                self._ready_by_class[row.requires] = left
            else:
                del self._ready_by_class[row.requires]

    def _finish(self, row: StepRow) -> None:
        if row.state is StepStatus.DONE:
            return
        if row.life.stage:
            life = row.mutable_life()
            life.stage, life.phase = "", ""
        self._move(row, StepStatus.DONE)

    def _move(self, row: StepRow, state: StepStatus) -> None:
        """Change a step's state in every submission that has it."""
        old = row.state
        self._count(row, -1)
        row.state = state
        self._count(row, 1)
        for sub in row.submissions:
            sub.counts[old] -= 1
            sub.counts[state] += 1
            move_member(sub, row, old, state)
            sub.touched_at = max(sub.touched_at, self._at)
            if sub.has_nothing_left:
                self._unsettled[sub.id] = sub
            for watcher in sub.watchers:
                watcher.step_changed(row)

    def _only_moved(self, _: facts.WorksRevised) -> None:
        """Show nothing of it; what follows from works is worked out anew."""

    def _touch_all(self) -> None:
        self.moves += 1
        for sub in self._submissions.values():
            if sub.watchers:
                notify_submission_changed(sub)


def _wanted_by(row: StepRow) -> Iterator[str]:
    return (sub.id for sub in row.submissions)
