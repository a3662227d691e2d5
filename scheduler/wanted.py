"""Submissions and the steps that they want: accepted, growing, sealed, withdrawn, forgotten.

An *open* submission grows by further roots. What it stands on is remembered until it is sealed, so that a root costs
what is new below it, and not all that the submission has.

Written by `FarmState.evolve` alone. Nothing here recurses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from scheduler import facts as f
from scheduler.deadlines import Deadlines
from scheduler.graph import Merged, StepGraph, pieces
from scheduler.model import ImpossibleError, Instant, StepKey, StepState, SubmissionId
from scheduler.pauses import PAUSE, PIECE, Pause, picked, unique
from scheduler.records import Step
from scheduler.references import ReferenceCounts
from scheduler.resource_limits import ResourceLimits
from scheduler.terms import NO_TERMS, Terms, Withdrawal
from scheduler.transitions import LAPSED

_DONE = StepState.DONE


class OpenSubmission:
    """Roots of a submission that may still grow, and all that it stands on or stood on."""

    __slots__ = ("members", "roots")

    def __init__(self, roots: Iterable[StepKey], members: Iterable[StepKey]) -> None:
        self.roots = set(roots)
        self.members = set(members)


class WantedSteps(StepGraph):
    """The graph, with the submissions that want its steps."""

    def __init__(self, rank: Callable[[Step], int], weigh: Callable[[str], int]) -> None:
        super().__init__(rank, weigh)
        #: Submissions neither withdrawn nor forgotten, with their roots; and those that are withdrawn, not forgotten.
        self.submissions: dict[SubmissionId, tuple[Step, ...]] = {}
        self.withdrawn: dict[SubmissionId, tuple[Step, ...]] = {}
        #: A submission that was accepted begins to stand on its steps: its roots are counted already.
        self.engaging = False
        #: Those of `submissions` that may still grow.
        self.open: dict[SubmissionId, OpenSubmission] = {}
        #: What failing attempts have cost submissions: each moves the instant on by a part of an hour (`step_rules`).
        #: One that lies an hour ahead has spent its allowance. Only of submissions that are not forgotten.
        self.paid_until: dict[SubmissionId, Instant] = {}
        #: How long steps of a submission wait for a builder that could take them, in seconds, 0 for ever: of those that
        #: set it and are not forgotten.
        self.wait_limits: dict[SubmissionId, int] = {}
        #: Limits that submissions set for builds of their roots, where they set some and are not forgotten.
        self.limits: dict[SubmissionId, dict[StepKey, ResourceLimits]] = {}
        #: Deadlines of those that wait.
        self.deadlines = Deadlines()
        #: Submissions that fail fast and wait although a root of theirs has failed: withdrawn before a call ends.
        self.failing: dict[SubmissionId, None] = {}
        #: Those of `withdrawn` that failed fast.
        self.failed_fast: set[SubmissionId] = set()
        #: Submissions of an owner that stand for each other, neither withdrawn nor forgotten, by their lineage.
        self.lineages: dict[tuple[str, str], dict[SubmissionId, None]] = {}
        #: Counts the references to each step: one without any may be forgotten.
        self.references = ReferenceCounts(self.steps)

    def has_ended(self, submission: SubmissionId) -> bool:
        """Return whether a submission waits for nothing; true also for one that is withdrawn or unknown."""
        if submission in self.open:
            return False
        return not self.shares.waits(submission)

    def limits_wanted(self, step: Step) -> list[ResourceLimits | None]:
        """Return what the submissions that want the step say of it as their root, and None for those that do not.

        Empty where none says anything. Submissions that share a stake (`shares`) with one that wants it count too.
        """
        limits = [self.limits.get(submission, {}).get(step.key) for submission in step.roots] if self.limits else []
        if not any(limits):
            return []
        others = set(self.shares.submissions(step.owners)).difference(step.roots)
        return [*limits, None] if others else limits

    def _accepted(self, fact: f.SubmissionAccepted | f.SubmissionRetried) -> Iterator[Pause]:
        steps = self.steps
        keys = tuple((yield from unique(fact.roots)))
        roots = yield from picked(keys, lambda piece: [steps[key] for key in piece])
        before = self.submissions.get(fact.submission) or self.withdrawn.pop(fact.submission, ())
        self.submissions[fact.submission] = roots
        if fact.submission in self.open or (isinstance(fact, f.SubmissionAccepted) and fact.open):
            self.open[fact.submission] = OpenSubmission(fact.roots, fact.members)
        self._set_wait_limit(fact.submission, fact.wait_s)
        self._set_limits(fact.submission, fact.limits)
        self._set_terms(fact.submission, fact.terms)
        for piece in pieces(roots):
            self.references.add(root.key for root in piece)
            yield PAUSE
        for piece in pieces(before):
            self.references.drop(root.key for root in piece)
            yield PAUSE
        yield from self._want(fact.submission, roots)
        self.engaging = True
        yield from self._engage(self.steps[key] for key in fact.members)
        self.engaging = False

    def _want(self, submission: SubmissionId, roots: Collection[Step]) -> Iterator[Pause]:
        """Let a submission wait for those of the roots that have not finished."""
        merged: Merged = {}
        lapsed = False
        for count, root in enumerate(roots, 1):
            if not count % PIECE:
                yield PAUSE
            if root.state in LAPSED:
                lapsed = True
            elif root.state is not _DONE and submission not in root.roots:
                root.roots = (*root.roots, submission)
                self._own(root, (self.shares.begin(submission),), merged)
                self.orphans.pop(root.key, None)
        if lapsed:
            self._root_failed(submission)
        self._settle_end(submission)

    def _end_share(self, submission: SubmissionId) -> None:
        super()._end_share(submission)
        self._settle_end(submission)

    def _settle_end(self, submission: SubmissionId) -> None:
        """Forget what only matters while a submission waits, where it does no longer."""
        if submission not in self.open and not self.shares.waits(submission):
            self.deadlines.drop(submission)
            self.failing.pop(submission, None)

    def _root_failed(self, submission: SubmissionId) -> None:
        """Note that a submission which fails fast has to be withdrawn."""
        if self.shares.terms_of(submission).fail_fast:
            self.failing[submission] = None
            self._settle_end(submission)

    def _grew(self, fact: f.SubmissionGrew) -> Iterator[Pause]:
        opened = self.open[fact.submission]
        known = self.steps
        roots = yield from picked(fact.roots, lambda piece: [known[key] for key in piece])
        self.submissions[fact.submission] += roots
        for start in range(0, len(fact.roots), PIECE):
            new = fact.roots[start : start + PIECE]
            if not opened.roots.isdisjoint(new):
                raise ImpossibleError(f"{fact.submission} grows by a root that it has")
            opened.roots.update(new)
            yield PAUSE
        for start in range(0, len(fact.members), PIECE):
            opened.members.update(fact.members[start : start + PIECE])
            yield PAUSE
        if fact.limits:
            self.limits[fact.submission] = {**self.limits.get(fact.submission, {}), **dict(fact.limits)}
        for piece in pieces(roots):
            self.references.add(root.key for root in piece)
            yield PAUSE
        members = yield from picked(fact.members, lambda piece: [known[key] for key in piece])
        below = yield from self._engaged_at(roots, members)
        yield from self._want(fact.submission, roots)
        yield from self._engage(members)
        yield from self._spread(below)

    def _engaged_at(
        self, roots: tuple[Step, ...], members: Sequence[Step]
    ) -> Generator[Pause, None, list[tuple[int, int, Step]]]:
        """Return the engaged steps at and directly below what is new, by depth: they may now lie deeper."""
        new = yield from unique(members)
        below: dict[Step, None] = {}
        looked_at = 0
        for step in (*roots, *members):
            needs = (step, *self.needs_of(step))
            below.update((need, None) for need in needs if need.engaged and need not in new)
            looked_at += len(needs)
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
        return sorted((step.depth, step.sequence, step) for step in below)

    def _spread(self, below: list[tuple[int, int, Step]]) -> Iterator[Pause]:
        """Pass depths, tails and owners of engaged steps on to what is engaged below them, as far as that changes them.

        Before, each lay deeper than what stands on it. So the least deep comes first, and each comes once but for
        steps that the cache has lost meanwhile.
        """
        merged: Merged = {}
        waiting = {step for _, _, step in below}
        looked_at = 0
        while below:
            _, _, step = heappop(below)
            waiting.remove(step)
            looked_at += 1 + len(step.needs)
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE
            depth, owners = step.depth + 1, set(self.shares.live(step.owners))
            for need in step.needs:
                before, tail_ms = need.depth, step.tail_ms + need.work_ms
                if before >= depth and need.tail_ms >= tail_ms and owners.issubset(need.owners):
                    continue
                self._own(need, step.owners, merged)
                need.depth = max(before, depth)
                if need.tail_ms < tail_ms:
                    need.tail_ms = tail_ms
                    if need.queue is not None:
                        self.ready.enqueue(need)
                if need.engaged and need not in waiting:
                    waiting.add(need)
                    heappush(below, (before, need.sequence, need))

    def _sealed(self, fact: f.SubmissionSealed) -> None:
        if self.open.pop(fact.submission, None) is None:
            raise ImpossibleError(f"{fact.submission} is sealed and not open")
        self._settle_end(fact.submission)

    def _fall_in(self, step: Step, below: list[Step]) -> None:
        """Count that open submissions which stand on a step that fell back stand on what it needs now."""
        for opened in self.open.values():
            if step.key in opened.members:
                opened.members.update(each.key for each in below if each.state is not _DONE)

    def _set_wait_limit(self, submission: SubmissionId, wait_s: int | None) -> None:
        if self.wait_limits.get(submission) == wait_s:
            return
        self.partings += 1
        if wait_s is None:
            del self.wait_limits[submission]
        else:
            self.wait_limits[submission] = wait_s

    def _set_limits(self, submission: SubmissionId, limits: tuple[tuple[StepKey, ResourceLimits], ...]) -> None:
        if limits:
            self.limits[submission] = dict(limits)
        else:
            self.limits.pop(submission, None)

    def _set_terms(self, submission: SubmissionId, terms: Terms) -> None:
        self.failed_fast.discard(submission)
        if terms != NO_TERMS:
            self.shares.terms[submission] = terms
        self.deadlines.put(submission, terms.deadline)
        if terms.lineage:
            self.lineages.setdefault((terms.owner, terms.lineage), {})[submission] = None

    def _leave_lineage(self, submission: SubmissionId) -> None:
        terms = self.shares.terms_of(submission)
        others = self.lineages.get((terms.owner, terms.lineage), {})
        others.pop(submission, None)
        if not others:
            self.lineages.pop((terms.owner, terms.lineage), None)

    def _bumped(self, fact: f.SubmissionBumped) -> None:
        terms = self.shares.terms_of(fact.submission)
        self.shares.terms[fact.submission] = replace(terms, priority=fact.priority)
        self.shares.rank(fact.submission)

    def _withdrawn(self, fact: f.SubmissionWithdrawn) -> Iterator[Pause]:
        roots = self.withdrawn[fact.submission] = self.submissions.pop(fact.submission)
        self.open.pop(fact.submission, None)
        self.failing.pop(fact.submission, None)
        self.deadlines.drop(fact.submission)
        self._leave_lineage(fact.submission)
        if fact.why is Withdrawal.FAIL_FAST:
            self.failed_fast.add(fact.submission)
        for count, root in enumerate(roots, 1):
            if not count % PIECE:
                yield PAUSE
            if fact.submission in root.roots:
                self._end_share(fact.submission)
            root.roots = tuple(other for other in root.roots if other != fact.submission)
            self.partings += 1
            if root.engaged and not root.wanted:
                self.orphans[root.key] = root

    def _submission_forgotten(self, fact: f.SubmissionForgotten) -> Iterator[Pause]:
        known = self.submissions if fact.submission in self.submissions else self.withdrawn
        roots = known.pop(fact.submission)
        if fact.submission in self.open or self.shares.waits(fact.submission):
            raise ImpossibleError(f"{fact.submission} is forgotten and has not ended")
        self.paid_until.pop(fact.submission, None)
        self.wait_limits.pop(fact.submission, None)
        self.limits.pop(fact.submission, None)
        self._leave_lineage(fact.submission)
        self.shares.terms.pop(fact.submission, None)
        self.failed_fast.discard(fact.submission)
        for piece in pieces(roots):
            self.references.drop(root.key for root in piece)
            yield PAUSE

    def _submission_restored(self, fact: f.SubmissionRestored) -> None:
        known = self.withdrawn if fact.withdrawn else self.submissions
        known[fact.submission] = tuple([self.steps[key] for key in fact.roots])
        if fact.open:
            self.open[fact.submission] = OpenSubmission(fact.roots, fact.members)
        if fact.paid_until:
            self.paid_until[fact.submission] = fact.paid_until
        self._set_wait_limit(fact.submission, fact.wait_s)
        self._set_limits(fact.submission, fact.limits)
        self._set_terms(fact.submission, fact.terms)
        if fact.withdrawn:
            self._leave_lineage(fact.submission)
            self.deadlines.drop(fact.submission)
        if fact.failed_fast:
            self.failed_fast.add(fact.submission)
