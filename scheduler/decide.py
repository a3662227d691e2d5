"""Decisions: facts that follow from an event. Nothing here changes the state.

The caller applies each fact before it takes the next. So every function is a generator and reads a state that holds the
facts which it yielded. Stale events (an old attempt, a builder that is gone, a repeat) yield nothing; a graph that
cannot be is refused before any fact. Work on many steps pauses in between (`pauses`).

`step_rules` decides about steps, `builder_rules` about builders, `grants` about leases; here are submissions and the
passing of time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import assert_never

from scheduler import events as e
from scheduler import facts as f
from scheduler.admission import check_graph
from scheduler.builder_rules import BuilderRules
from scheduler.forsaken import Forsaken
from scheduler.grants import Grants
from scheduler.model import FAR_OFF, NO_INSTANT, Instant, StepKey, StepState, SubmissionClosedError, SubmissionId
from scheduler.pauses import PAUSE, PIECE, Pause, emptied, picked, unique
from scheduler.policy import Limits, Policy
from scheduler.records import Step
from scheduler.state import FarmState, is_lapsed
from scheduler.step_rules import StepRules, is_known_failure
from scheduler.terms import HIGHEST_PRIORITY, LOWEST_PRIORITY, Terms, Withdrawal
from scheduler.transitions import UNFINISHED

#: Steps that one fact forgets at most.
FORGOTTEN_AT_ONCE = 1000

_LEASED, _PUBLISHING, _DONE = StepState.LEASED, StepState.PUBLISHING, StepState.DONE

#: Of results of which no size is known.
NO_SIZES: Mapping[StepKey, int] = {}

#: Iterator that goes round another one.
Around = Callable[[Iterator[f.FactOrPause]], Iterator[f.FactOrPause]]


class Decider:
    """The decisions, with the policy and the budgets they are made under; what is decided of a plan passes `around`."""

    __slots__ = ("_around", "_builder_rules", "_forsaken", "_limits", "_policy", "_state", "_step_rules", "grants")

    def __init__(self, state: FarmState, limits: Limits, policy: Policy, around: Around) -> None:
        self._state = state
        self._around = around
        self._limits = limits
        self._policy = policy
        self._step_rules = StepRules(state, limits, policy)
        self._builder_rules = BuilderRules(state, limits, policy, self._step_rules)
        self._forsaken = Forsaken(state, limits, self._step_rules)
        self.grants = Grants(state, policy)

    def decide(self, events: Iterable[e.Event], now: Instant) -> Iterator[f.FactOrPause]:
        """Yield what follows from events, without granting leases (`grants` does, once per batch)."""
        state = self._state
        for event in events:
            # Of these come as many as there are builds: they take no generator of their own.
            if isinstance(event, e.BuildSucceeded):
                step = state.lease_holder(event.lease, _LEASED)
                if step is not None and step.builder == event.builder:
                    yield f.StepBuilt(event.lease, event.builder, event.evidence, now, event.output_bytes)
                    if step.faults:
                        yield from self._builder_rules.judge_others(event.builder, now)
            elif isinstance(event, e.OutputsPublished):
                step = state.lease_holder(event.lease, _PUBLISHING)
                if step is not None and not step.follows:
                    yield f.StepDone(event.lease, now)
            elif isinstance(event, e.SubmissionReceived | e.SubmissionGrown):
                yield from self._around(self._wished(event, now))
                continue
            else:
                yield from self._decide(event, now)
            if state.orphans or state.failing:
                yield from self._settle(now)

    def _wished(self, event: e.Wished, now: Instant) -> Iterator[f.FactOrPause]:
        yield from self._received(event, now) if isinstance(event, e.SubmissionReceived) else self._grown(event, now)
        if self._state.orphans or self._state.failing:
            yield from self._settle(now)

    def _decide(self, event: e.Other, now: Instant) -> Iterator[f.FactOrPause]:  # noqa: C901, PLR0912  one arm each
        match event:
            case e.BuilderReported():
                yield from self._builder_rules.reported(event, now)
            case e.BuildFailed():
                step = self._state.lease_holder(event.lease, _LEASED)
                if step is not None and step.builder == event.builder:
                    yield from self._step_rules.build_failed(step, event.failure, event.limit, now)
                    yield from self._builder_rules.judge(event.builder, now)
            case e.PublishFailed():
                step = self._state.lease_holder(event.lease, _PUBLISHING)
                if step is not None:
                    yield from self._step_rules.publish_failed(step, event.failure, now)
            case e.ResultsHeld():
                yield from self._results_held(event, now)
            case e.SealAsked():
                if event.submission in self._state.open:
                    yield f.SubmissionSealed(event.submission, now, event.incomplete)
            case e.SubmissionCancelled():
                if event.submission in self._state.submissions:
                    yield f.SubmissionWithdrawn(event.submission, now)
            case e.PriorityAsked():
                yield from self._priority_asked(event, now)
            case e.SubmissionExpired():
                yield from self._expired(event.submission, now)
            case e.RetryAsked():
                yield from self._retry_asked(event.step)
            case e.BuilderJoined():
                yield from self._builder_rules.joined(event, now)
            case e.BuilderLost():
                yield from self._builder_rules.lost(event, now)
            case e.SpeedsMeasured():
                yield f.BuildersRated(event.speeds, event.fetch_rates)
            case e.WorksEstimated():
                yield from self._estimated(event)
            case e.TimePassed():
                pass
            case _:
                assert_never(event)

    def _settle(self, now: Instant) -> Iterator[f.FactOrPause]:
        """Withdraw what fails fast and has failed, and abandon what no submission wants any more."""
        for submission in tuple(self._state.failing):
            yield f.SubmissionWithdrawn(submission, now, Withdrawal.FAIL_FAST)
        yield from self._step_rules.abandon_orphans(now)

    def due(self, now: Instant) -> Iterator[f.FactOrPause]:
        """Yield what the passing of time has decided: silent builders, back-offs and quarantines that ended."""
        state = self._state
        yield from self._builder_rules.due(now)
        while (first := state.deadlines.first) is not None and first[0] <= now:
            yield f.SubmissionWithdrawn(first[1], now, Withdrawal.DEADLINE)
        if state.orphans or state.failing:
            yield from self._settle(now)
        delayed = state.ready.delayed
        while delayed and delayed[0][0] <= now:
            yield f.BackOffEnded(delayed[0][2].key)
        yield from self._forsaken.due(now)
        if state.orphans or state.failing:
            yield from self._settle(now)

    def deadline(self) -> Instant | None:
        """Return the instant at which `due` may next yield a fact."""
        delayed = self._state.ready.delayed
        ending = self._state.deadlines.first
        first = [*(delayed[0][:1] if delayed else ()), *(ending[:1] if ending else ())]
        held = self.grants.look_again
        others = () if held == FAR_OFF else (held,)
        return min([*first, *others, *self._builder_rules.deadline(), *self._forsaken.deadline()], default=None)

    def refreshes(self, event: e.BuilderReported, built: Collection[e.BuildSucceeded], now: Instant) -> bool:
        """Return whether a heartbeat behind reports of builds says nothing but that its builder is there."""
        return self._builder_rules.refreshes(event, built, now)

    def gives_up_at(self, step: Step) -> Instant | None:
        """Return when a step that no builder can take is given up as things stand; None for never."""
        return self._forsaken.until(step)

    def _received(self, event: e.SubmissionReceived, now: Instant) -> Iterator[f.FactOrPause]:
        """Take a submission, let one that ended with lapsed roots run again, or give one that runs a new plan."""
        state = self._state
        if (yield from self._is_stale(event)):
            return
        yield from check_graph(state, event)
        if event.again or event.replanned:
            event = yield from self._with_known_roots(event)
        renewed = yield from self._take_steps(event)
        yield from self._hold(event.held, min(now, event.asked_at), now, dict(event.held_bytes))
        roots = yield from picked(event.roots, lambda piece: [state.steps[key] for key in piece])
        known_failures = _KnownFailures(self._limits, event.retry_failed, event.retry, renewed, now)
        yield from self._lose(event, roots, known_failures)
        if event.replanned:
            # What became of the roots that it had stands; one whose growth was lost begins.
            had = yield from unique(state.submissions[event.submission])
            further = yield from picked(roots, lambda piece: [root for root in piece if root not in had])
            yield from self._step_rules.revive(further, restart=True, stands=known_failures)
        else:
            yield from self._step_rules.revive(roots, restart=True, stands=known_failures)
            yield from self._end_waits(event)
        members = yield from state.descending(roots)
        keys = yield from picked(members, _keys)
        held = yield from picked(members, _done_keys)
        joined = yield from picked(members, _engaged_keys)
        kind = f.SubmissionRetried if event.again or event.replanned else f.SubmissionAccepted
        terms = self._terms_of(event, now)
        fact = kind(
            event.submission, now, event.roots, keys, held, joined, self._wait_of(event), event.limits, terms=terms
        )
        yield replace(fact, open=True) if isinstance(fact, f.SubmissionAccepted) and event.open else fact
        if event.supersedes and terms.lineage:
            for older in tuple(state.lineages[terms.owner, terms.lineage]):
                if older != event.submission and not state.has_ended(older):
                    yield f.SubmissionWithdrawn(older, now, Withdrawal.SUPERSEDED, event.submission)
        yield from self._doom_by(known_failures, now)

    def _grown(self, event: e.SubmissionGrown, now: Instant) -> Iterator[f.FactOrPause]:
        """Let an open submission want further roots. Costs what is new below these."""
        state = self._state
        opened = state.open.get(event.submission)
        if opened is None:
            self._refuse_closed(event)
            return
        asked = tuple((yield from unique(event.roots)))
        wanted = yield from picked(asked, lambda piece: [key for key in piece if key not in opened.roots])
        if not wanted:
            return
        yield from check_graph(state, event)
        renewed = yield from self._take_steps(event)
        yield from self._hold(event.held, min(now, event.asked_at), now, dict(event.held_bytes))
        roots = yield from picked(wanted, lambda piece: [state.steps[key] for key in piece])
        known_failures = _KnownFailures(self._limits, event.retry_failed, (), renewed, now, members=opened.members)
        yield from self._lose(event, roots, known_failures)
        yield from self._step_rules.revive(roots, restart=True, stands=known_failures)
        yield from self._end_waits(event)
        order = yield from state.descending(roots, known=opened.members)
        had = opened.members
        stands = yield from picked(
            order, lambda piece: [step for step in piece if step.key not in had or step.state in UNFINISHED]
        )
        new = yield from picked(stands, lambda piece: [step for step in piece if step.key not in had])
        members = yield from picked(stands, _keys)
        held = yield from picked(new, _done_keys)
        joined = yield from picked(new, _engaged_keys)
        again = yield from picked(members, lambda piece: [key for key in piece if key in had])
        yield f.SubmissionGrew(event.submission, now, wanted, members, held, joined, again, event.limits)
        yield from self._doom_by(known_failures, now)

    def _refuse_closed(self, event: e.SubmissionGrown) -> None:
        """Raise `SubmissionClosedError` unless the submission has all the roots that are wanted."""
        state = self._state
        roots = state.submissions.get(event.submission) or state.withdrawn.get(event.submission, ())
        if not {root.key for root in roots}.issuperset(event.roots) or not event.roots:
            raise SubmissionClosedError(f"{event.submission} is not open")

    def _with_known_roots(self, event: e.SubmissionReceived) -> Generator[Pause, None, e.SubmissionReceived]:
        """Return an event of a known submission with all its roots: it may have grown since it was planned anew."""
        state = self._state
        known = state.submissions.get(event.submission) or state.withdrawn[event.submission]
        roots = yield from unique(chain((root.key for root in known), event.roots))
        limits = {**self._state.limits.get(event.submission, {}), **dict(event.limits)}
        return replace(event, roots=tuple(roots), limits=tuple(limits.items()))

    def _lose(self, event: e.Wished, roots: Sequence[Step], known_failures: _KnownFailures) -> Iterator[f.FactOrPause]:
        """Let what the cache has lost be made again, but for what is known to fail below it or below `roots`."""
        state = self._state
        lost = yield from self._lost_steps(event)
        if state.failed:
            below_lost = [need for step in lost for need in state.needs_of(step)]
            # Engaged steps have not failed, nor has anything below them.
            sound: Collection[StepKey] = state.steps if isinstance(event, e.SubmissionGrown) else ()
            yield from known_failures.look_below(state, [*roots, *below_lost], sound)
        for step in lost:
            yield from self._step_rules.revive(state.needs_of(step), restart=True, stands=known_failures)
            yield f.StepLost(step.key)

    def _doom_by(self, known_failures: _KnownFailures, now: Instant) -> Iterator[f.FactOrPause]:
        causes = known_failures.causes
        # Nothing is added to these any more.
        for count, (step, cause) in enumerate(causes.items(), 1):
            if not count % PIECE:
                yield PAUSE
            if step.dependents:
                yield from self._step_rules.doom(step, cause, now, known_failures.has_failed_here)
        yield from emptied(causes)

    def _wait_of(self, event: e.SubmissionReceived) -> int | None:
        """Return how long the submission lets its steps wait for a builder: as before where it sets nothing."""
        if event.wait_s is None and (event.again or event.replanned):
            return self._state.wait_limits.get(event.submission)
        return event.wait_s

    def _terms_of(self, event: e.SubmissionReceived, now: Instant) -> Terms:
        """Return the submission's terms: what it set before where it is known, but for a deadline that has passed."""
        if not (event.again or event.replanned):
            return event.terms
        terms = self._state.shares.terms_of(event.submission)
        return replace(terms, deadline=NO_INSTANT) if terms.deadline and terms.deadline <= now else terms

    def _priority_asked(self, event: e.PriorityAsked, now: Instant) -> Iterator[f.FactOrPause]:
        state, name = self._state, event.submission
        if name not in state.submissions:
            return
        terms, wanted = state.shares.terms_of(name), event.priority
        if wanted is None:
            others = [each.priority for other, each in state.shares.waiting(terms.owner) if other != name]
            wanted = max(terms.priority, max(others, default=terms.priority - 1) + 1)
        wanted = max(LOWEST_PRIORITY, min(HIGHEST_PRIORITY, wanted))
        if wanted != terms.priority:
            yield f.SubmissionBumped(name, wanted, now)

    def _is_stale(self, event: e.SubmissionReceived) -> Generator[Pause, None, bool]:
        """Return whether the submission is a repeat, or has left the state that running again or a new plan is for."""
        known = self._state.submissions.get(event.submission)
        if event.again and event.submission in self._state.failed_fast:
            return False
        if not (event.again or event.replanned):
            return known is not None
        for count, root in enumerate(known or (), 1):
            if is_lapsed(root) if event.again else event.submission in root.roots:
                return False
            if not count % PIECE:
                yield PAUSE
        return True

    def _take_steps(self, event: e.Wished) -> Generator[f.FactOrPause, None, dict[StepKey, None]]:
        """Learn steps and recipes; return the known steps that gained one."""
        renewed: dict[StepKey, None] = {}
        for count, spec in enumerate(event.steps, 1):
            if not count % PIECE:
                yield PAUSE
            step = self._state.steps.get(spec.key)
            if step is None:
                yield f.StepAdded(spec)
                continue
            # By place and not by content: a place keeps its recipe for ever, and two places may hold equal ones.
            for recipe in spec.recipes[len(step.recipes) :]:
                renewed[spec.key] = None
                yield f.RecipeAdded(spec.key, recipe)
        return renewed

    def _end_waits(self, event: e.Wished) -> Iterator[f.FactOrPause]:
        """Let steps that were handed back go on at once: the client has just sent what they lacked."""
        for count, spec in enumerate(event.steps, 1):
            if not count % PIECE:
                yield PAUSE
            step = self._state.steps[spec.key]
            if step.not_before and step.returns and step.state is StepState.READY:
                yield f.BackOffEnded(step.key)

    def _lost_steps(self, event: e.Wished) -> Generator[Pause, None, list[Step]]:
        """Return what the core takes for done and a later look into the cache did not find."""
        held = dict.fromkeys(event.held)
        lost: dict[Step, None] = {}
        for count, spec in enumerate(event.steps, 1):
            if not count % PIECE:
                yield PAUSE
            step = self._state.steps[spec.key]
            if step.state is _DONE and step.done_at < event.asked_at and spec.key not in held:
                lost[step] = None
        return list(lost)

    def _results_held(self, event: e.ResultsHeld, now: Instant) -> Iterator[f.FactOrPause]:
        known = self._state.steps
        steps = yield from picked(event.steps, lambda piece: [known[key] for key in piece if key in known])
        unfinished = yield from picked(steps, lambda piece: [step.key for step in piece if step.state in UNFINISHED])
        yield from self._hold(unfinished, min(now, event.seen_at), now)

    def _hold(
        self, held: Collection[StepKey], seen_at: Instant, now: Instant, sizes: Mapping[StepKey, int] = NO_SIZES
    ) -> Iterator[f.FactOrPause]:
        for count, key in enumerate((yield from unique(held)), 1):
            if not count % PIECE:
                yield PAUSE
            step = self._state.steps.get(key)
            if step is None:
                yield f.StepCached(key, seen_at, sizes.get(key, 0))
            elif step.state is not _DONE:
                yield from self._step_rules.stop(step, now, "the cache holds the result")
                yield f.StepCached(key, seen_at, sizes.get(key, 0))

    def _expired(self, submission: SubmissionId, now: Instant) -> Iterator[f.FactOrPause]:
        """Forget a submission that has ended, and the steps that nothing names any more.

        What is known to fail stays known for as long as that counts, and what it names with it.
        """
        state = self._state
        known = submission in state.submissions or submission in state.withdrawn
        if not known or not state.has_ended(submission):
            return
        yield f.SubmissionForgotten(submission, now)
        while gone := (yield from self._forgettable(now)):
            for start in range(0, len(gone), FORGOTTEN_AT_ONCE):
                yield f.StepsForgotten(tuple(gone[start : start + FORGOTTEN_AT_ONCE]))
                yield PAUSE

    def _forgettable(self, now: Instant) -> Generator[Pause, None, list[StepKey]]:
        """Return the unreferenced steps, but for those that are known to fail."""
        gone: list[StepKey] = []
        for count, step in enumerate(self._state.references.unreferenced.values(), 1):
            if not is_known_failure(step, self._limits, now):
                gone.append(step.key)
            if not count % PIECE:
                yield PAUSE
        return gone

    def _estimated(self, event: e.WorksEstimated) -> Iterator[f.FactOrPause]:
        """Take in what is news of steps that are not finished."""
        news: dict[StepKey, int] = {}
        for count, (key, work_ms) in enumerate(event.works, 1):
            step = self._state.steps.get(key)
            if step is not None and step.state in UNFINISHED and work_ms > 0 and step.work_ms != work_ms:
                news[key] = work_ms
            if not count % PIECE:
                yield PAUSE
        if news:
            keys = tuple(news)
            works = yield from picked(keys, lambda piece: [(key, news[key]) for key in piece])
            yield f.WorksRevised(works)

    def _retry_asked(self, key: StepKey) -> Iterator[f.FactOrPause]:
        """Forget a failure that no submission waits for: the next one that wants the step builds it."""
        step = self._state.steps.get(key)
        if step is not None and step.state is StepState.FAILED:
            yield (yield from self._step_rules.revived(step, restart=True))


