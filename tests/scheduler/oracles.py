"""Judges that see only what the farm said, never its state: they cannot share the machine's mistakes.

`judge(facts)` reads a whole stream of facts, those about builders included, and raises `OracleError` with the first
sentence below that does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from scheduler import facts as f
from scheduler.failures import is_fault
from scheduler.model import BuilderId, BuilderSpec, FailureKind, Recipe, StepKey, SubmissionId


class OracleError(AssertionError):
    """A journal that must not be."""


@dataclass
class Life:
    """One step as its facts tell it."""

    recipes: list[Recipe] = field(default_factory=list)
    active: int = 0
    proven: set[int] = field(default_factory=set)
    attempt: int = 0
    holder: BuilderId | None = None
    built: bool = False
    done: bool = False
    failed: bool = False
    faults: int = 0
    returns: int = 0

    def renew(self) -> None:
        self.proven, self.faults, self.returns, self.done, self.failed = set(), 0, 0, False, False

    def close(self) -> None:
        self.holder, self.built = None, False


@dataclass
class Admitted:
    """A builder as the facts tell it."""

    spec: BuilderSpec
    capacity: int
    heard: float


class Judge:
    """Takes facts one by one."""

    def __init__(self, attempts: int, returns: int) -> None:
        self.attempts = attempts
        self.returns = returns
        self.steps: dict[StepKey, Life] = {}
        self.builders: dict[BuilderId, Admitted] = {}
        self.submissions: set[SubmissionId] = set()

    def _must(self, holds: bool, sentence: str, fact: f.Fact) -> None:
        if not holds:
            raise OracleError(f"{sentence}: {fact}")

    def take(self, fact: f.Fact) -> None:  # noqa: C901, PLR0912  one arm per fact
        must = self._must
        match fact:
            case f.SubmissionAccepted():
                must(fact.submission not in self.submissions, "a submission is accepted once", fact)
                self.submissions.add(fact.submission)
                must(set(fact.roots) <= set(fact.members), "the roots are members", fact)
                must(set(fact.held) == {k for k in fact.members if self.steps[k].done}, "held members are done", fact)
            case f.SubmissionWithdrawn():
                must(fact.submission in self.submissions, "only what was accepted is withdrawn", fact)
            case f.StepAdded():
                must(fact.spec.key not in self.steps, "a step is added once", fact)
                self.steps[fact.spec.key] = Life(list(fact.spec.recipes))
            case f.RecipeAdded():
                must(fact.recipe not in self.steps[fact.step].recipes, "a recipe is new", fact)
                self.steps[fact.step].recipes.append(fact.recipe)
            case f.StepHeld():
                life = self.steps.setdefault(fact.step, Life())
                must(life.holder is None, "a held step has no open lease", fact)
                life.done, life.failed = True, False
            case f.StepRevived() | f.StepLost():
                life = self.steps[fact.step]
                must(life.done == isinstance(fact, f.StepLost), "what is done is lost, what is not is revived", fact)
                life.renew()
                life.active = fact.recipe if isinstance(fact, f.StepRevived) else life.active
            case f.StepLeased():
                self._leased(fact)
            case f.LeaseRevoked():
                life = self._open(fact, fact.lease.step, fact.lease.attempt, fact.builder)
                life.faults += is_fault(fact.failure.kind)
                life.returns += fact.failure.kind is FailureKind.RETURNED
                must(life.faults < self.attempts, "infrastructure faults are bounded", fact)
                must(life.returns <= self.returns, "returned leases are bounded", fact)
                life.close()
            case f.StepBuilt():
                life = self._open(fact, fact.lease.step, fact.lease.attempt, fact.builder)
                must(not life.built, "a lease is built once", fact)
                life.built = True
            case f.StepDone():
                life = self._open(fact, fact.lease.step, fact.lease.attempt, None)
                must(life.built, "a step is done only after it was built by the same attempt", fact)
                life.close()
                life.done = True
            case f.StepFellBack():
                life = self.steps[fact.step]
                life.proven.add(life.active)
                must(fact.recipe not in life.proven, "a recipe proven failing is not tried again in a life", fact)
                life.active, life.faults = fact.recipe, 0
                life.close()
            case f.StepFailed():
                life = self._open(fact, fact.step, fact.attempt, fact.builder)
                life.failed = True
                life.close()
            case f.StepDoomed():
                must(self.steps[fact.cause].failed, "the cause of a doom has itself failed", fact)
                must(self.steps[fact.step].holder is None, "a doomed step has no open lease", fact)
            case f.StepAbandoned():
                must(self.steps[fact.step].holder is None, "an abandoned step has no open lease", fact)
            case f.BuilderAdmitted():
                self.builders[fact.builder.id] = Admitted(fact.builder, fact.capacity, fact.at)
            case f.BuilderRefreshed():
                self.builders[fact.builder] = Admitted(self.builders[fact.builder].spec, fact.capacity, fact.at)
            case f.BuilderRemoved():
                held = [key for key, life in self.steps.items() if life.holder == fact.builder and not life.built]
                must(not held, "a builder is removed after its leases are revoked", fact)
                self.builders.pop(fact.builder, None)
            case _:
                pass

    def _open(self, fact: f.Fact, key: StepKey, attempt: int, builder: BuilderId | None) -> Life:
        life = self.steps[key]
        self._must(life.holder is not None and life.attempt == attempt, "only an open lease ends", fact)
        self._must(builder in (None, life.holder), "only the holder's word ends a lease", fact)
        return life

    def _leased(self, fact: f.StepLeased) -> None:
        life = self.steps[fact.lease.step]
        self._must(life.holder is None, "no step is leased while another lease of it is open", fact)
        self._must(fact.lease.attempt > life.attempt, "attempts strictly increase", fact)
        self._must(not life.done, "a done step is not built again", fact)
        self._must(fact.recipe == life.active, "the recipe in use is built", fact)
        recipe = life.recipes[fact.recipe]
        self._must(all(self.steps[need].done for need in recipe.needs), "all needs are done before a lease", fact)
        self._must(fact.builder in self.builders, "only builders that joined get leases", fact)
        admitted = self.builders[fact.builder]
        spec = admitted.spec
        wanted = recipe.requirements
        offered = (
            wanted.system in spec.systems | {"builtin"}
            and set(wanted.features) <= spec.features
            and spec.mandatory <= set(wanted.features)
        )
        self._must(offered, "the builder offers what the recipe requires", fact)
        held = sum(other.holder == fact.builder and not other.built for other in self.steps.values())
        self._must(held < admitted.capacity, "no builder is given more than its capacity", fact)
        life.attempt, life.holder = fact.lease.attempt, fact.builder


def judge(facts: Iterable[f.Fact], attempts: int = 5, returns: int = 50) -> Judge:
    """Judge a stream from its beginning."""
    bench = Judge(attempts, returns)
    for fact in facts:
        bench.take(fact)
    return bench
