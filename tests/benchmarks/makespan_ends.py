"""Ends that are foreseen while a simulated rebuild runs, as the coordinator foresees them, against when it ended."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.learning.learned import Learned
from coordinator.learning.works import WorkKind
from coordinator.readmodel.estimate import BuildPace, Expected, Outlook, estimating, rest_of
from scheduler.farm import Farm
from scheduler.model import Requirements, StepState
from scheduler.pauses import whole
from scheduler.records import Step
from tests.benchmarks.makespan_work import Rebuild

#: Looks at a rebuild, after equal numbers of builds.
LOOKS = 8
_ME = ("me",)


@dataclass(frozen=True, slots=True)
class ForeseenEnd:
    """One look. `later_at` is None where the end was unknown."""

    at: float
    sooner_at: float
    later_at: float | None


@dataclass
class ForeseenEnds:
    """Looks at one rebuild."""

    rebuild: Rebuild
    looks: list[ForeseenEnd] = field(default_factory=list)

    def is_due(self, ended: int) -> bool:
        """Return whether it is time for another look after so many builds."""
        return len(self.looks) < LOOKS and ended >= len(self.looks) * len(self.rebuild.works) // LOOKS

    def look(self, farm: Farm, learned: Learned, now: float) -> None:
        """Foresee the end of all that is open, by what is learned by now."""
        shape, paces = self.rebuild.shape, {}
        for system in set(shape.systems):
            speeds = farm.speeds(Requirements(system))
            slots = {each.name: each.slots for each in self.rebuild.fleet}
            paces[system] = BuildPace.of((slots[name], speed) for name, speed in speeds.items())

        def outlook(step: Step) -> Outlook[str] | None:
            if not step.engaged or step.state is StepState.DONE:
                return None
            number, kind = int(step.key[:8], 16), step.recipe.requirements
            between = learned.between(shape.packages[number], kind.system, shape.kinds[number])
            expected = None if between is None else Expected(*between)
            if step.state is not StepState.LEASED:
                return Outlook(_ME, kind, rest_of(expected, paces[kind.system].mean, None)[0])
            speed = farm.state.builders[step.builder].speed(kind.system)
            return Outlook(_ME, kind, *rest_of(expected, speed, now - step.asked_at))

        steps = list(farm.state.steps.values())
        found = whole(
            estimating(
                steps,
                outlook,
                lambda kind: paces[kind.system].slots,
                _ME,
                lead=lambda kind: paces[kind.system].lead,
                surprise=learned.longest_of,
                usual_s=learned.kinds.get(WorkKind.BUILD, 0.0),
            )
        )
        if "me" in found:
            estimate = found["me"]
            later_at = None if estimate.later_s is None else now + estimate.later_s
            self.looks.append(ForeseenEnd(now, now + estimate.sooner_s, later_at))


def judged(looks: Sequence[ForeseenEnd], end: float) -> dict[str, float]:
    """Return which part of the looks knew an end, which part of these had it inside, and how wide they were."""
    known = [each for each in looks if each.later_at is not None]
    inside = [each for each in known if each.later_at is not None and each.sooner_at <= end <= each.later_at]
    widths = [(each.later_at - each.sooner_at) / (end - each.at) for each in known if each.later_at and end > each.at]
    return {
        "ends known": len(known) / len(looks) if looks else 0.0,
        "ends inside": len(inside) / len(known) if known else 0.0,
        "width of the rest": statistics.median(widths) if widths else 0.0,
    }
