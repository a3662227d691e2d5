"""Judgement of wishes: pure functions from what was found out to a plan.

Rules, of which the first that holds counts:

1. `here`, `upstream`: the whole closure of every output can be fetched. 2. `building`: a submission wants its step.
3. `failed`: its step, or one that it stands on, is known to fail. 4. `unfree`, `insecure`, `broken`, `unsupported`: Nix
refuses it. 5. `unknown`: a member of its closure was not looked up in time. 6. `gone`: it can only be copied.
7. `no_worker`: no worker builds a step of it. 8. `buildable`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from coordinator.api.plan_models import PlanState, PlanView, SystemPlan, UpstreamPlan, WishPlan
from coordinator.intake.forecast import BuildCost, PlannedStep
from coordinator.plans.closures import HERE, Closures, ClosureSurvey, Reach, extents
from coordinator.wishes.model import Wish, WishedAttribute, WishedDerivation, WishedPaths, WishList, WishMark
from infra.nix.store_path import HASH_PART_LENGTH, base_name_of, drv_name_of, package_of
from scheduler.model import Requirements, StepKey

#: Steps that are gone through for all wishes together; of a wish beyond them its own step alone counts.
MAX_VISITS: Final = 1_000_000
_MARKS: Final[tuple[tuple[WishMark, PlanState], ...]] = (
    (WishMark.UNFREE, "unfree"),
    (WishMark.INSECURE, "insecure"),
    (WishMark.BROKEN, "broken"),
    (WishMark.UNSUPPORTED, "unsupported"),
)
#: States in which a user's Nix would build.
TO_BUILD: Final = frozenset({"building", "buildable", "failed", "no_worker"})


@dataclass(frozen=True, slots=True)
class KnownFailure:
    """Root cause of a step that is known to fail."""

    cause: StepKey
    name: str
    #: Unix seconds; 0 where that is not known.
    since: float


@dataclass(frozen=True, slots=True)
class WishFacts:
    """Facts of one wish."""

    wish: Wish
    #: Full store paths of the outputs that are wanted; none where they are not known.
    paths: tuple[str, ...]
    step: StepKey | None = None
    #: The farm has its derivation.
    graphed: bool = False
    present: bool = False
    #: What its own build usually takes.
    cost: BuildCost = field(default_factory=BuildCost)


@dataclass(frozen=True, slots=True)
class FarmFacts:
    """Facts of the farm, for all wishes."""

    survey: ClosureSurvey
    #: Steps that would be built of wishes whose derivations the farm has, inputs first.
    steps: Sequence[PlannedStep] = ()
    building: frozenset[StepKey] = frozenset()
    failures: Mapping[StepKey, KnownFailure] = field(default_factory=dict)
    #: Builds at one time, by what they require.
    slots: Mapping[Requirements, int] = field(default_factory=dict)
    #: Full paths on the asker's machine.
    present: frozenset[str] = frozenset()
    upstreams: tuple[UpstreamPlan, ...] = ()


def judge(wishes: WishList, facts: Sequence[WishFacts], farm: FarmFacts) -> PlanView:
    """Return the plan of a list; `facts` are those of its wishes, in their order."""
    judge_ = _Judge(farm)
    plans = [judge_.plan(each) for each in facts]
    systems = tuple(judge_.system(system, facts, plans) for system in wishes.systems)
    return PlanView(
        digest=wishes.digest,
        wishes=tuple(plans),
        systems=systems,
        upstreams=farm.upstreams,
        notes=wishes.notes,
        unfollowed=len(farm.survey.unasked),
    )


class _Judge:
    """Judges the wishes of one list."""

    def __init__(self, farm: FarmFacts) -> None:
        self._farm = farm
        self._extents = extents(farm.survey)
        self._closures = Closures(farm.survey.located)
        self._steps = {step.key: step for step in farm.steps}
        self._order = {step.key: number for number, step in enumerate(farm.steps)}
        self._visits = 0

    def plan(self, facts: WishFacts) -> WishPlan:
        wish = facts.wish
        base = WishPlan(
            name=wish.name, system=wish.system, state="unknown", present=facts.present, step=facts.step or ""
        )
        if isinstance(wish.target, WishedAttribute):
            refused = _refused(wish)
            return replace(base, state=refused or "unevaluated", because="" if refused else "it was not evaluated")
        reach = max((self._extents.get(path, Reach.ABSENT) for path in facts.paths), default=Reach.ABSENT)
        if reach <= Reach.UPSTREAM:
            found = self._closures.members(facts.paths)
            size = sum([each.file_size for each in found])
            return replace(base, state="here" if reach is Reach.HERE else "upstream", paths=len(found), bytes=size)
        return self._not_fetchable(base, facts, reach)

    def _not_fetchable(self, base: WishPlan, facts: WishFacts, reach: Reach) -> WishPlan:
        below = self._below([facts])
        built = self._priced(base, facts, below)
        if facts.step in self._farm.building:
            lacking = self._without_worker(facts, below)
            return replace(built, state="building", because=lacking and f"{lacking}, so it waits")
        failure = self._failure(facts, below)
        if failure is not None:
            return replace(built, state="failed", cause=failure.cause, cause_name=failure.name, since=failure.since)
        refused = _refused(facts.wish)
        if refused is not None:
            return replace(built, state=refused)
        if reach is Reach.UNKNOWN:
            return replace(base, because="its closure was not looked up in time; plan again in a moment")
        target = facts.wish.target
        if isinstance(target, WishedPaths) and not (facts.graphed or target.derivation or target.installable):
            return replace(base, state="gone", because="no cache has it, and a path without derivation is only copied")
        return self._buildable(built, facts, below)

    def _buildable(self, built: WishPlan, facts: WishFacts, below: Sequence[PlannedStep]) -> WishPlan:
        lacking = self._without_worker(facts, below)
        if lacking:
            return replace(built, state="no_worker", because=lacking)
        lost = self._lost(facts) if facts.graphed and not below else ""
        return replace(built, state="buildable", because=lost and f"{base_name_of(lost)} of its closure is lost")

    def _without_worker(self, facts: WishFacts, below: Sequence[PlannedStep]) -> str:
        """Return the first requirements that no worker meets as a sentence, "" where all are met."""
        for kind in dict.fromkeys(step.kind for step in below) or {Requirements(facts.wish.system, ()): None}:
            if not self._farm.slots.get(kind, 0):
                features = f" with {', '.join(kind.features)}" if kind.features else ""
                return f"no worker builds for {kind.system}{features}"
        return ""

    def _below(self, facts: Iterable[WishFacts]) -> list[PlannedStep]:
        """Return the steps that would be built for some wishes, inputs first."""
        found: dict[StepKey, PlannedStep] = {}
        stack = [self._steps[each.step] for each in facts if each.step in self._steps]
        while stack:
            step = stack.pop()
            if step.key in found:
                continue
            found[step.key] = step
            self._visits += 1
            if self._visits <= MAX_VISITS:
                stack.extend(step.needs)
        return sorted(found.values(), key=lambda step: self._order[step.key])

    def _priced(self, base: WishPlan, facts: WishFacts, below: Sequence[PlannedStep]) -> WishPlan:
        if not facts.graphed:
            known = facts.cost.build_s
            return replace(base, build_s=known or 0.0, unknown=int(known is None))
        known_s = [step.cost.build_s for step in below if step.cost.build_s is not None]
        return replace(base, steps=len(below), build_s=sum(known_s), unknown=len(below) - len(known_s))

    def _failure(self, facts: WishFacts, below: Sequence[PlannedStep]) -> KnownFailure | None:
        keys = [step.key for step in below] or ([facts.step] if facts.step else [])
        return next((self._farm.failures[key] for key in keys if key in self._farm.failures), None)

    def _lost(self, facts: WishFacts) -> str:
        """Return a path of a closure that no cache has, though the output itself is there."""
        located = self._farm.survey.located
        lost = (ref for each in self._closures.members(facts.paths) for ref in each.references if ref not in located)
        return next(lost, "")

    def system(self, system: str, facts: Sequence[WishFacts], plans: Sequence[WishPlan]) -> SystemPlan:
        """Return all wishes for one system together, without what is on the asker's machine."""
        its = [
            (each, plan) for each, plan in zip(facts, plans, strict=True) if plan.system == system and not plan.present
        ]
        paths = [path for each, plan in its if plan.state in {"here", "upstream"} for path in each.paths]
        fetched = self._closures.members(paths, self._farm.present)
        to_build = [each for each, plan in its if plan.state in TO_BUILD]
        below = self._below(to_build)
        ungraphed = [each for each in to_build if not each.graphed]
        known = [step.cost.build_s for step in below if step.cost.build_s is not None]
        known += [each.cost.build_s for each in ungraphed if each.cost.build_s is not None]
        ours = [each for each in fetched if each.place == HERE]
        theirs = [each for each in fetched if each.place != HERE]
        return SystemPlan(
            system=system,
            counts=Counter(plan.state for _, plan in its),
            present=sum(plan.system == system and plan.present for plan in plans),
            here_paths=len(ours),
            here_bytes=sum(each.file_size for each in ours),
            upstream_paths=len(theirs),
            upstream_bytes=sum(each.file_size for each in theirs),
            unpacked_bytes=sum(each.nar_size for each in fetched),
            steps=len(below) + len(ungraphed),
            build_s=sum(known),
            unknown=len(below) + len(ungraphed) - len(known),
            ungraphed=len(ungraphed),
            slots=self._farm.slots.get(Requirements(system, ()), 0),
        )


def _refused(wish: Wish) -> PlanState | None:
    return next((state for mark, state in _MARKS if mark in wish.marks), None)


def package_key(wish: Wish) -> tuple[str, str]:
    """Return package and system under which the history of a wish's builds is kept."""
    target = wish.target
    name = wish.name
    if isinstance(target, WishedPaths) and target.outputs:
        name = base_name_of(target.outputs[0].path)[HASH_PART_LENGTH + 1 :]
    elif isinstance(target, WishedDerivation):
        name = drv_name_of(target.path)
    return package_of(name), wish.system
