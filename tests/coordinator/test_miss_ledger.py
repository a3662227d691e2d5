"""The ledger of misses: a flood costs bounded memory, and what people wait for keeps its place."""

from __future__ import annotations

import random

import pytest

from coordinator.demand.ledger import KEPT, LOOK_AGAIN_S, LOOKED_AT, OPEN, MissLedger, in_order
from coordinator.stores.known_outputs import KnownOutput
from scheduler.model import StepKey


def part(number: int) -> str:
    return f"{number:032d}"


def known(number: int) -> KnownOutput:
    base = f"{part(number)}-package"
    return KnownOutput(f"/nix/store/{base}", StepKey(base), f"/nix/store/{part(number)}-package.drv", "x86_64-linux")


def test_a_flood_of_different_paths_keeps_what_is_known_or_was_asked_for_by_two() -> None:
    ledger = MissLedger()
    for asker in range(2):
        ledger.note(part(1), asker, 0.0)
    ledger.note(part(2), 0, 0.0)
    ledger.identify(known(2))
    for number in range(100_000):
        ledger.note(part(1000 + number), 5, 1.0)
    assert len(ledger) <= KEPT + OPEN
    assert [miss.hash_part for miss in in_order(ledger)[:2]] == [part(2), part(1)]


def test_a_flood_of_two_askers_evicts_nothing_that_stands_as_high_and_nothing_that_the_farm_could_build() -> None:
    ledger = MissLedger(kept=64, shelf=64)
    for asker in range(5):
        ledger.note(part(1), asker, 0.0)
    ledger.note(part(2), 0, 0.0)
    ledger.identify(known(2))
    for number in range(5_000):
        for asker in (7, 8):
            ledger.note(part(1000 + number), asker, 1.0)
    assert len(ledger) <= 128
    assert [miss.hash_part for miss in in_order(ledger)[:2]] == [part(2), part(1)]
    for asker in range(3):
        ledger.note(part(3), asker, 2.0)
    ledger.note(part(9_000), 1, 3.0)
    kept = {miss.hash_part for miss in in_order(ledger)[:3]}
    assert part(3) in kept, "three stand above two"
    assert LOOKED_AT < 64


@pytest.mark.parametrize("people", [1, 3, 10, 30])
def test_people_are_counted_roughly_and_a_repeat_is_the_same_one(people: int) -> None:
    ledger, dice = MissLedger(), random.Random(people)
    bits = [dice.getrandbits(32) for _ in range(people)]
    for _ in range(20):
        for bit in bits:
            ledger.note(part(1), bit, 0.0)
    (miss,) = ledger
    assert miss.people == pytest.approx(people, rel=0.35, abs=0.6)
    assert miss.requests == 20 * people


def test_what_nobody_asks_for_any_more_fades_and_is_forgotten() -> None:
    ledger = MissLedger()
    ledger.note(part(1), 1, 0.0)
    for asker in range(8):
        ledger.note(part(2), asker, 0.0)
    ledger.end_day()
    assert [miss.hash_part for miss in in_order(ledger)] == [part(2), part(1)]
    ledger.note(part(2), 1, 1.0)
    assert in_order(ledger)[0].people == pytest.approx(4, abs=1), "yesterday's count for half"
    ledger.end_day()
    assert [miss.hash_part for miss in ledger] == [part(2)]
    ledger.forget([part(2), part(3)])
    assert len(ledger) == 0


def test_what_the_farm_could_not_build_is_looked_up_again_because_its_derivation_may_have_come() -> None:
    ledger = MissLedger()
    assert ledger.note(part(1), 0, 0.0)
    assert not ledger.note(part(1), 1, LOOK_AGAIN_S - 1.0)
    assert ledger.note(part(1), 0, LOOK_AGAIN_S)
    assert not ledger.note(part(1), 0, LOOK_AGAIN_S + 1.0)
    ledger.identify(known(1))
    assert not ledger.note(part(1), 0, 3 * LOOK_AGAIN_S)


def test_what_does_not_count_takes_no_place_of_what_could_be_built() -> None:
    ledger = MissLedger()
    for number in range(5):
        for asker in range(9 - number):
            ledger.note(part(number), asker, 0.0)
        ledger.identify(known(number))
    found = ledger.buildable(2, lambda _, output: output.hash_part not in {part(0), part(2)})
    assert [output.hash_part for _, output in found] == [part(1), part(3)]


def test_what_has_fallen_off_is_not_brought_back_by_being_known() -> None:
    ledger = MissLedger(kept=2, shelf=2)
    for number in range(4):
        assert ledger.note(part(number), 0, 0.0)
    ledger.identify(known(0))
    assert {miss.hash_part for miss in ledger} == {part(2), part(3)}
