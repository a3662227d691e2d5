"""Builders that a step is, or would be, placed on, as a value: where each would end it, and what keeps it from one.

It is computed as the placement computes it (`placement.Rooms`), for people who ask; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from scheduler.locality import Fetches, fetches_of
from scheduler.model import FAR_OFF, BuilderId, Instant, StepState
from scheduler.placement import Rooms
from scheduler.records import Builder, Hold, Step
from scheduler.state import FarmState

#: Builders that are looked at, the fastest first, and those that are named, by when they would end the step.
LOOKED_AT: Final = 256
NAMED: Final = 8


class Standing(StrEnum):
    """State of a builder towards one step."""

    FREE = "free"
    FULL = "full"
    #: It has the step.
    HOLDS = "holds"
    #: It takes one step at a time after its failures.
    PROBATION = "probation"
    QUARANTINED = "quarantined"
    DRAINING = "draining"
    #: The step was lost or handed back here; others come first.
    AVOIDED = "avoided"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A builder that offers all that a step requires."""

    builder: BuilderId
    standing: Standing
    #: 1 is usual, 2 takes half the time.
    speed: float
    leases: int
    capacity: int
    #: When it should have room, and when it should have built the step; `FAR_OFF` where it gets nothing.
    room_at: Instant
    ends_at: Instant
    #: Bytes of large inputs that it has, and those that it lacks; how long it should fetch these, before it builds.
    here_bytes: int = 0
    missing_bytes: int = 0
    fetch_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Considered:
    """Rank of an unfinished step, and the builders that were looked at for it, the one that ends it first before all.

    `count` are all that could take it; `work_ms` is on a builder of speed 1. `rank_ms` is the longest path from its
    start to the end of a root: what has more goes first. The wait for a faster builder is `held`, where there is one.
    """

    work_ms: int
    rank_ms: int
    candidates: tuple[Candidate, ...] = ()
    count: int = 0
    held: Hold | None = None
    #: What it asks for, and makes; 0: not known.
    memory_bytes: int = 0
    output_bytes: int = 0


def considered(state: FarmState, rooms: Rooms, step: Step, now: Instant) -> Considered:
    """Return where a step would be built as things stand. Costs the builders of the farm, and leases of `LOOKED_AT`."""
    if not step.recipes:
        return Considered(step.work_ms, step.tail_ms, memory_bytes=step.memory_bytes, output_bytes=step.output_bytes)
    requirements = step.recipe.requirements
    able = [each for each in state.builders.values() if each.spec is not None and each.spec.offers(requirements)]
    able.sort(key=lambda each: (not each.willing, -each.speed(requirements.system), each.id))
    fetches = fetches_of(step)
    found = [_candidate(each, rooms, step, now, able, fetches) for each in able[:LOOKED_AT]]
    found.sort(key=lambda each: (each.standing is not Standing.HOLDS, each.ends_at, -each.speed, each.builder))
    named = tuple(found[:NAMED])
    return Considered(step.work_ms, step.tail_ms, named, len(able), step.held, step.memory_bytes, step.output_bytes)


def _candidate(  # noqa: PLR0917 - all that is looked at
    builder: Builder, rooms: Rooms, step: Step, now: Instant, able: Sequence[Builder], fetches: Fetches | None
) -> Candidate:
    speed = builder.speed(step.recipe.requirements.system)
    standing = _standing(builder, step, able)
    if standing is Standing.HOLDS and step.state is StepState.LEASED:
        room_at = step.asked_at
    elif standing is Standing.FREE:
        room_at = now
    elif standing in (Standing.FULL, Standing.PROBATION):
        room_at = _room_at(builder, rooms, now)
    else:
        room_at = builder.until if builder.until and not (builder.draining or builder.unfit) else FAR_OFF
    here, missing, fetch_s = 0, 0, 0.0
    # What it was given it counts as having, from then on.
    if fetches is not None and standing is not Standing.HOLDS:
        here, fetch_s = fetches.here(builder), fetches.seconds(builder)
        missing = fetches.bytes - here
    ends_at = FAR_OFF if room_at >= FAR_OFF else Instant(room_at + fetch_s + step.work_ms / 1000 / speed)
    return Candidate(
        builder.id, standing, speed, len(builder.leases), builder.capacity, room_at, ends_at, here, missing, fetch_s
    )


def _standing(builder: Builder, step: Step, able: Sequence[Builder]) -> Standing:
    if step.builder == builder.id:
        return Standing.HOLDS
    if builder.until or builder.unfit:
        return Standing.QUARANTINED
    if builder.draining:
        return Standing.DRAINING
    if builder.free > 0:
        others = any(each.willing for each in able if each is not builder)
        return Standing.AVOIDED if step.avoid == builder.id and others else Standing.FREE
    if builder.probation and builder.offered > len(builder.leases):
        return Standing.PROBATION
    return Standing.FULL


def _room_at(builder: Builder, rooms: Rooms, now: Instant) -> Instant:
    """Return when enough of a builder's leases should have ended that it takes one more."""
    instants, needed = rooms.of(builder, now), 1 - builder.free
    return Instant(instants[-needed]) if 0 < needed <= len(instants) else FAR_OFF
