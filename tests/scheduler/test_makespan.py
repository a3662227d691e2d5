"""The simulation of `bench makespan`: what it measures of a rebuild."""

from __future__ import annotations

from coordinator.learning.learned import learn
from coordinator.learning.works import TimedBuild, WorkKind
from tests.benchmarks.makespan import CoreRebuild
from tests.benchmarks.makespan_work import ONE_SYSTEM, Machine, Rebuild, shape_of

SLOW, FAST = (Machine(name, ONE_SYSTEM, speed, 1) for name, speed in (("slow", 0.5), ("fast", 2.0)))
#: Enough packages that both have built to know how fast they are.
BEFORE = [
    TimedBuild(f"package{number}", ONE_SYSTEM, machine.name, 60 / machine.speed)
    for number in range(40)
    for machine in (SLOW, FAST)
]


def test_a_rebuild_ends_with_its_last_step_whatever_a_build_that_moved_would_have_taken() -> None:
    shape = shape_of(("low", "top", "long"), (WorkKind.BUILD,) * 3, ((), (0,), ()))
    rebuild = Rebuild(shape, (300.0, 100.0, 3600.0), (0.0, 0.0, 0.0), (SLOW, FAST))
    played = CoreRebuild(rebuild, learn(BEFORE), BEFORE).run()
    assert played.moves == 1
    # Two hours are what the long one would have taken where it began.
    assert played.makespan_s == played.ends["owner0"] < 3600 / SLOW.speed
