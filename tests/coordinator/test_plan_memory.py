"""Memory of plans: what is forgotten when steps gain recipes, and what that costs."""

from __future__ import annotations

import pytest

from coordinator.intake import plan_memory
from coordinator.intake.graph import Graph, Planned
from coordinator.intake.plan_memory import PlanKey, PlanMemory, RememberedPlan
from coordinator.intake.planning import Recipes
from coordinator.stores.derivation_records import Kind, Node
from scheduler.model import StepKey


class CountedName(str):
    """A name of a step that counts how often one of all is looked up."""

    __slots__ = ()
    hashed = 0

    def __hash__(self) -> int:
        CountedName.hashed += 1
        return super().__hash__()


def key(name: str) -> PlanKey:
    return (f"{name}.drv",), (), True


def plan(*names: str) -> RememberedPlan:
    """Return a plan of one step for each name."""
    nodes = {
        f"{name}.drv": Node(f"{name}.drv", StepKey(name), Kind.FIXED, "x86_64-linux", (), (("out", name),), ())
        for name in names
    }
    recipes = Recipes({StepKey(name): [f"{name}.drv"] for name in names}, ())
    return RememberedPlan(Graph(nodes, tuple(nodes), recipes), set(), "lease", 0, Planned((), (), (), ()))


def test_the_plans_of_a_step_that_gained_a_recipe_are_forgotten_and_no_others() -> None:
    memory = PlanMemory()
    for name in ("one", "two"):
        memory.keep(key(name), plan(name, "both", f"only-{name}"), memory.recipe_changes)
    assert memory.forget_steps({StepKey("other")}) == []
    assert memory.forget_steps({StepKey("only-one"), StepKey("other")})
    assert [memory.find(key(name)) is None for name in ("one", "two")] == [True, False]
    assert memory.forget_steps({StepKey("both")})
    assert memory.find(key("two")) is None


def test_a_plan_of_before_a_step_gained_a_recipe_is_not_remembered() -> None:
    memory = PlanMemory()
    before = memory.recipe_changes
    memory.forget_steps({StepKey("step")})
    memory.keep(key("step"), plan("step"), before)
    assert memory.find(key("step")) is None
    memory.keep(key("step"), plan("step"), memory.recipe_changes)
    assert memory.find(key("step")) is not None


def test_a_plan_that_is_larger_than_all_room_drives_no_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_memory, "MAX_REMEMBERED", 3)
    memory = PlanMemory()
    memory.keep(key("small"), plan("small"), memory.recipe_changes)
    memory.keep(key("large"), plan("a", "b", "c", "d"), memory.recipe_changes)
    assert [memory.find(key(name)) is None for name in ("small", "large")] == [False, True]
    memory.keep(key("fits"), plan("a", "b", "c"), memory.recipe_changes)
    assert [memory.find(key(name)) is None for name in ("small", "fits")] == [True, False]


def test_at_rest_the_plans_that_were_used_last_are_kept_as_far_as_they_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_memory, "KEPT_AT_REST", 3)
    memory = PlanMemory()
    for name in ("old", "used", "new"):
        memory.keep(key(name), plan(name, f"{name}-2"), memory.recipe_changes)
    memory.find(key("used"))
    assert memory.rest()
    assert [memory.find(key(name)) is None for name in ("old", "used", "new")] == [True, False, True]
    assert memory.rest() == []


def test_many_new_recipes_are_not_looked_up_in_each_of_many_small_plans() -> None:
    memory = PlanMemory()
    for number in range(100):
        memory.keep(key(f"{number}"), plan(f"a-{number}", f"b-{number}"), memory.recipe_changes)
    changed = {StepKey(CountedName(f"new-{number}")) for number in range(1000)}
    before = CountedName.hashed
    assert memory.forget_steps(changed) == []
    assert CountedName.hashed - before <= len(changed)
