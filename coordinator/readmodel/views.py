"""Read model: what people ask about, rendered from the rows that facts are folded into (`readmodel.folding`).

A watcher holds at most `WATCH_PENDING` changed steps. More than that becomes one fresh snapshot, so a slow watcher
costs neither memory nor truth.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Protocol

from coordinator.api.models import (
    Counts,
    CountsChanged,
    EtaView,
    FailureView,
    RootFailureView,
    RootView,
    Snapshot,
    StepStatus,
    StepView,
    SubmissionView,
    UnevaluatedView,
    WaitingView,
)
from coordinator.errors import NotFoundError
from coordinator.journal.codec import RootNote, SubmissionNote
from coordinator.readmodel.folding import FoldedRows
from coordinator.readmodel.forest import waits
from coordinator.readmodel.recipe_records import RecipeRecords
from coordinator.readmodel.rows import StepRow, SubmissionRow
from coordinator.readmodel.timeline import Timelines
from coordinator.readmodel.watcher import SNAPSHOT_FAILED, Watcher
from coordinator.stores.derivations import StepInfo
from infra.nix.store_path import package_of
from scheduler.model import Requirements, StepKey, SubmissionId
from scheduler.pauses import PAUSE, Pause

#: Roots in the view of a submission, and in a list of submissions; all are behind `submissions/ID/roots`.
ROOTS_SHOWN = 500
ROOTS_LISTED = 3
#: Steps that a refusal of an ambiguous name has.
EXAMPLES = 3
#: Roots among which a name is looked for, those of the newest submissions first: some 5 ms of the event loop.
ROOTS_LOOKED_AT = 50_000
#: Members that one page of `submissions/ID/steps` looks at: some 10 ms of the event loop.
STEPS_LOOKED_AT = 50_000
#: Submissions that one question looks at for those that its filters let through; some 10 ms.
SUBMISSIONS_LOOKED_AT = 5_000

#: States of a step that does not run although a person may wait for it.
_EXPLAINED = (StepStatus.WAITING, StepStatus.READY, StepStatus.FAILED, StepStatus.DOOMED)
#: Characters of a failure's sentence that every root which it dooms repeats; the step's own view has all.
ROOT_FAILURE_CHARS = 500


class Explainer(Protocol):
    """Source of facts that views show and do not hold: called only while a view is rendered."""

    def waiting(self, step: StepKey, name_of: Callable[[StepKey], str]) -> tuple[str, WaitingView | None]:
        """Return why the step does not run, in one sentence and as a value; nothing where that needs no reason."""

    def unschedulable(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:
        """Return sentences about those of the ready steps that no worker can take."""

    def queued(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:
        """Return sentences about those of the ready steps that a worker could take, and what they wait for."""

    def log_tail(self, step: StepKey, attempt: int) -> str:
        """Return the last lines of an attempt's log, or nothing."""

    def unmet(self, step: StepKey) -> int:
        """Return how many needs of a step are not done."""

    def above(self, step: StepKey) -> Sequence[StepKey]:
        """Return some of the wanted steps that need this one, those nearest to a root first."""


#: Names of outputs, as Nix takes them behind a path.
_OUTPUTS = re.compile(r"(?<=\.drv)[!^][\w,*+-]+$")
_NO_DETAIL = StepInfo(key=StepKey(""), name="", system="", features=(), drv="", outputs=())
_NO_NOTE = SubmissionNote(label="", roots=(), derivations=0)


def without_outputs(text: str) -> str:
    """Return a path without the names of outputs behind it (`….drv^out`, `…!dev`)."""
    return _OUTPUTS.sub("", text)


