"""Judges that see only what the farm said, never its state: they cannot share the machine's mistakes.

`Judge` reads a whole stream of facts, those about builders included, and raises `OracleError` with the first sentence
below that does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import inf

from scheduler import facts as f
from scheduler.effects import Effect, PublishOutputs
from scheduler.model import BuilderId, BuilderSpec, Failure, FailureKind, Recipe, Requirements, StepKey, SubmissionId
from scheduler.policy import Limits
from scheduler.terms import Terms, Withdrawal


class OracleError(AssertionError):
    """A journal that must not be."""


@dataclass
class Life:
    """One step as its facts tell it."""

    recipes: list[Recipe] = field(default_factory=list)
    active: int = 0
    proven: set[int] = field(default_factory=set)
    #: Goes on where the step is forgotten and becomes known again.
    attempt: int = 0
    holder: BuilderId | None = None
    built: bool = False
    #: Needs that were not done when the lease was granted, and are not yet.
    follows: set[StepKey] = field(default_factory=set)
    done: bool = False
    #: Done, failed, doomed or abandoned.
    over: bool = False
    #: Its last failure, and when; None once it lives again.
    failed: Failure | None = None
    failed_at: float = 0.0
    gained_recipe: bool = False
    faults: list[FailureKind] = field(default_factory=list)
    returns: int = 0
    #: When it became known or lived again.
    since: float = 0.0

    def renew(self) -> None:
        self.proven, self.faults, self.returns, self.done, self.failed = set(), [], 0, False, None
        self.over = False
        self.gained_recipe = False

    def close(self) -> None:
        self.holder, self.built, self.follows = None, False, set()


@dataclass
class Admitted:
    """A builder as the facts tell it."""

    spec: BuilderSpec
    capacity: int
    heard: float
    closed: bool
    #: Steps that it is to blame for, in a row; a success ends the row, and so does a quarantine.
    strikes: set[StepKey] = field(default_factory=set)
    #: Steps whose own fault it may have been, until somebody else has built them.
    suspicions: set[StepKey] = field(default_factory=set)
    quarantined: bool = False
    #: It was in quarantine and has built nothing since.
    probation: bool = False


#: Kinds of failure that are remembered, said here once more in full.
REMEMBERED = {
    FailureKind.PERMANENT,
    FailureKind.OUTPUT_REJECTED,
    FailureKind.HASH_MISMATCH,
    FailureKind.NOT_DETERMINISTIC,
    FailureKind.KILLED,
}
#: How often one recipe in one life may meet these; and all faults together by the limits.
MOST = {FailureKind.KILLED: 1, FailureKind.SOURCE_GONE: 1, FailureKind.CONNECTION_LOST: 2}
#: Faults that say nothing against the builder.
BLAMELESS = {FailureKind.KILLED, FailureKind.SOURCE_GONE, FailureKind.TRANSIENT}
FAULTS = {
    FailureKind.SOURCE_GONE,
    FailureKind.TRANSIENT,
    FailureKind.INFRASTRUCTURE,
    FailureKind.DAEMON_LOST,
    FailureKind.INPUT_MISSING,
    FailureKind.DISK_LOW,
    FailureKind.UPLOAD_FAILED,
    FailureKind.WORKER_LOST,
    FailureKind.KILLED,
    FailureKind.CONNECTION_LOST,
}
HANDED_BACK = {FailureKind.RETURNED, FailureKind.INPUT_LOST}


class Judge:
    """Takes facts one by one. Whoever hands them over sets `now`, and `asked` where a client wants failures retried."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.now = 0.0
        self.asked = False
        self.steps: dict[StepKey, Life] = {}
        self.builders: dict[BuilderId, Admitted] = {}
        self.quarantines: dict[BuilderId, float] = {}
        self.submissions: dict[SubmissionId, bool] = {}
        #: Roots of what is not forgotten, and those that have not ended since it was accepted.
        self.roots: dict[SubmissionId, set[StepKey]] = {}
        self.waiting: dict[SubmissionId, set[StepKey]] = {}
        #: All that open submissions stand on by their facts.
        self.open: dict[SubmissionId, set[StepKey]] = {}
        self.terms: dict[SubmissionId, Terms] = {}
        self.failed_fast: set[SubmissionId] = set()
        #: Those of which a root ended without a result while they waited for it, or before.
        self.fallen: set[SubmissionId] = set()
        #: What the cache turned out to hold in the present call: a retry may find that it was published after all.
        self.just_held: list[StepKey] = []
        #: How long submissions wait for builders: those that said so.
        self.patience: dict[SubmissionId, float] = {}
        #: When builders went that offered this, and when the farm began to hear of builders.
        self.gone: dict[BuilderSpec, float] = {}
        self.began = 0.0
        #: The last attempts of forgotten steps.
        self.attempts: dict[StepKey, int] = {}

    def restarted(self) -> None:
        """The farm has forgotten its builders."""
        self.builders.clear()
        self.began = self.now
        self.quarantines.clear()

    def _must(self, holds: bool, sentence: str, fact: f.Fact) -> None:
        if not holds:
            raise OracleError(f"{sentence}: {fact}")

    def take(self, fact: f.Fact) -> None:  # noqa: C901, PLR0912  one arm per fact
        must = self._must
        match fact:
            case f.SubmissionAccepted():
                must(fact.submission not in self.submissions, "a submission is accepted once", fact)
                self.submissions[fact.submission] = True
                must(set(fact.roots) <= set(fact.members), "the roots are members", fact)
                must(set(fact.held) == {k for k in fact.members if self.steps[k].done}, "held members are done", fact)
                self._wait(fact)
                if fact.open:
                    self.open[fact.submission] = set(fact.members)
            case f.SubmissionGrew():
                self._grew(fact)
            case f.MembersJoined():
                for members in self.open.values():
                    if fact.step in members:
                        members.update(key for key in fact.members if not self.steps[key].done)
            case f.SubmissionSealed():
                must(fact.submission in self.open, "only what is open is sealed", fact)
                del self.open[fact.submission]
            case f.SubmissionRetried():
                live = self.submissions.get(fact.submission, False) or fact.submission in self.failed_fast
                must(live, "only what was accepted runs again", fact)
                ended = [key for key in fact.roots if self.steps[key].done and key not in self.just_held]
                # Of what failed fast, others may have built all since.
                again = len(ended) < len(fact.roots) or fact.submission in self.failed_fast
                must(again, "what succeeded does not run again", fact)
                must(self.roots[fact.submission] <= set(fact.roots), "no root is lost by running again", fact)
                self._wait(fact)
                if fact.submission in self.open:
                    self.open[fact.submission] = set(fact.members)
            case f.SubmissionWithdrawn():
                must(self.submissions.get(fact.submission, False), "only what was accepted is withdrawn", fact)
                self._judge_withdrawal(fact)
                self.submissions[fact.submission] = False
                self.waiting[fact.submission] = set()
                self.open.pop(fact.submission, None)
            case f.SubmissionForgotten():
                must(fact.submission not in self.open, "what may still grow is not forgotten", fact)
                must(not self.waiting.pop(fact.submission), "only what has ended is forgotten", fact)
                del self.roots[fact.submission], self.terms[fact.submission]
            case f.StepsForgotten():
                self._forget(fact)
            case f.StepAdded():
                must(fact.spec.key not in self.steps, "a step is added once", fact)
                self.steps[fact.spec.key] = self._newborn(fact.spec.key, list(fact.spec.recipes))
            case f.RecipeAdded():
                must(fact.recipe not in self.steps[fact.step].recipes, "a recipe is new", fact)
                self.steps[fact.step].gained_recipe = True
                self.steps[fact.step].recipes.append(fact.recipe)
            case f.StepCached():
                if fact.step not in self.steps:
                    self.steps[fact.step] = self._newborn(fact.step, [])
                life = self.steps[fact.step]
                must(life.holder is None, "a held step has no open lease", fact)
                if not life.done:
                    self.just_held.append(fact.step)
                life.done, life.failed = True, None
                self._over(fact.step)
            case f.StepRevived() | f.StepLost():
                life = self.steps[fact.step]
                must(life.done == isinstance(fact, f.StepLost), "what is done is lost, what is not is revived", fact)
                must(self.asked or not self._is_known(life), "a known failure is not built again unasked", fact)
                life.renew()
                life.since = self.now
                life.active = fact.recipe if isinstance(fact, f.StepRevived) else life.active
            case f.StepLeased():
                self._leased(fact)
            case f.LeaseRevoked():
                life = self._open(fact, fact.lease.step, fact.lease.attempt, fact.builder)
                kind = fact.failure.kind
                life.faults += [kind] if kind in FAULTS else []
                life.returns += kind in HANDED_BACK
                must(kind in FAULTS | HANDED_BACK | {FailureKind.CANCELLED}, "a verdict is not retried", fact)
                must(len(life.faults) < self.limits.attempts, "infrastructure faults are bounded", fact)
                must(life.faults.count(kind) <= MOST.get(kind, 99), "this kind is not retried so often", fact)
                must(life.returns <= self.limits.returns, "returned leases are bounded", fact)
                self._none_follows(fact, fact.lease.step)
                self._strike(fact, life)
                life.close()
            case f.StepBuilt():
                life = self._open(fact, fact.lease.step, fact.lease.attempt, fact.builder)
                must(not life.built, "a lease is built once", fact)
                life.built = True
                if fact.builder in self.builders:
                    here = self.builders[fact.builder]
                    here.strikes, here.suspicions, here.probation = set(), set(), False
                for other in self.builders.values():
                    if fact.lease.step in other.suspicions:
                        other.suspicions.remove(fact.lease.step)
                        other.strikes.add(fact.lease.step)
            case f.StepDone():
                life = self._open(fact, fact.lease.step, fact.lease.attempt, None)
                must(life.built, "a step is done only after it was built by the same attempt", fact)
                must(not life.follows, "a step is done after what it follows", fact)
                for each in self.steps.values():
                    each.follows.discard(fact.lease.step)
                life.close()
                life.done = True
                self._over(fact.lease.step)
            case f.StepFellBack():
                life = self.steps[fact.step]
                if life.holder is None and fact.failure.kind is FailureKind.NO_WORKER:
                    self._given_up(fact, life)
                life.proven.add(life.active)
                must(fact.recipe not in life.proven, "a recipe proven failing is not tried again in a life", fact)
                self._acquit(fact.step, fact.failure)
                self._none_follows(fact, fact.step)
                life.active, life.faults = fact.recipe, []
                life.close()
            case f.StepFailed():
                if fact.builder:
                    life = self._open(fact, fact.step, fact.attempt, fact.builder)
                else:
                    life = self.steps[fact.step]
                    self._given_up(fact, life)
                must(fact.failure.kind is not FailureKind.CANCELLED, "a wish to stop is no failure", fact)
                self._strike(fact, life)
                self._acquit(fact.step, fact.failure)
                self._none_follows(fact, fact.step)
                life.failed, life.failed_at = fact.failure, fact.at
                life.close()
                self._over(fact.step)
            case f.StepDoomed():
                must(self.steps[fact.cause].failed is not None, "the cause of a doom has itself failed", fact)
                must(self.steps[fact.step].holder is None, "a doomed step has no open lease", fact)
                self._over(fact.step)
            case f.StepAbandoned():
                must(self.steps[fact.step].holder is None, "an abandoned step has no open lease", fact)
                self._over(fact.step)
            case f.BuilderAdmitted():
                old = self.builders.get(fact.builder.id) or Admitted(fact.builder, 0, 0.0, closed=True)
                if old.spec != fact.builder:
                    self.gone[old.spec] = self.now
                self._heard(fact.builder.id, replace(old, spec=fact.builder), fact)
            case f.BuilderRefreshed():
                self._heard(fact.builder, self.builders[fact.builder], fact)
            case f.BuilderQuarantined():
                here = self.builders[fact.builder]
                must(not here.quarantined, "a quarantine begins once", fact)
                most = 1 if here.probation else self.limits.quarantine_after
                must(fact.for_unfitness or len(here.strikes) >= most, "a builder is in quarantine for a reason", fact)
                must(self.now < fact.until <= self.now + 900.0, "a quarantine is bounded", fact)
                here.quarantined, here.probation = True, True
                self.quarantines[fact.builder] = fact.until
            case f.QuarantineEnded():
                here = self.builders[fact.builder]
                must(here.quarantined, "only a quarantine ends", fact)
                here.quarantined, here.strikes, here.suspicions = False, set(), set()
                del self.quarantines[fact.builder]
            case f.BuilderRemoved():
                held = [key for key, life in self.steps.items() if life.holder == fact.builder and not life.built]
                must(not held, "a builder is removed after its leases are revoked", fact)
                if fact.builder in self.builders:
                    self.gone[self.builders.pop(fact.builder).spec] = self.now
                self.quarantines.pop(fact.builder, None)
            case _:
                pass

    def _judge_withdrawal(self, fact: f.SubmissionWithdrawn) -> None:
        """A submission ends before its steps only as its terms say."""
        must, terms = self._must, self.terms[fact.submission]
        must(fact.why is Withdrawal.CANCELLED or not self._has_ended(fact.submission), "what has ended ends once", fact)
        match fact.why:
            case Withdrawal.DEADLINE:
                must(0 < terms.deadline <= self.now, "no deadline is early", fact)
            case Withdrawal.FAIL_FAST:
                failed = fact.submission in self.fallen
                must(terms.fail_fast and failed, "only what fails fast and has failed ends so", fact)
                self.failed_fast.add(fact.submission)
            case Withdrawal.SUPERSEDED:
                newer = self.terms[fact.by] if fact.by else Terms()
                same = (newer.owner, newer.lineage) == (terms.owner, terms.lineage) and bool(terms.lineage)
                must(
                    same and self.submissions[fact.by or fact.submission], "a newer one of its lineage supersedes", fact
                )
            case Withdrawal.CANCELLED:
                pass

    def _has_ended(self, submission: SubmissionId) -> bool:
        return not self.waiting[submission] and submission not in self.open

    def _newborn(self, key: StepKey, recipes: list[Recipe]) -> Life:
        return Life(recipes, attempt=self.attempts.get(key, 0), since=self.now)

    def granted(self, key: StepKey) -> int:
        """Return the last attempt of a step, forgotten or not."""
        life = self.steps.get(key)
        return self.attempts.get(key, 0) if life is None else life.attempt

    def _wait(self, fact: f.SubmissionAccepted | f.SubmissionRetried) -> None:
        self.roots[fact.submission] = set(fact.roots)
        self.terms[fact.submission] = fact.terms
        self.submissions[fact.submission] = True
        self.failed_fast.discard(fact.submission)
        self.fallen.discard(fact.submission)
        if any(self.steps[key].over and not self.steps[key].done for key in fact.roots):
            self.fallen.add(fact.submission)
        self.patience[fact.submission] = (self.limits.give_up_s if fact.wait_s is None else fact.wait_s) or inf
        self.waiting[fact.submission] = {key for key in fact.roots if not self.steps[key].over}

    def _grew(self, fact: f.SubmissionGrew) -> None:
        must, members = self._must, self.open.get(fact.submission)
        must(members is not None, "only what is open grows", fact)
        assert members is not None
        new = set(fact.members) - set(fact.before)
        must(not new & members and set(fact.before) <= members, "each step is counted once", fact)
        must(len(set(fact.members)) == len(fact.members), "each new member is named once", fact)
        must(not self.roots[fact.submission] & set(fact.roots), "a root comes once", fact)
        must(set(fact.held) == {key for key in new if self.steps[key].done}, "held members are done", fact)
        must(set(fact.joined) <= new, "what is joined is new", fact)
        members |= new
        must(set(fact.roots) <= members, "the roots are members", fact)
        below = [key for key in fact.members if not self.steps[key].over]
        needs = {need for key in below for need in self.steps[key].recipes[self.steps[key].active].needs}
        must(needs <= members, "what is needed is a member", fact)
        self.roots[fact.submission] |= set(fact.roots)
        self.waiting[fact.submission] |= {key for key in fact.roots if not self.steps[key].over}

    def _over(self, key: StepKey) -> None:
        self.steps[key].over = True
        for submission, waiting in self.waiting.items():
            if key in waiting:
                waiting.discard(key)
                if not self.steps[key].done:
                    self.fallen.add(submission)

    def _forget(self, fact: f.StepsForgotten) -> None:
        for key in fact.steps:
            life = self.steps.pop(key)
            self._must(life.holder is None, "a step with an open lease is not forgotten", fact)
            self._must(not self._is_known(life), "a known failure is not forgotten", fact)
            self._must(not any(key in roots for roots in self.roots.values()), "a root is not forgotten", fact)
            self.attempts[key] = life.attempt
        gone = set(fact.steps)
        named = {need for life in self.steps.values() for recipe in life.recipes for need in recipe.needs}
        self._must(not gone & named, "what a known step may need is not forgotten", fact)

    def _heard(self, name: BuilderId, here: Admitted, fact: f.BuilderAdmitted | f.BuilderRefreshed) -> None:
        closed = fact.draining or bool(fact.unfit)
        self.builders[name] = replace(here, capacity=fact.capacity, heard=fact.at, closed=closed)

    def _strike(self, fact: f.LeaseRevoked | f.StepFailed, life: Life) -> None:
        here = self.builders.get(fact.builder)
        kind = fact.failure.kind
        if here is not None and not life.built and kind in FAULTS - BLAMELESS:
            step = fact.step if isinstance(fact, f.StepFailed) else fact.lease.step
            if not fact.failure.signature and kind is not FailureKind.CONNECTION_LOST:
                here.strikes.add(step)
            elif step not in here.strikes:
                here.suspicions.add(step)

    def _acquit(self, step: StepKey, failure: Failure) -> None:
        if failure.kind not in FAULTS:
            for here in self.builders.values():
                here.suspicions.discard(step)

    def _is_known(self, life: Life) -> bool:
        return (
            life.failed is not None
            and life.failed.kind in REMEMBERED
            and not life.gained_recipe
            and self.now - life.failed_at < self.limits.failure_ttl_s
        )

    def after_call(self) -> None:
        """Judge what must hold between two calls: nobody who has earned a quarantine goes without."""
        self.just_held = []
        for submission, terms in self.terms.items():
            live = self.submissions.get(submission, False) and not self._has_ended(submission)
            if live and terms.fail_fast and submission in self.fallen:
                raise OracleError(f"{submission} fails fast, has failed and goes on")
            if live and 0 < terms.deadline <= self.now:
                raise OracleError(f"{submission} goes on after its deadline")
        for name, here in self.builders.items():
            earned = len(here.strikes) >= (1 if here.probation else self.limits.quarantine_after)
            if earned and not here.quarantined and not here.closed:
                raise OracleError(f"{name} has failed {len(here.strikes)} steps in a row and is still trusted")

    def _open(self, fact: f.Fact, key: StepKey, attempt: int, builder: BuilderId | None) -> Life:
        life = self.steps[key]
        self._must(life.holder is not None and life.attempt == attempt, "only an open lease ends", fact)
        self._must(builder in (None, life.holder), "only the holder's word ends a lease", fact)
        return life

    def _given_up(self, fact: f.StepFailed | f.StepFellBack, life: Life) -> None:
        """A step ends without a lease only where no builder could take it for as long as somebody would wait."""
        must, recipe = self._must, life.recipes[life.active]
        must(fact.failure.kind is FailureKind.NO_WORKER, "what has no lease only ends for want of a builder", fact)
        must(life.holder is None and not life.over, "what is given up is not built and not over", fact)
        must(all(self.steps[need].done for need in recipe.needs), "only what could be built is given up", fact)
        able = [here for here in self.builders.values() if _offers(here.spec, recipe.requirements)]
        must(not able, "nothing is given up that a builder could take", fact)
        since = max(self.began, life.since, *(self.gone[x] for x in self.gone if _offers(x, recipe.requirements)), 0.0)
        patience = max((self.patience[name] for name in self.waiting if self._stands_on(name, fact.step)), default=0.0)
        must(since + patience <= self.now, "nothing is given up while a submission has patience left", fact)

    def _stands_on(self, submission: SubmissionId, key: StepKey) -> bool:
        pending = list(self.waiting[submission])
        seen = set(pending)
        while pending:
            life = self.steps[pending.pop()]
            needs = life.recipes[life.active].needs if life.recipes and not life.over else ()
            pending += [need for need in needs if need not in seen]
            seen.update(needs)
        return key in seen

    def _leased(self, fact: f.StepLeased) -> None:
        life = self.steps[fact.lease.step]
        self._must(life.holder is None, "no step is leased while another lease of it is open", fact)
        self._must(fact.lease.attempt > life.attempt, "attempts strictly increase", fact)
        self._must(not life.done, "a done step is not built again", fact)
        self._must(fact.recipe == life.active, "the recipe in use is built", fact)
        recipe = life.recipes[fact.recipe]
        life.follows = {need for need in recipe.needs if not self.steps[need].done}
        here = all(self.steps[need].holder == fact.builder for need in life.follows)
        self._must(here, "what is leased before its needs are done follows them where they are built", fact)
        self._must(fact.builder in self.builders, "only builders that joined get leases", fact)
        admitted = self.builders[fact.builder]
        spec = admitted.spec
        wanted = recipe.requirements
        self._must(_offers(spec, wanted), "the builder offers what the recipe requires", fact)
        self._must(spec.takes_successors or not life.follows, "only builders that can take leases early do", fact)
        life.holder = fact.builder
        running = [other for other in self.steps.values() if other.holder == fact.builder and not other.built]
        followers = [other for other in running if self._runs(other.follows)]
        held = len(running) - len(followers) - (not self._runs(life.follows))
        if self._runs(life.follows):
            places = [need for other in followers for need in self._runs(other.follows)]
            self._must(len(places) == len(set(places)), "one lease follows another at most", fact)
            idle = any(self._runs(self.steps[need].follows) for need in places)
            self._must(not idle, "no lease follows one that does not run", fact)
        else:
            self._must(held < admitted.capacity, "no builder is given more than its capacity", fact)
        self._must(not admitted.closed, "a builder that drains or is unfit is given nothing", fact)
        self._must(not admitted.quarantined, "a builder in quarantine is given nothing", fact)
        self._must(not (admitted.probation and held), "a builder on probation is given one lease", fact)
        life.attempt = fact.lease.attempt

    def _runs(self, keys: Iterable[StepKey]) -> list[StepKey]:
        return [key for key in keys if self.steps[key].holder is not None and not self.steps[key].built]

    def _none_follows(self, fact: f.Fact, key: StepKey) -> None:
        follows = any(key in life.follows for life in self.steps.values())
        self._must(not follows, "a lease that others follow ends after theirs", fact)

    def take_effects(self, effects: Iterable[Effect]) -> None:
        """Judge what the shell is told to do, after the facts of the call."""
        for effect in effects:
            if isinstance(effect, PublishOutputs) and self.steps[effect.lease.step].follows:
                raise OracleError(f"{effect.lease} is published before what it follows")


def _offers(spec: BuilderSpec, wanted: Requirements) -> bool:
    return (
        wanted.system in spec.systems | {"builtin"}
        and set(wanted.features) <= spec.features
        and spec.mandatory <= set(wanted.features)
    )
