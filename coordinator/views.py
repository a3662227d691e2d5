"""The read model: what people ask about, folded from facts and from what workers say of their leases.

Rules:
1. No I/O, no clock, no asyncio. Times come out of facts; the same facts give the same views, live or replayed.
2. A fact costs O(1) for each running submission that has the step, plus the step's own edges; never O(submission).
3. A submission is frozen when it ends: its counts are history, and later facts no longer pay for it.
4. A watcher holds at most `WATCH_PENDING` changed steps. More than that becomes one fresh snapshot, so a slow watcher
   costs neither memory nor truth.

Readiness is derived here once more (a step is ready when no need of its active recipe is open) because it is no fact:
the core can tell it from its state, and a read model must not reach into that.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, cast

from coordinator.codec import Record, SubmissionNote, evidence_size
from coordinator.derivations import StepInfo
from coordinator.errors import NotFoundError
from coordinator.history import take_history, tell_history
from coordinator.limits import StepLimits
from coordinator.rows import NOTHING, StepRow, SubmissionRow, WorkerRow, enter, note, place, touch, worker_view
from coordinator.schema import (
    Counts,
    CountsChanged,
    FailureView,
    RootView,
    Snapshot,
    StepStatus,
    StepView,
    SubmissionView,
    WaitingView,
    WorkerView,
)
from coordinator.watcher import Watcher
from scheduler import facts
from scheduler.facts import Fact
from scheduler.failures import is_fault
from scheduler.model import Recipe, Requirements, StepKey, StepState, SubmissionId
from workers.protocol import Batch, Hello, StageChange

#: Failed steps in one snapshot; the rest is behind `submissions/ID/steps?state=failed`.
SNAPSHOT_FAILED = 100
#: Submissions in one answer of `submissions`.
SUBMISSIONS_LISTED = 1000
#: Steps in one answer of `submissions/ID/steps`.
STEPS_LISTED = 10_000

#: States of a step that does not run although somebody may wait for it.
_EXPLAINED = (StepStatus.WAITING, StepStatus.READY, StepStatus.FAILED, StepStatus.DOOMED)
#: Facts that begin something new; whoever has nothing open by then has ended before it.
_BEGINNINGS = (
    facts.SubmissionAccepted,
    facts.SubmissionRetried,
    facts.StepAdded,
    facts.RecipeAdded,
    facts.StepHeld,
    facts.StepRevived,
)


class Explainer(Protocol):
    """What views show but cannot know: it is asked only while something is rendered."""

    def waiting(self, step: StepKey, name_of: Callable[[StepKey], str]) -> tuple[str, WaitingView | None]:
        """Return why the step does not run, in one sentence and as a value; nothing where that needs no reason."""

    def stuck(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:
        """Return sentences about those of the ready steps that nobody can take."""

    def log_tail(self, step: StepKey, attempt: int) -> str:
        """Return the last lines of an attempt's log, or nothing."""


_NO_DETAIL = StepInfo(key=StepKey(""), name="", system="", features=(), drv="", outputs=())
_STATUS = {state: StepStatus.RUNNING if state is StepState.LEASED else StepStatus(state.value) for state in StepState}
_NO_NOTE = SubmissionNote(label="", roots=(), derivations=0)