class Views(FoldedRows):
    """The rows, as clients see them."""

    def __init__(
        self,
        explainer: Explainer,
        timelines: Timelines | None = None,
        usual: Callable[[str, str], float | None] = lambda *_: None,
        recipes: RecipeRecords | None = None,
    ) -> None:
        """`usual` gives the seconds that a build of a name on a system usually takes, None while that is not known."""
        super().__init__(timelines)
        #: Handlers that show steps fetch their records first.
        self.recipes = recipes or RecipeRecords()
        self._explain = explainer
        self._usual = usual
        #: Foresees the end of a submission; None where that is not known, or not yet.
        self.eta_of: Callable[[SubmissionRow], EtaView | None] = lambda _: None

    def submission(self, submission: str) -> SubmissionRow:
        """Return a submission's row. Raises `NotFoundError`."""
        row = self._submissions.get(SubmissionId(submission))
        if row is None:
            raise NotFoundError(f"there is no submission {submission[:80]!r}; `drover status` lists them.")
        return row

    def find(self, submission: str) -> SubmissionRow | None:
        """Return a submission's row, None for one that is not known."""
        return self._submissions.get(SubmissionId(submission))

    def submissions_after(self, seen: str, limit: int) -> list[SubmissionRow]:
        """Return at most `limit` submissions, newest first: those older than `seen`, "" for the newest.

        Raises `NotFoundError` where `seen` has been forgotten, as everything older has then.
        """
        newest = iter(reversed(self._submissions.values()))
        if seen:
            last = self.submission(seen)
            newest = itertools.dropwhile(lambda row: row is not last, newest)
            next(newest, None)
        return list(itertools.islice(newest, limit))

    def submissions_like(
        self, passes: Callable[[SubmissionRow, SubmissionNote], bool], seen: str, limit: int
    ) -> tuple[list[SubmissionRow], str]:
        """Return at most `limit` submissions that pass, newest first, and the last one looked at ("" at their end).

        `seen` is as in `submissions_after`; at most `SUBMISSIONS_LOOKED_AT` are looked at, so that there may be none.
        """
        rows = self.submissions_after(seen, SUBMISSIONS_LOOKED_AT + 1)
        found: list[SubmissionRow] = []
        for count, row in enumerate(rows[:SUBMISSIONS_LOOKED_AT], 1):
            if passes(row, self.note(row.id)):
                found.append(row)
            if len(found) == limit:
                return found, row.id if count < len(rows) else ""
        return found, rows[SUBMISSIONS_LOOKED_AT - 1].id if len(rows) > SUBMISSIONS_LOOKED_AT else ""

    def step_rows(self) -> list[StepRow]:
        """Return the rows of all steps, oldest first; for reading only."""
        return list(self._steps.values())

    def row_of(self, key: StepKey) -> StepRow | None:
        """Return the row of a step by its whole key, None for one that is not known."""
        return self._steps.get(key)

    def rows(self) -> list[StepRow]:
        """Return the rows of all steps, the order in which they became known; for reading only."""
        return list(self._steps.values())

    def name_of(self, row: StepRow) -> str:
        """Return a step's name, or its key where no details are known."""
        return self.step_name(row.key) or row.key

    def unmet(self, row: StepRow) -> int:
        """Return how many needs of a step are not done."""
        return self._explain.unmet(row.key)

    def above(self, row: StepRow, submission: SubmissionRow) -> StepRow | None:
        """Return a step of the submission that waits for this one."""
        rows = map(self._steps.get, self._explain.above(row.key))
        return next((above for above in rows if above is not None and waits(above, submission)), None)

    def ready(self) -> Mapping[Requirements, int]:
        """Return how many steps are ready, by what they require."""
        return self._ready_by_class

    def submissions_of(self, key: StepKey) -> tuple[SubmissionRow, ...]:
        """Return the submissions that wait for a step."""
        row = self._steps.get(key)
        return () if row is None else tuple(sub for sub in row.submissions if not sub.ended and not sub.withdrawn)

    def step(self, text: str) -> StepRow:
        """Return the step that a person means.

        Its key; an attribute that a submission named, its whole name, or that without the version where it has only
        one, of several the newest; or any part that only this step's key, name, .drv or output path has. Names of
        outputs behind a path (`….drv^out`, `…!dev`) are passed over. Raises `NotFoundError` that says whether there are
        none or several.
        """
        text = without_outputs(text)
        row = self._steps.get(StepKey(text.rpartition("/")[2])) or self._named(text)
        if row is not None:
            return row
        found = [key for key in self._steps if text in key]
        if not found:
            found = [key for key in self._details.find(text) if key in self._steps]
        if len(found) == 1:
            return self._steps[found[0]]
        same = [key for key in found if self.step_name(key) == text]
        same = same or [key for key in found if package_of(self.step_name(key) or "") == text]
        if len({(self.step_name(key), self._system(key)) for key in same}) == 1:
            return self._steps[same[-1]]
        if found:
            examples = ", ".join([*found[:EXAMPLES], *(["…"] if len(found) > EXAMPLES else [])])
            raise NotFoundError(f"{len(found)} steps match {text[:80]!r} ({examples}); give more of the name.")
        raise NotFoundError(f"there is no step {text[:80]!r}; `drover status ID` lists those of a submission.")

    def _named(self, attr: str) -> StepRow | None:
        """Return the step of the root that the newest submission with such a one calls so."""
        roots = (root for row in reversed(self._submissions.values()) for root in self.note(row.id).roots)
        for root in itertools.islice(roots, ROOTS_LOOKED_AT):
            if root.attr == attr:
                return self._steps.get(root.step)
        return None

    def note(self, submission: SubmissionId) -> SubmissionNote:
        """Return what people called a submission."""
        return self._notes.get(submission, _NO_NOTE)

    def failed_through(self, step: StepRow) -> list[SubmissionRow]:
        """Return the submissions that have this failed step among theirs and are not cancelled, newest first."""
        rows = reversed(self._submissions.values())
        return [row for row in rows if step.key in row.failed and not row.withdrawn and row.done_roots < len(row.roots)]

    def named(self, key: StepKey) -> tuple[str, str] | None:
        """Return name and system of a step, None where they are not known."""
        detail = self._details.get(key)
        return None if detail is None else (detail.name, detail.system)

    def nameless(self) -> list[StepKey]:
        """Return the keys of the steps of which no details are known, oldest first."""
        return [key for key in self._steps if key not in self._details]

    def attempts(self, step: StepKey) -> int:
        """Return how many leases of a step were granted, 0 for one that is not known."""
        row = self._steps.get(step)
        return row.life.attempt if row is not None else 0

    def steps_after(
        self, submission: SubmissionRow, states: frozenset[StepStatus], seen: int, limit: int
    ) -> tuple[list[StepRow], int]:
        """Return at most `limit` members in `states` (empty: all) behind the first `seen`, and how many are seen then.

        At most `STEPS_LOOKED_AT` members are looked at, so that there may be none although more follow.
        """
        found: list[StepRow] = []
        end = min(len(submission.members), seen + STEPS_LOOKED_AT)
        for position in range(seen, end):
            row = self._steps[submission.members[position]]
            if not states or row.state in states:
                found.append(row)
                if len(found) == limit:
                    return found, position + 1
        return found, max(seen, end)

    def roots_after(
        self, roots: Sequence[RootNote], states: frozenset[StepStatus], seen: int, limit: int
    ) -> tuple[list[RootNote], int]:
        """Return at most `limit` roots whose steps are in `states` (empty: all), as `steps_after` does."""
        found: list[RootNote] = []
        end = min(len(roots), seen + STEPS_LOOKED_AT)
        for position in range(seen, end):
            if not states or self._row(roots[position].step).state in states:
                found.append(roots[position])
                if len(found) == limit:
                    return found, position + 1
        return found, max(seen, end)

    def step_total(self) -> int:
        """Return how many steps are known."""
        return len(self._steps)

    def is_building(self) -> bool:
        """Return whether any step is leased and not built yet."""
        return self._by_state[StepStatus.RUNNING] > 0

    def step_counts(self) -> Counter[str]:
        """Count all steps by state."""
        return Counter({state.value: count for state, count in self._by_state.items() if count})

    def submission_counts(self) -> Counter[str]:
        """Count all submissions by state."""
        return Counter(row.state.value for row in self._submissions.values())

    def submission_total(self) -> int:
        """Return how many submissions are known."""
        return len(self._submissions)

    def submission_rows(self) -> list[SubmissionRow]:
        """Return the rows of all submissions, oldest first; for reading only."""
        return list(self._submissions.values())

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
        detail = self._details.get(row.key) or _NO_DETAIL
        life = row.life
        failed, running = row.state is StepStatus.FAILED, row.state is StepStatus.RUNNING
        sentence, waiting = "", None
        if row.state in _EXPLAINED or row.state is StepStatus.PUBLISHING or (running and life.stage == "queued"):
            sentence, waiting = self._explain.waiting(row.key, self.step_name)
        return StepView(
            key=row.key,
            name=detail.name,
            system=detail.system,
            features=detail.features,
            drv=detail.drv,
            outputs=dict(detail.outputs),
            state=row.state,
            attempt=life.attempt,
            worker=life.builder,
            emulated=self.workforce.emulates(life.builder, detail.system),
            isolation=self.workforce.isolation(life.builder).level if running else life.isolation,
            stage=life.stage,
            phase=life.phase,
            transfer=life.transfer,
            started_at=life.started_at,
            ended_at=life.ended_at,
            uploaded_bytes=life.uploaded_bytes,
            usual_s=self._usual(detail.name, detail.system) if running and detail.name else None,
            failed_in=life.failed_in if failed else "",
            failure=FailureView(kind=life.failure.kind, message=life.failure.message) if life.failure else None,
            cause=life.cause,
            waiting_for=f"{sentence}; last time: {life.trouble}" if sentence and life.trouble else sentence,
            waiting=waiting,
            lost_input=waiting is not None and life.lost_input,
            log_tail=self._explain.log_tail(row.key, life.attempt) if failed else "",
            record=self.recipes.of(row),
        )

    def submission_view(self, row: SubmissionRow, roots: int = ROOTS_SHOWN) -> SubmissionView:
        """Render a submission with the first of its roots."""
        note = self.note(row.id)
        return SubmissionView(
            id=row.id,
            label=note.label,
            state=row.state,
            created_at=row.created_at,
            ended_at=row.touched_at if row.ended or row.withdrawn else 0.0,
            roots=tuple(self.root_view(root) for root in note.roots[:roots]),
            root_count=len(note.roots),
            counts=self._counts(row),
            derivations=note.derivations,
            uploaded_bytes=row.uploaded_bytes,
            stuck=self._unschedulable(row),
            open=row.is_open,
            incomplete=row.incomplete,
            not_evaluated=tuple(
                [UnevaluatedView(attr=attr, kind=kind, message=text) for attr, kind, text in note.not_evaluated]
            ),
            unevaluated=note.unevaluated,
            owner=note.origin.owner,
            branch=note.origin.branch,
            pull=note.origin.pull,
            commit=note.origin.commit,
            tags=dict(note.origin.tags),
            priority=row.terms.priority,
            deadline_at=row.terms.deadline,
            fail_fast=row.terms.fail_fast,
            superseded_by=row.by,
        )

    def root_view(self, root: RootNote) -> RootView:
        """Render a root of a submission."""
        row = self._row(root.step)
        return RootView(
            attr=root.attr,
            drv=root.drv,
            step=root.step,
            state=row.state,
            outputs=dict(root.outputs),
            failure=self._root_failure(row),
        )

    def _root_failure(self, root: StepRow) -> RootFailureView | None:
        """Return why a root failed or is doomed; None where it is neither, or its cause is forgotten."""
        step: StepRow | None = root
        if root.state is StepStatus.DOOMED:
            step = self._steps.get(StepKey(root.life.cause))
        if step is None or step.state is not StepStatus.FAILED or step.life.failure is None:
            return None
        failure = step.life.failure
        return RootFailureView(
            step=step.key,
            name=(self._details.get(step.key) or _NO_DETAIL).name,
            kind=failure.kind,
            message=failure.message[:ROOT_FAILURE_CHARS],
            has_log=step.life.attempt > 0,
        )

    def snapshot(self, row: SubmissionRow) -> Generator[Pause, None, Snapshot]:
        """Render a submission with the steps that run or failed, with pauses: a large farm runs thousands.

        A step that changes meanwhile is shown as it was or as it is; those who watch get it once more.
        """
        steps: list[StepView] = []
        for step in [*row.active.values(), *list(row.failed.values())[:SNAPSHOT_FAILED]]:
            steps.append(self.step_view(step))
            yield PAUSE
        return Snapshot(submission=self.submission_view(row), steps=tuple(steps), eta=self.eta_of(row))

    def counts_changed(self, row: SubmissionRow) -> CountsChanged:
        """Render the counts of a submission."""
        return CountsChanged(
            counts=self._counts(row),
            uploaded_bytes=row.uploaded_bytes,
            stuck=self._unschedulable(row),
            queued=() if row.ended or row.withdrawn else self._explain.queued(row.ready),
            eta=self.eta_of(row),
            open=row.is_open,
            incomplete=row.incomplete,
        )

    def _counts(self, row: SubmissionRow) -> Counts:
        by_state = {state.value: count for state, count in row.counts.items()}
        return Counts(total=len(row.members), held=row.held, joined=row.joined, **by_state)

    def _system(self, key: StepKey) -> str:
        return (self._details.get(key) or _NO_DETAIL).system

    def step_name(self, key: StepKey) -> str:
        """Return the name of a step, "" where it is not known; much cheaper than `named`."""
        return self._details.name(key)

    def _unschedulable(self, row: SubmissionRow) -> tuple[str, ...]:
        return () if row.ended or row.withdrawn else self._explain.unschedulable(row.ready)
