"""The strategy of a bisection against an oracle that knows every answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.bisect.search import (
    BuildNow,
    EvaluateNow,
    Found,
    Judgement,
    Knowledge,
    good_again,
    next_step,
    rounds_needed,
    still_wanted,
)

G, B, U = Judgement.GOOD, Judgement.BAD, Judgement.UNTESTABLE


@dataclass
class Oracle:
    """A history: the class of each position (None where it does not evaluate), and the answer of each class."""

    classes: list[str | None]
    answers: dict[str, Judgement]
    evaluated: set[int] = field(default_factory=set)
    built: list[str] = field(default_factory=list)
    rounds: int = 0

    def answer(self, position: int) -> Judgement:
        its_class = self.classes[position]
        return U if its_class is None else self.answers[its_class]

    def known(self) -> Knowledge:
        last = len(self.classes) - 1
        seen = {0, last, *self.evaluated}
        classes = {each: name for each in seen if (name := self.classes[each]) is not None}
        answered = {classes[0], classes[last], *self.built}
        return Knowledge(
            len(self.classes),
            classes,
            {name: self.answers[name] for name in answered},
            frozenset(each for each in seen if self.classes[each] is None),
        )

    def evaluate(self, positions: tuple[int, ...]) -> None:
        assert positions
        assert self.evaluated.isdisjoint(positions)
        self.evaluated.update(positions)

    def search(self, slots: int) -> Found:
        """Search with builds that end together, round by round."""
        while True:
            match next_step(self.known(), slots):
                case Found() as found:
                    return found
                case EvaluateNow(positions):
                    assert len(positions) <= slots
                    self.evaluate(positions)
                case BuildNow(positions):
                    names = [self.name(each) for each in positions]
                    assert 0 < len(names) == len(set(names)) <= slots
                    self.built += names
                    self.rounds += 1

    def search_unevenly(self, slots: int, chance: random.Random) -> Found:
        """Search with builds that end one after the other, in any order; ends those that have become pointless."""
        running: set[str] = set()
        while True:
            running &= still_wanted(self.known(), running)
            step = next_step(self.known(), slots, running)
            match step:
                case Found():
                    return step
                case EvaluateNow(positions):
                    self.evaluate(positions)
                case BuildNow(positions):
                    running |= {self.name(each) for each in positions}
                    assert 0 < len(running) <= slots
                    ended = chance.choice(sorted(running))
                    running.remove(ended)
                    self.built.append(ended)

    def name(self, position: int) -> str:
        name = self.classes[position]
        assert name is not None
        return name

    def check(self, found: Found) -> None:
        assert (self.answer(found.good), self.answer(found.bad)) == (G, B)
        assert found.between == tuple(range(found.good + 1, found.bad))
        assert all(self.answer(each) is U for each in found.between)
        assert len(self.built) == len(set(self.built)), "a class was built twice"
        assert all(self.answer(each) is G for each in good_again(self.known()))


@st.composite
def histories(draw: st.DrawFn, *, all_testable: bool = False) -> Oracle:
    """Histories in which a derivation may come back, with any answers: they need not turn bad only once."""
    count = draw(st.integers(2, 60))
    names = [f"c{draw(st.integers(0, 12))}" for _ in range(count)]
    kinds = [G, B] if all_testable else [G, B, U]
    answers = {name: draw(st.sampled_from(kinds)) for name in sorted(set(names))}
    answers |= {"first": G, "last": B}
    classes: list[str | None] = ["first", *names, "last"]
    if not all_testable:
        for position in range(1, count + 1):
            if draw(st.integers(0, 4)) == 0:
                classes[position] = None
    return Oracle(classes, answers)


@given(histories(), st.integers(1, 9))
def test_a_search_ends_between_a_good_and_a_bad_position_with_nothing_testable_between(
    history: Oracle, slots: int
) -> None:
    history.check(history.search(slots))


@given(histories(), st.integers(1, 9), st.integers(0, 2**32))
def test_so_does_one_whose_builds_end_in_any_order(history: Oracle, slots: int, seed: int) -> None:
    history.check(history.search_unevenly(slots, random.Random(seed)))


@given(histories(all_testable=True), st.integers(1, 9))
def test_where_all_can_be_tested_it_takes_no_more_rounds_than_a_search_of_that_many_ways(
    history: Oracle, slots: int
) -> None:
    found = history.search(slots)
    history.check(found)
    assert found.bad == found.good + 1
    assert history.rounds <= rounds_needed(len(history.classes), slots)


@given(st.integers(2, 400), st.data(), st.integers(1, 9))
@example(41, None, 2)
def test_a_history_that_turns_bad_once_is_searched_to_the_very_commit(
    count: int, data: st.DataObject | None, slots: int
) -> None:
    at = 17 if data is None else data.draw(st.integers(1, count - 1))
    history = Oracle([f"c{n}" for n in range(count)], {f"c{n}": B if n >= at else G for n in range(count)})
    found = history.search(slots)
    assert (found.good, found.bad, found.between) == (at - 1, at, ())
    assert good_again(history.known()) == ()
    assert history.rounds <= rounds_needed(count, slots)


def test_forty_commits_take_four_rounds_of_two_builds() -> None:
    assert [rounds_needed(41, slots) for slots in (1, 2, 3, 40)] == [6, 4, 3, 1]


@given(st.integers(2, 500), st.data(), st.integers(1, 9))
def test_one_change_in_a_history_is_found_by_evaluations_alone(count: int, data: st.DataObject, slots: int) -> None:
    at = data.draw(st.integers(1, count - 1))
    history = Oracle([*["old"] * at, *["new"] * (count - at)], {"old": G, "new": B})
    assert history.search(slots).bad == at
    assert not history.built
    assert len(history.evaluated) <= slots * rounds_needed(count, slots)


def test_free_slots_are_used_for_other_derivations_where_picks_are_of_one() -> None:
    classes: list[str | None] = [*"aaaa", *"b" * 30, *"cdef"]
    history = Oracle(classes, dict.fromkeys("abcd", G) | dict.fromkeys("ef", B))
    assert history.search(4).bad == 36
    assert history.rounds == 1
    assert set(history.built) == set("bcde")


def test_positions_that_cannot_be_tested_leave_a_range() -> None:
    history = Oracle(["a", "b", None, "u", None, "c"], {"a": G, "b": G, "u": U, "c": B})
    assert history.search(2) == Found(1, 5, (2, 3, 4))


def test_answers_that_turn_good_again_are_seen() -> None:
    history = Oracle([*"abcde"], {"a": G, "b": B, "c": G, "d": B, "e": B})
    assert history.search(4) == Found(0, 1, ())
    assert good_again(history.known()) == (2,)