class Views:
    """All rows. `fold` takes facts; the `worker_…` methods and `stage` take what is not worth a fact."""

    def __init__(self, explainer: Explainer) -> None:
        self._explain = explainer
        self._steps: dict[StepKey, StepRow] = {}
        self._submissions: dict[SubmissionId, SubmissionRow] = {}
        self._workers: dict[str, WorkerRow] = {}
        self._details: dict[StepKey, StepInfo] = {}
        self._by_drv: dict[str, StepKey] = {}
        self._notes: dict[SubmissionId, SubmissionNote] = {}
        #: What submissions say of their roots, where they say something.
        self._limits: dict[SubmissionId, dict[StepKey, StepLimits]] = {}
        #: Submissions that may have ended; looked at before the next beginning and at the end of a batch.
        self._unsettled: dict[SubmissionId, SubmissionRow] = {}
        #: Time of the newest durable fact.
        self._at = 0.0
        self._folders = cast(
            "Mapping[type, Callable[[Fact], None]]",
            {
                facts.SubmissionAccepted: self._accepted,
                facts.SubmissionRetried: self._retried,
                facts.SubmissionWithdrawn: self._withdrawn,
                facts.StepAdded: self._added,
                facts.RecipeAdded: self._recipe_added,
                facts.StepHeld: self._held,
                facts.StepRevived: self._revived,
                facts.StepLost: self._lost,
                facts.StepLeased: self._leased,
                facts.LeaseRevoked: self._revoked,
                facts.StepBuilt: self._built,
                facts.StepDone: self._done,
                facts.StepFellBack: self._fell_back,
                facts.StepFailed: self._failed,
                facts.StepDoomed: self._doomed,
                facts.StepAbandoned: self._abandoned,
                facts.StepRestored: self._step_restored,
                facts.FarmRestored: self._restored,
                facts.BuilderQuarantined: self._quarantined,
                facts.QuarantineEnded: self._trusted,
                facts.BuilderRemoved: self._trusted,
            },
        )

    # What is folded in.

    def know(
        self, details: Mapping[StepKey, StepInfo], notes: Mapping[SubmissionId, SubmissionNote] | None = None
    ) -> None:
        """Learn names; may come before or after the facts they belong to."""
        for key, detail in details.items():
            self._details.setdefault(key, detail)
            self._by_drv.setdefault(detail.drv, key)
        self._notes.update(notes or {})
        for name, known in (notes or {}).items():
            if told := {root.step: root.limits for root in known.roots if root.limits is not None}:
                self._limits[name] = told

    def fold(self, batch: Iterable[Fact], *, settle: bool = True) -> None:
        """Take facts in order. `settle` is off while a journal is replayed, whose frames may split a batch."""
        for fact in batch:
            if self._unsettled and isinstance(fact, _BEGINNINGS):
                self.settle()
            folder = self._folders.get(type(fact))
            if folder is not None:
                folder(fact)
        if settle:
            self.settle()

    def settle(self) -> None:
        """End the submissions that have nothing open."""
        for row in self._unsettled.values():
            if not row.ended and (row.open == 0 or row.done_roots == len(row.roots)):
                row.ended = True
                self._leave_members(row)
                row.active.clear()
                touch(row)
        self._unsettled.clear()

    def records(self) -> list[Record]:
        """Return what to keep beside `Farm.snapshot` so that `restore` gives these views back (see `history`)."""
        return list(tell_history(self._steps, self._submissions))

    def restore(self, records: Iterable[Record]) -> None:
        """Take in a snapshot's records, once its facts are folded and before any other."""
        take_history(records, self._steps, self._submissions)
        self._at = max((sub.touched_at for sub in self._submissions.values()), default=0.0)
        self._unsettled.update((sub.id, sub) for sub in self._submissions.values() if not sub.ended)

    def stage(self, change: StageChange) -> None:
        """A worker says where a lease is; stale words are ignored."""
        row = self._steps.get(StepKey(change.step))
        if row is None or row.attempt != change.attempt or row.state is not StepStatus.RUNNING:
            return
        if (row.stage, row.phase) != (change.stage.value, change.phase):
            row.stage, row.phase = change.stage.value, change.phase
            note(row)

    def worker_connected(self, hello: Hello, now: float) -> None:
        """A worker introduced itself."""
        old = self._workers.get(hello.worker)
        built = old.built if old is not None else 0
        self._workers[hello.worker] = WorkerRow(hello, leases=hello.leases, built=built, last_seen=now)
        self._touch_all()

    def incarnation(self, worker: str) -> str:
        """The incarnation that was greeted last, empty for a worker that never was."""
        row = self._workers.get(worker)
        return "" if row is None else row.hello.incarnation

    def worker_spoke(self, worker: str, batch: Batch, now: float) -> None:
        """A heartbeat."""
        row = self._workers.get(worker)
        if row is None or row.hello.incarnation != batch.incarnation:
            return
        row.state, row.reason = ("draining" if batch.draining else "online"), ""
        row.leases, row.last_seen = batch.leases, now

    def worker_unreachable(self, worker: str, incarnation: str, reason: str, *, gone: bool) -> None:
        """The transport lost a worker for now (`gone` false) or for ever."""
        row = self._workers.get(worker)
        if row is None or row.hello.incarnation != incarnation:
            return
        row.state, row.reason = ("gone" if gone else "silent"), reason
        if gone:
            row.leases = ()
        self._touch_all()

    # What is asked.

    def submission(self, submission: str) -> SubmissionRow:
        """Return a submission's row. Raises `NotFoundError`."""
        row = self._submissions.get(SubmissionId(submission))
        if row is None:
            raise NotFoundError(f"there is no submission {submission[:80]!r}; `drover status` lists them.")
        return row

    def submissions(self) -> list[SubmissionView]:
        """Return the newest submissions, at most `SUBMISSIONS_LISTED`, newest first."""
        newest = itertools.islice(reversed(self._submissions.values()), SUBMISSIONS_LISTED)
        return [self.submission_view(row) for row in newest]

    def step(self, text: str) -> StepRow:
        """Return the step whose key is `text`, or the only one whose key, name or .drv contains it.

        Raises `NotFoundError` that says whether there are none or several.
        """
        row = self._steps.get(StepKey(text))
        if row is not None:
            return row
        found = [key for key in self._steps if text in key]
        if not found:
            found = [key for key, detail in self._details.items() if text in detail.drv and key in self._steps]
        if len(found) == 1:
            return self._steps[found[0]]
        if found:
            some = ", ".join(found[:3])
            raise NotFoundError(f"{len(found)} steps match {text[:80]!r} ({some}, …); give more of the name.")
        raise NotFoundError(f"there is no step {text[:80]!r}; `drover status ID` lists those of a submission.")

    def had_attempt(self, step: str, attempt: int) -> bool:
        """Whether this lease was ever granted."""
        row = self._steps.get(StepKey(step))
        return row is not None and 0 < attempt <= row.attempt

    def note(self, submission: SubmissionId) -> SubmissionNote:
        """Return what people called a submission."""
        return self._notes.get(submission, _NO_NOTE)

    def failed_through(self, step: StepRow) -> list[SubmissionRow]:
        """Return the submissions that have this failed step among theirs and are not cancelled, newest first."""
        rows = reversed(self._submissions.values())
        return [row for row in rows if step.key in row.failed and not row.withdrawn and row.done_roots < len(row.roots)]

    def limits_told(self, step: StepKey) -> list[StepLimits | None]:
        """Return what each submission that wants the step says of it as its root; None where it says nothing."""
        row = self._steps.get(step)
        wanting = [submission for submission in row.submissions if not submission.withdrawn] if row else []
        return [self._limits.get(submission.id, {}).get(step) for submission in wanting]

    def drv(self, step: StepKey) -> str:
        """Return the full store path of the step's .drv, or nothing for an unknown step."""
        return self._details.get(step, _NO_DETAIL).drv

    def step_keys(self) -> list[StepKey]:
        """Return the keys of all steps, oldest first."""
        return list(self._steps)

    def attempt_of_drv(self, drv: str) -> tuple[StepKey, int] | None:
        """Return step and latest attempt of a .drv (full store path), None if it was never started."""
        row = self._steps.get(self._by_drv.get(drv, StepKey("")))
        return (row.key, row.attempt) if row is not None and row.attempt else None

    def steps(self, submission: SubmissionRow, states: frozenset[StepStatus]) -> list[StepView]:
        """Return members in `states` (empty: all), at most `STEPS_LISTED`."""
        found: list[StepView] = []
        for key in submission.members:
            row = self._steps[key]
            if not states or row.state in states:
                found.append(self.step_view(row))
                if len(found) == STEPS_LISTED:
                    break
        return found

    def workers(self) -> list[WorkerView]:
        """Return all workers, by name."""
        return [worker_view(name, row) for name, row in sorted(self._workers.items())]

    def step_counts(self) -> Counter[str]:
        """Count all steps by state."""
        return Counter(row.state.value for row in self._steps.values())

    def submission_counts(self) -> Counter[str]:
        """Count all submissions by state."""
        return Counter(row.state.value for row in self._submissions.values())

    def worker_counts(self) -> Counter[str]:
        """Count workers by state."""
        return Counter(row.told_state for row in self._workers.values())

    def submission_rows(self) -> list[SubmissionRow]:
        """Return the rows of all submissions, oldest first; for reading only."""
        return list(self._submissions.values())

    def live_members(self) -> set[StepKey]:
        """Return the steps of all submissions that have not ended."""
        return {key for row in self._submissions.values() if not row.ended and not row.withdrawn for key in row.members}

    @contextlib.contextmanager
    def watch(self, submission: SubmissionRow, wake: Callable[[], None]) -> Iterator[Watcher]:
        """Hand out a watcher for as long as the block runs."""
        watcher = Watcher(self, submission, wake)
        submission.watchers.append(watcher)
        try:
            yield watcher
        finally:
            submission.watchers.remove(watcher)

    def step_view(self, row: StepRow) -> StepView:
        """Render a step."""
        detail = self._details.get(row.key, _NO_DETAIL)
        worker = self._workers.get(row.builder)
        failed = row.state is StepStatus.FAILED
        sentence, waiting = "", None
        if row.state in _EXPLAINED:
            sentence, waiting = self._explain.waiting(row.key, self._name)
        return StepView(
            key=row.key,
            name=detail.name,
            system=detail.system,
            features=detail.features,
            drv=detail.drv,
            outputs=dict(detail.outputs),
            state=row.state,
            attempt=row.attempt,
            worker=row.builder,
            emulated=worker is not None and detail.system in worker.hello.emulated,
            stage=row.stage,
            phase=row.phase,
            started_at=row.started_at,
            ended_at=row.ended_at,
            uploaded_bytes=row.uploaded_bytes,
            failure=FailureView(kind=row.failure.kind, message=row.failure.message) if row.failure else None,
            cause=row.cause,
            waiting_for=f"{sentence}; last time: {row.trouble}" if sentence and row.trouble else sentence,
            waiting=waiting,
            log_tail=self._explain.log_tail(row.key, row.attempt) if failed else "",
        )

    def submission_view(self, row: SubmissionRow) -> SubmissionView:
        """Render a submission."""
        said = self.note(row.id)
        return SubmissionView(
            id=row.id,
            label=said.label,
            state=row.state,
            created_at=row.created_at,
            ended_at=row.touched_at if row.ended or row.withdrawn else 0.0,
            roots=tuple(
                RootView(
                    attr=root.attr,
                    drv=root.drv,
                    step=root.step,
                    state=self._row(root.step).state,
                    outputs=dict(root.outputs),
                )
                for root in said.roots
            ),
            counts=self._counts(row),
            derivations=said.derivations,
            uploaded_bytes=row.uploaded_bytes,
            stuck=self._stuck(row),
        )

    def snapshot(self, row: SubmissionRow) -> Snapshot:
        """Render a submission with the steps that run or failed."""
        rows = [*row.active.values(), *list(row.failed.values())[:SNAPSHOT_FAILED]]
        return Snapshot(submission=self.submission_view(row), steps=tuple(self.step_view(step) for step in rows))

    def counts_changed(self, row: SubmissionRow) -> CountsChanged:
        """Render the counts of a submission."""
        return CountsChanged(counts=self._counts(row), uploaded_bytes=row.uploaded_bytes, stuck=self._stuck(row))

    def _counts(self, row: SubmissionRow) -> Counts:
        by_state = {state.value: count for state, count in row.counts.items()}
        return Counts(total=len(row.members), held=row.held, joined=row.joined, **by_state)

    def _name(self, key: StepKey) -> str:
        return self._details.get(key, _NO_DETAIL).name

    def _stuck(self, row: SubmissionRow) -> tuple[str, ...]:
        return () if row.ended or row.withdrawn else self._explain.stuck(row.ready)

    # One method for each fact.

    def _accepted(self, fact: facts.SubmissionAccepted) -> None:
        sub = SubmissionRow(fact.submission, fact.at, frozenset(fact.roots), [])
        self._submissions[fact.submission] = sub
        self._fill(sub, fact)

    def _retried(self, fact: facts.SubmissionRetried) -> None:
        sub = self._submissions[fact.submission]
        if not sub.ended:
            self._leave_members(sub)
        self._fill(sub, fact)
        touch(sub)

    def _fill(self, sub: SubmissionRow, fact: facts.SubmissionAccepted | facts.SubmissionRetried) -> None:
        """Count the members of a submission that begins, or begins again."""
        self._at = max(self._at, fact.at)
        sub.begin(list(fact.members), fact.at)
        held = set(fact.held)
        for key in fact.members:
            row = self._row(key)
            if key in held or row.state is StepStatus.DONE:
                sub.held += 1
                continue
            row.submissions.append(sub)
            enter(sub, row)
        sub.done_roots = sum(1 for root in sub.roots if root in held or self._row(root).state is StepStatus.DONE)
        sub.joined = len(fact.joined)
        self._unsettled[sub.id] = sub

    def _leave_members(self, sub: SubmissionRow) -> None:
        for key in sub.members:
            with contextlib.suppress(ValueError):
                self._steps[key].submissions.remove(sub)

    def _withdrawn(self, fact: facts.SubmissionWithdrawn) -> None:
        self._at = max(self._at, fact.at)
        sub = self._submissions[fact.submission]
        if not sub.withdrawn and not sub.ended:
            sub.withdrawn = True
            sub.touched_at = fact.at
            touch(sub)

    def _added(self, fact: facts.StepAdded) -> None:
        row = self._row(fact.spec.key)
        row.recipes = fact.spec.recipes
        for recipe in row.recipes:
            self._link(row, recipe)
        self._wait(row, 0)

    def _recipe_added(self, fact: facts.RecipeAdded) -> None:
        row = self._row(fact.step)
        row.recipes = (*row.recipes, fact.recipe)
        self._link(row, fact.recipe)

    def _held(self, fact: facts.StepHeld) -> None:
        self._finish(self._row(fact.step))

    def _revived(self, fact: facts.StepRevived) -> None:
        row = self._row(fact.step)
        row.failure, row.cause, row.trouble, row.ended_at = None, "", "", 0.0
        self._wait(row, fact.recipe)

    def _lost(self, fact: facts.StepLost) -> None:
        row = self._row(fact.step)
        row.ended_at = 0.0
        self._wait(row, row.recipe)
        for above in self._users(row):
            above.pending += 1
            if above.state is StepStatus.READY:
                self._move(above, StepStatus.WAITING)

    def _leased(self, fact: facts.StepLeased) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.lease.step)
        row.attempt, row.recipe, row.builder = fact.lease.attempt, fact.recipe, fact.builder
        row.started_at, row.ended_at, row.stage, row.phase = fact.at, 0.0, "queued", ""
        self._move(row, StepStatus.RUNNING)

    def _revoked(self, fact: facts.LeaseRevoked) -> None:
        row = self._row(fact.lease.step)
        row.builder, row.stage, row.phase = "", "", ""
        if is_fault(fact.failure.kind):
            row.trouble = fact.failure.message
        self._wait(row, row.recipe)

    def _built(self, fact: facts.StepBuilt) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.lease.step)
        row.uploaded_bytes, row.stage, row.phase = evidence_size(fact.evidence), "", ""
        worker = self._workers.get(fact.builder)
        if worker is not None:
            worker.built += 1
        self._move(row, StepStatus.PUBLISHING)

    def _done(self, fact: facts.StepDone) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.lease.step)
        row.ended_at = fact.at
        for sub in row.submissions:
            sub.uploaded_bytes += row.uploaded_bytes
        self._finish(row)

    def _fell_back(self, fact: facts.StepFellBack) -> None:
        row = self._row(fact.step)
        row.builder, row.stage, row.phase = "", "", ""
        self._wait(row, fact.recipe)
        self._join_needs(row)

    def _failed(self, fact: facts.StepFailed) -> None:
        self._at = max(self._at, fact.at)
        row = self._row(fact.step)
        row.failure, row.ended_at, row.builder = fact.failure, fact.at, fact.builder
        row.stage, row.phase = "", ""
        self._move(row, StepStatus.FAILED)

    def _doomed(self, fact: facts.StepDoomed) -> None:
        row = self._row(fact.step)
        row.cause = fact.cause
        self._move(row, StepStatus.DOOMED)

    def _abandoned(self, fact: facts.StepAbandoned) -> None:
        row = self._row(fact.step)
        row.builder, row.stage, row.phase = "", "", ""
        self._move(row, StepStatus.ABANDONED)

    def _quarantined(self, fact: facts.BuilderQuarantined) -> None:
        worker = self._workers.get(fact.builder)
        if worker is not None:
            worker.quarantined_until, worker.quarantine = fact.until, fact.reason

    def _trusted(self, fact: facts.QuarantineEnded | facts.BuilderRemoved) -> None:
        worker = self._workers.get(fact.builder)
        if worker is not None:
            worker.quarantined_until, worker.quarantine = 0.0, ""

    def _step_restored(self, fact: facts.StepRestored) -> None:
        row = self._row(fact.step)
        row.state, row.recipes, row.attempt = _STATUS[fact.state], fact.recipes, fact.attempt
        for recipe in row.recipes:
            self._link(row, recipe)
        if fact.past is not None:
            row.recipe, row.builder = fact.past.active, fact.past.builder
            row.failure, row.cause = fact.past.failure, fact.past.cause or ""
        if row.recipes:
            row.requires = row.recipes[row.recipe].requirements

    def _restored(self, _fact: facts.FarmRestored) -> None:
        for row in self._steps.values():
            needs = row.recipes[row.recipe].needs if row.recipes else ()
            row.pending = sum(1 for need in dict.fromkeys(needs) if self._row(need).state is not StepStatus.DONE)

    # The parts they share.

    def _row(self, key: StepKey) -> StepRow:
        row = self._steps.get(key)
        if row is None:
            row = self._steps[key] = StepRow(key)
        return row

    def _link(self, row: StepRow, recipe: Recipe) -> None:
        for need in recipe.needs:
            below = self._row(need)
            if not below.dependents or below.dependents[-1] is not row:
                below.dependents.append(row)

    def _wait(self, row: StepRow, recipe: int) -> None:
        """The step starts over with a recipe: ready, or waiting for its open needs."""
        row.recipe = recipe
        needs = row.recipes[recipe].needs if recipe < len(row.recipes) else ()
        if row.state is StepStatus.READY:
            self._move(row, StepStatus.WAITING)
        row.requires = row.recipes[recipe].requirements if recipe < len(row.recipes) else NOTHING
        row.pending = sum(1 for need in dict.fromkeys(needs) if self._row(need).state is not StepStatus.DONE)
        self._move(row, StepStatus.WAITING if row.pending else StepStatus.READY)

    def _finish(self, row: StepRow) -> None:
        if row.state is StepStatus.DONE:
            return
        row.stage, row.phase = "", ""
        self._move(row, StepStatus.DONE)
        for above in self._users(row):
            above.pending -= 1
            if above.pending == 0 and above.state is StepStatus.WAITING:
                self._move(above, StepStatus.READY)

    def _users(self, row: StepRow) -> Iterator[StepRow]:
        """Yield the steps whose active recipe needs this one."""
        for above in row.dependents:
            # With one recipe every dependent needs this step; a wide step's needs must not be scanned for each need.
            if len(above.recipes) == 1 or row.key in above.recipes[above.recipe].needs:
                yield above

    def _join_needs(self, row: StepRow) -> None:
        """The submissions of a step now also stand on what its active recipe needs."""
        for sub in row.submissions:
            stack = list(row.recipes[row.recipe].needs)
            while stack:
                below = self._row(stack.pop())
                if below.state is StepStatus.DONE or sub in below.submissions:
                    continue
                below.submissions.append(sub)
                sub.members.append(below.key)
                enter(sub, below)
                if below.recipe < len(below.recipes):
                    stack.extend(below.recipes[below.recipe].needs)

    def _move(self, row: StepRow, state: StepStatus) -> None:
        """Change a step's state in every submission that has it."""
        old, row.state = row.state, state
        for sub in row.submissions:
            sub.counts[old] -= 1
            sub.counts[state] += 1
            place(sub, row, old, state)
            sub.touched_at = max(sub.touched_at, self._at)
            if sub.open == 0 or sub.done_roots == len(sub.roots):
                self._unsettled[sub.id] = sub
            for watcher in sub.watchers:
                watcher.note(row)

    def _touch_all(self) -> None:
        for sub in self._submissions.values():
            if sub.watchers:
                touch(sub)