def _keys(steps: Sequence[Step]) -> list[StepKey]:
    return [step.key for step in steps]


def _done_keys(steps: Sequence[Step]) -> list[StepKey]:
    return [step.key for step in steps if step.state is _DONE]


def _engaged_keys(steps: Sequence[Step]) -> list[StepKey]:
    return [step.key for step in steps if step.engaged]


class _KnownFailures:
    """Failures that a submission takes for known, and the steps that they have doomed, each with its root cause."""

    __slots__ = ("_all", "_but", "_limits", "_members", "_now", "_renewed", "causes")

    def __init__(
        self,
        limits: Limits,
        retry_failed: bool,
        retry: tuple[StepKey, ...],
        renewed: dict[StepKey, None],
        now: Instant,
        *,
        members: Collection[StepKey] = (),
    ) -> None:
        self._limits = limits
        self._all = not retry_failed
        self._but = frozenset(retry)
        #: A new recipe may do better than those that failed.
        self._renewed = renewed
        self._now = now
        #: What has failed of these has failed for this very submission, which does not try it twice.
        self._members = members
        self.causes: dict[Step, StepKey] = {}

    def look_below(
        self, state: FarmState, starts: list[Step], sound: Collection[StepKey]
    ) -> Generator[Pause, None, None]:
        """Find what stands at or below `starts`, needs first: a doomed step stands while what doomed it does.

        Engaged steps among `sound` are passed over.
        """
        below = yield from state.descending(starts, known=sound)
        looked_at = 0
        for step in reversed(below):
            looked_at += 1
            if not self(step) and step.state is StepState.DOOMED and len(step.recipes) == 1:
                needs = state.needs_of(step)
                looked_at += len(needs)
                cause = next((self.causes[need] for need in needs if need in self.causes), None)
                if cause is not None:
                    self.causes[step] = cause
            if looked_at >= PIECE:
                looked_at = 0
                yield PAUSE

    def __call__(self, step: Step) -> bool:
        """Return whether a lapsed step is to be left as it is."""
        if step in self.causes:
            return True
        if self.has_failed_here(step):
            self.causes[step] = step.key
            return True
        requested = not self._all or step.key in self._but or step.key in self._renewed
        if requested or not is_known_failure(step, self._limits, self._now):
            return False
        self.causes[step] = step.key
        return True

    def has_failed_here(self, step: Step) -> bool:
        """Return whether a step has failed for the submission that grows."""
        return step.state is StepState.FAILED and step.key in self._members and step.key not in self._renewed
