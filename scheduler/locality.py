"""Inputs that builders have, and the seconds in which each would fetch the others.

A builder has what it made and what steps that it was given need, until it starts anew or its store deletes something.
Each step remembers the places that have its outputs, at most `MOST_PLACES`: an input that more have decides nothing,
and counts as had by all. Neither do small ones. So a farm remembers a few words for each large output, and a builder
that is gone costs nothing: its place is never met again.

Only needs are counted, not what their outputs refer to: the core knows no references. What is not counted is fetched
too, and makes a builder with the needs no worse choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scheduler.records import Builder, Step, StoreLife

#: Outputs of fewer bytes are no reason for a builder.
LEAST_BYTES: Final = 1 << 20
#: Places that a step remembers.
MOST_PLACES: Final = 16
#: Places of an output that more have.
EVERYWHERE: Final = (StoreLife(),)
#: Bytes that a builder fetches in a second, where that was not measured.
USUAL_RATE: Final = 50_000_000
#: Ends of a step that lie no further apart are equally good: what has most room takes it.
WORTH_S: Final = 1.0


def arrive(step: Step, place: StoreLife) -> None:
    """Remember that a builder that was given a step has its inputs, or will have them soon."""
    for need in step.needs:
        if need.output_bytes >= LEAST_BYTES and place not in need.places and need.places is not EVERYWHERE:
            _add(need, place)


def make(step: Step, place: StoreLife, bytes_: int) -> None:
    """Remember that a builder has made the outputs of a step, which are so large; 0: that is not known."""
    step.output_bytes = bytes_ or step.output_bytes
    step.places = (place,) if step.output_bytes >= LEAST_BYTES else ()


def _add(step: Step, place: StoreLife) -> None:
    if len(step.places) >= MOST_PLACES:
        step.places = tuple([each for each in step.places if each.is_known])
        if len(step.places) >= MOST_PLACES:
            step.places = EVERYWHERE
            return
    step.places = (*step.places, place)


class Fetches:
    """Bytes of the large inputs of one step, all and by the place that has them."""

    __slots__ = ("_at", "bytes")

    def __init__(self, needs: Sequence[Step]) -> None:
        self.bytes = 0
        self._at: dict[StoreLife, int] = {}
        for need in needs:
            if need.places is not EVERYWHERE:
                self.bytes += need.output_bytes
                for place in need.places:
                    self._at[place] = self._at.get(place, 0) + need.output_bytes

    def here(self, builder: Builder) -> int:
        """Return the bytes that a builder has."""
        return self._at.get(builder.place, 0)

    def seconds(self, builder: Builder) -> float:
        """Return how long a builder should fetch the others."""
        return (self.bytes - self._at.get(builder.place, 0)) / (builder.fetch_rate or USUAL_RATE)


def fetches_of(step: Step) -> Fetches | None:
    """Return what a step's inputs make of a difference between builders.

    None where they are small, everywhere, or fetched in `WORTH_S` at the usual rate: no builder is chosen for these.
    """
    bytes_ = 0
    for need in step.needs:
        bytes_ += need.output_bytes
    if bytes_ < WORTH_S * USUAL_RATE:
        return None
    fetches = Fetches([need for need in step.needs if need.output_bytes >= LEAST_BYTES])
    return fetches if fetches.bytes else None


def first_to_end(durations: Sequence[tuple[float, Builder]]) -> list[Builder]:
    """Return the builders that end a step first, of all with the seconds that each would take; never empty."""
    least = min([seconds for seconds, _ in durations])
    return [builder for seconds, builder in durations if seconds <= least + WORTH_S]
