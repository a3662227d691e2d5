"""One seed, one life of a farm: random graphs and a swarm of faults chosen per seed, then a settlement.

Run as a program it plays many seeds: `python -m tests.scheduler.simulation FIRST COUNT`.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from typing import TypeVar

from scheduler.events import WorksEstimated
from scheduler.model import FailureKind, Recipe, StepKey, StepSpec
from scheduler.policy import Limits
from tests.scheduler.kit import recipe
from tests.scheduler.world import CLASSES, World

T = TypeVar("T")
STEPS = 14
OPERATIONS = 120
#: What steps are expected to take, 0 where that is not known; and how often, by operations, something else is.
WORKS_MS = (0, 1, 20_000, 3_600_000)
REVISIONS = 0.1
MEMORIES = (0, 0, 2, 5, 20)


def random_graph(chance: random.Random, alternatives: float) -> dict[StepKey, StepSpec]:
    """First recipes need only earlier steps; further ones anything else, so that they can lead back."""
    keys = [StepKey(f"n{index:02}") for index in range(STEPS)]
    graph: dict[StepKey, StepSpec] = {}
    for index, key in enumerate(keys):
        system, features = chance.choice(CLASSES)
        below = chance.sample(keys[:index], min(index, chance.randrange(4)))
        recipes: list[Recipe] = [recipe(*below, system=system, features=features)]
        while chance.random() < alternatives and len(recipes) < 4:
            # Mostly later ones: they stand on this step, perhaps, and would lead back to it.
            others = keys[index + 1 :] if chance.random() < 0.7 else keys[:index]
            system, features = chance.choice(CLASSES)
            recipes.append(
                recipe(*chance.sample(others, min(len(others), chance.randrange(3))), system=system, features=features)
            )
        graph[key] = StepSpec(key, tuple(dict.fromkeys(recipes)))
    return graph


def with_work(graph: dict[StepKey, StepSpec], chance: random.Random) -> dict[StepKey, StepSpec]:
    """The same steps, most of which are known to take a moment or an hour, and some little or much memory."""
    return {
        key: replace(spec, work_ms=chance.choice(WORKS_MS), memory_bytes=chance.choice(MEMORIES))
        for key, spec in graph.items()
    }


def only_first(graph: dict[StepKey, StepSpec]) -> dict[StepKey, StepSpec]:
    return {key: replace(spec, recipes=spec.recipes[:1]) for key, spec in graph.items()}


def play(seed: int) -> World:
    """Play one seed to its settlement; raises whatever a check finds."""
    chance = random.Random(seed)
    limits = Limits(failure_ttl_s=chance.choice([0.0, 60.0, 24 * 3600.0]), quarantine_after=chance.choice([1, 3, 1000]))
    # Chance of its own, as for forgetting below: half of the seeds know nothing of works and speeds.
    learning = random.Random(f"learning {seed}")
    learned = learning.random() < 0.5
    speeds = learning.choice([(1.0, 4.0, 0.5), (3.0, 1.0, 9.0)]) if learned else ()
    memories = learning.choice([(8, 8, 4), (5, 0, 0), ()]) if learned else ()
    # Chance of its own likewise: half of the seeds stay what they were before leases could follow others.
    succession = random.Random(f"succession {seed}").random() < 0.5
    world = World(limits, speeds=speeds, memories=memories, succession=succession)
    graph = random_graph(chance, chance.choice([0.0, 0.3, 0.6]))
    if learned:
        graph = with_work(graph, learning)
    plain = only_first(graph)
    # Other farms, or earlier lives of this one, have filled the cache.
    world.cache.update(key for key in graph if chance.random() < chance.choice([0.0, 0.2]))
    # Swarm testing: each seed has some faults often and others never.
    faults = {
        name: chance.choice([0.0, 0.1, 0.4]) for name in ("lose", "twice", "late", "publish", "break", "unfit", "retry")
    }
    weights = {operation: chance.choice([0, 1, 3]) for operation in (_kill, _start, _restart, _forget, _cancel)}
    weights |= {_submit: 2, _post: 12, _order: 10, _finish: 8, _heartbeat: 3, _sleep: 2}
    # Chance of its own: half of the seeds stay what they were before submissions could be forgotten.
    forgetting = random.Random(f"forgetting {seed}")
    forgetful = forgetting.choice([0.0, 0.0, 0.05, 0.2])
    for _ in range(OPERATIONS):
        if world.submitted and forgetting.random() < forgetful:
            world.expire(_pick(forgetting, world.submitted))
        if learned and learning.random() < REVISIONS:
            world.call(
                WorksEstimated(tuple((key, learning.choice(WORKS_MS)) for key in learning.sample(list(graph), 3)))
            )
        operation = chance.choices(list(weights), list(weights.values()))[0]
        operation(world, chance, graph if chance.random() < 0.7 else plain, faults)
    world.settle()
    world.restart()
    return world


def _pick(chance: random.Random, items: list[T]) -> T:
    return items[chance.randrange(len(items))]


def _kill(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    world.kill(_pick(chance, list(world.agents.values())), seen=chance.random() < 0.5)


def _start(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    world.start(_pick(chance, list(world.agents.values())))


def _restart(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    if chance.random() < 0.3:
        world.restart()


def _forget(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    if world.cache:
        world.cache.discard(_pick(chance, sorted(world.cache)))


def _cancel(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    if world.submitted:
        world.cancel(_pick(chance, world.submitted))


def _submit(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    roots = chance.sample(list(graph), chance.randrange(1, 4))
    if world.submitted and chance.random() < faults["retry"]:
        world.retry(_pick(chance, world.submitted), graph)
        return
    retry = chance.random() < faults["retry"]
    world.submit(roots, graph, later=chance.random() < faults["late"], blind=chance.random() < 0.2, retry=retry)


def _post(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    if world.mail:
        late = chance.random() < faults["late"]
        world.post(chance.randrange(len(world.mail)) if late else 0, twice=chance.random() < faults["twice"])


def _order(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    if world.orders:
        kinds = [FailureKind.PERMANENT, FailureKind.INFRASTRUCTURE]
        fails = chance.choice(kinds) if chance.random() < faults["publish"] else None
        world.order(chance.randrange(len(world.orders)), lose=chance.random() < faults["lose"], publish_fails=fails)


def _finish(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    busy = [agent for agent in world.agents.values() if agent.leases]
    if busy:
        agent = _pick(chance, busy)
        kinds = [*[FailureKind.PERMANENT] * 8, *[FailureKind.INFRASTRUCTURE] * 4, *FailureKind]
        kind = chance.choice(kinds) if chance.random() < faults["break"] else None
        world.finish(agent, _pick(chance, agent.leases), kind)


def _heartbeat(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    odd = chance.random() < faults["unfit"]
    world.heartbeat(
        _pick(chance, list(world.agents.values())),
        chance.choice([None, None, 0, 1]),
        draining=odd and chance.random() < 0.5,
        unfit="disk" if odd and chance.random() < 0.5 else "",
    )


def _sleep(world: World, chance: random.Random, graph: dict[StepKey, StepSpec], faults: dict[str, float]) -> None:
    deadline = world.farm.deadline()
    exact = deadline is not None and chance.random() < 0.3
    world.sleep(max(0.0, deadline - world.now) if exact and deadline is not None else chance.choice([0.1, 3, 20, 130]))


def main() -> int:
    """Play seeds and name the first that fails."""
    first, count = int(sys.argv[1]), int(sys.argv[2])
    for seed in range(first, first + count):
        try:
            play(seed)
        except Exception as error:
            raise SystemExit(f"seed {seed}: {type(error).__name__}: {error}") from error
    print(f"{count} seeds from {first} hold")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
