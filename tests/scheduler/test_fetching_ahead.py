"""Hints to fetch ahead: for which step, to whom, and what follows where another builder has room first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler import events as e
from scheduler.effects import Effect, FetchAhead
from scheduler.fetching_ahead import LOOK_EVERY_S, OVERTAKEN_S
from scheduler.model import StepSpec
from scheduler.policy import Limits
from tests.scheduler.kit import LINUX, Scene, built, cancel, join, report, step, submit
from tests.scheduler.test_locality import large
from tests.scheduler.test_placement import holders, measured, work


def hints(effects: list[Effect]) -> list[tuple[str, str]]:
    return [(effect.step, effect.builder) for effect in effects if isinstance(effect, FetchAhead)]


class Busy:
    """A farm whose builders of one slot each build something, and large results that none of them has."""

    def __init__(self, *minutes: float) -> None:
        self.scene = Scene(Limits(lease_ttl_s=1e9))
        self.names = [f"b{number}" for number in range(len(minutes))]
        for name, takes in zip(self.names, minutes, strict=True):
            self.scene.play(join(name), submit(f"of {name}", [f"busy {name}"], work(step(f"busy {name}"), takes)))
        large_ones = [large(step(f"big {number}")) for number in range(4)]
        self.scene.play(
            submit("bigs", [each.key for each in large_ones], *large_ones, held=[each.key for each in large_ones])
        )

    def ask(self, *steps: StepSpec, name: str = "s", at: float | None = None) -> list[tuple[str, str]]:
        """Submit steps that need large results; return the hints."""
        held = sorted({need for spec in steps for need in spec.recipes[0].needs})
        return self.play(submit(name, [spec.key for spec in steps], *steps, held=held), at=at)

    def play(self, *events: e.Event, at: float | None = None) -> list[tuple[str, str]]:
        """Play events later than the last look, or at an instant."""
        self.scene.now = self.scene.now + 2 * LOOK_EVERY_S if at is None else at
        _, effects = self.scene.play(*events)
        return hints(effects)


def needing(key: str, number: int = 0, minutes: float = 1) -> StepSpec:
    return work(step(key, f"big {number}"), minutes)


def test_the_builder_that_has_room_first_fetches_for_the_step_that_is_next_and_is_told_so_once() -> None:
    farm = Busy(60, 20)
    assert farm.ask(needing("next")) == [("next", "b1")]
    assert farm.play(e.TimePassed()) == []
    # Of the second in turn the other one is told, and nothing anew to the first.
    assert farm.ask(needing("then", 1), name="t") == [("then", "b0")]
    assert farm.ask(needing("last", 2), name="u") == []
    # Its turn comes: the next one is fetched for while this one builds.
    assert farm.play(built("busy b1", "b1")) == [("last", "b1")]
    assert holders(farm.scene)["next"] == "b1"


def test_looks_are_rare_and_what_was_passed_over_is_found_by_the_next() -> None:
    farm = Busy(20)
    farm.play(e.TimePassed())
    assert farm.ask(needing("next"), at=farm.scene.now + LOOK_EVERY_S / 2) == []
    assert farm.play(e.TimePassed(), at=farm.scene.now + LOOK_EVERY_S) == [("next", "b0")]


@pytest.mark.parametrize("why", ["small", "room", "here", "draining", "other system"])
def test_nothing_is_fetched_where_it_is_no_use(why: str) -> None:
    farm = Busy(20)
    spec = needing("next")
    if why == "small":
        spec = work(step("next"), 1)
    elif why == "room":
        farm.play(report("b0", 2))
    elif why == "here":
        # What it builds has the same inputs.
        farm.play(report("b0", 2))
        farm.ask(needing("busy too"), name="t")
        assert holders(farm.scene)["busy too"] == "b0"
    elif why == "draining":
        farm.play(report("b0", 1, draining=True))
    else:
        spec = replace(needing("next"), recipes=step("next", "big 0", system="darwin").recipes)
    assert farm.ask(spec) == []


def test_a_step_that_waits_for_a_faster_builder_is_fetched_for_there() -> None:
    farm = Busy(20, 200)
    farm.play(measured(LINUX, b0=1.0, b1=4.0))
    # The slow one has room first, and the fast one ends it earlier.
    assert farm.ask(needing("next", minutes=600)) == [("next", "b1")]


def test_a_builder_that_has_room_before_the_one_that_fetched_for_the_first_in_turn_takes_what_it_fetched_for() -> None:
    farm = Busy(20, 60)
    # Equal ranks: the first that came is the first in turn.
    assert farm.ask(needing("first"), needing("second", 1)) == [("first", "b0"), ("second", "b1")]
    farm.play(built("busy b1", "b1"))
    assert holders(farm.scene)["second"] == "b1"
    farm.play(built("busy b0", "b0"))
    assert holders(farm.scene)["first"] == "b0"


@pytest.mark.parametrize("why", ["too long", "owner", "drains"])
def test_the_first_in_turn_is_not_overtaken_for_ever_nor_by_another_owner_nor_for_one_that_drains(why: str) -> None:
    farm = Busy(20, 60)
    if why == "owner":
        assert farm.ask(needing("first")) == [("first", "b0")]
        assert farm.ask(needing("second", 1), name="t") == [("second", "b1")]
    else:
        assert farm.ask(needing("first"), needing("second", 1)) == [("first", "b0"), ("second", "b1")]
    if why == "too long":
        farm.scene.now += OVERTAKEN_S
    elif why == "drains":
        farm.play(report("b0", 1, draining=True))
    farm.play(built("busy b1", "b1"))
    assert holders(farm.scene)["first"] == "b1"


def test_a_step_that_is_wanted_anew_is_fetched_for_anew() -> None:
    farm = Busy(20)
    assert farm.ask(needing("next")) == [("next", "b0")]
    assert farm.play(cancel("s")) == []
    assert farm.ask(needing("next"), name="again") == [("next", "b0")]
