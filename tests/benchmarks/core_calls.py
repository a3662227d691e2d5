"""Longest pieces of the core's work between two pauses, for each kind of event, with 100,000 steps.

The engine gives the event loop to others at a pause, once a slice is over, so that a piece is what may hold it up.
Python's collector is off and all that exists is frozen, as in the engine during a turn (`infra.collector`).
Times are processor time of this thread; another load on the machine makes them longer all the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scheduler.effects import StartBuild
from scheduler.events import (
    BuilderJoined,
    BuilderLost,
    BuilderReported,
    BuildFailed,
    BuildSucceeded,
    Event,
    OutputsPublished,
    PriorityAsked,
    ResultsHeld,
    SpeedsMeasured,
    SubmissionCancelled,
    SubmissionExpired,
    SubmissionGrown,
    SubmissionReceived,
    TimePassed,
    WorksEstimated,
)
from scheduler.farm import Farm
from scheduler.model import (
    BuilderId,
    BuilderSpec,
    Failure,
    FailureKind,
    Instant,
    LeaseId,
    Recipe,
    Requirements,
    StepKey,
    StepSpec,
    SubmissionId,
)
from scheduler.policy import Limits

LINUX = Requirements("x86_64-linux")
A, B = SubmissionId("a"), SubmissionId("b")
NOW = Instant(1000.0)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Seconds of the pieces of one kind of event."""

    name: str
    seconds: tuple[float, ...]

    @property
    def longest_ms(self) -> float:
        """The longest piece."""
        return max(self.seconds) * 1000

    @property
    def most_ms(self) -> float:
        """What 999 of 1000 pieces do not exceed."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(len(self.seconds) * 0.999))] * 1000

    def __str__(self) -> str:
        return (
            f"{self.name:<58} longest {self.longest_ms:7.2f} ms, 99.9 % {self.most_ms:7.2f} ms, "
            f"{len(self.seconds):6} pieces, {sum(self.seconds):6.2f} s"
        )


def wide(count: int) -> tuple[StepSpec, ...]:
    """Steps that need nothing and are all roots."""
    return tuple(StepSpec(StepKey(f"/nix/store/{index:032x}-wide"), (Recipe(LINUX),)) for index in range(count))


def cone(count: int) -> tuple[StepSpec, ...]:
    """Steps that all need one, which comes first."""
    base = StepSpec(StepKey("base"), (Recipe(LINUX),))
    above = (StepSpec(StepKey(f"/nix/store/{i:032x}-cone"), (Recipe(LINUX, (base.key,)),)) for i in range(count - 1))
    return (base, *above)


def submit(name: SubmissionId, steps: tuple[StepSpec, ...], *, known: bool = False, grows: bool = False) -> Event:
    """Make a submission of all steps that no other needs."""
    needed = {need for step in steps for need in step.recipes[0].needs}
    roots = tuple(step.key for step in steps if step.key not in needed)
    if grows:
        return SubmissionGrown(name, roots, steps)
    return SubmissionReceived(name, roots, steps, asked_at=Instant(1.0) if known else NOW)


def join(index: int, slots: int) -> Event:
    """Let a builder join."""
    spec = BuilderSpec(BuilderId(f"builder-{index}"), "1", frozenset({LINUX.system}))
    return BuilderJoined(spec, slots)


class Stage:
    """A farm that is brought somewhere, and then looked at."""

    def __init__(self, *events: Event, limits: Limits | None = None) -> None:
        self.farm = Farm(limits)
        self.now = NOW
        self.running: list[StartBuild] = []
        for event in events:
            _, effects = self.farm.handle(event, self.now)
            self.running += [effect for effect in effects if isinstance(effect, StartBuild)]
        gc.collect()
        gc.freeze()

    def pieces(self, *events: Event, after_s: float = 0.0) -> list[float]:
        """Take events in; return the seconds of processor time between the pauses."""
        now = self.now = Instant(self.now + after_s)
        seconds: list[float] = []
        work = self.farm.handling(events, now)
        clock = time.thread_time
        began = clock()
        try:
            while True:
                next(work)
                seconds.append(clock() - began)
                began = clock()
        except StopIteration as end:
            _, effects = end.value
            # What only this call held is freed when its generator ends, and counts.
            del work
            seconds.append(clock() - began)
            self.running = [effect for effect in effects if isinstance(effect, StartBuild)]
        return seconds


def builds(stage: Stage, rounds: int, batch: int) -> list[float]:
    """End builds, `batch` a call, and let what follows begin."""
    seconds: list[float] = []
    running = list(stage.running)
    for _ in range(rounds):
        ended, running = running[:batch], running[batch:]
        events: list[Event] = []
        for effect in ended:
            events += [BuildSucceeded(effect.lease, effect.builder, b""), OutputsPublished(effect.lease)]
        seconds += stage.pieces(*events, after_s=0.001)
        running += stage.running
    return seconds


def scenes(layered: tuple[StepSpec, ...]) -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """Yield what is looked at, each on a farm of its own."""
    count = len(layered)
    flat, one = wide(count), cone(count)
    keys = tuple(step.key for step in layered)
    works = tuple((key, 1000 + index % 977) for index, key in enumerate(keys))
    again = tuple((key, 1000 + index % 971) for index, key in enumerate(keys))
    flat_keys = tuple(step.key for step in flat)
    flat_works = tuple((key, 1000 + index % 977) for index, key in enumerate(flat_keys))
    half = tuple((key, 99_000 + index % 977) for index, key in enumerate(flat_keys) if index % 2)

    yield "submission of layers", lambda: Stage().pieces(submit(A, layered))
    yield "submission of roots alone", lambda: Stage().pieces(submit(A, flat))
    yield "the same layers by another", lambda: Stage(submit(A, layered)).pieces(submit(B, layered, known=True))
    yield "the same roots by another, ready", lambda: Stage(submit(A, flat)).pieces(submit(B, flat, known=True))
    opened = SubmissionReceived(A, (), (), open=True)
    yield "growth by layers", lambda: Stage(opened).pieces(submit(A, layered, grows=True))
    yield "growth by roots alone", lambda: Stage(opened).pieces(submit(A, flat, grows=True))
    yield (
        "16 builds a call, layers",
        lambda: builds(Stage(submit(A, layered), *(join(i, 4) for i in range(16))), 500, 16),
    )
    yield "16 builds a call, roots", lambda: builds(Stage(submit(A, flat), *(join(i, 4) for i in range(16))), 500, 16)
    yield "end of what all others need", lambda: builds(Stage(submit(A, one), join(0, 4)), 1, 1)
    yield "a worker joins with 10,000 slots", lambda: Stage(submit(A, flat)).pieces(join(0, 10_000))
    yield "heartbeat of 10,000 leases", lambda: _heartbeat(Stage(submit(A, flat), join(0, 10_000)))
    yield (
        "a worker is lost with 10,000 leases",
        lambda: Stage(submit(A, flat), join(0, 10_000), join(1, 4)).pieces(lost(0)),
    )
    yield "the last worker is lost, all ready", lambda: Stage(submit(A, flat), join(0, 4)).pieces(lost(0))
    yield "the first worker joins, all ready and forsaken", lambda: Stage(submit(A, flat)).pieces(join(0, 4))
    yield (
        "a worker falls silent with 10,000 leases",
        lambda: _after(Stage(submit(A, flat), join(0, 10_000)), TimePassed(), 500.0),
    )
    yield "time limit of all that no worker takes", lambda: _given_up(flat)
    yield "first estimates of all, layers", lambda: Stage(submit(A, layered)).pieces(WorksEstimated(works))
    yield (
        "revised estimates of all, layers",
        lambda: Stage(submit(A, layered), WorksEstimated(works)).pieces(WorksEstimated(again)),
    )
    yield "first estimates of all, ready", lambda: Stage(submit(A, flat), join(0, 4)).pieces(WorksEstimated(flat_works))
    yield "revised estimates of half, ready", lambda: Stage(submit(A, flat), join(0, 4)).pieces(WorksEstimated(half))
    yield (
        "speeds measured, all ready",
        lambda: Stage(submit(A, flat), *(join(i, 4) for i in range(16))).pieces(
            SpeedsMeasured(tuple((BuilderId(f"builder-{i}"), LINUX.system, 0.5 + i / 10) for i in range(16)))
        ),
    )
    yield "16 builds a call, ready, speeds differ", lambda: _fast_and_slow(flat, flat_works)
    yield "cancelled, layers", lambda: Stage(submit(A, layered)).pieces(SubmissionCancelled(A))
    yield "cancelled, all ready", lambda: Stage(submit(A, flat), join(0, 4)).pieces(SubmissionCancelled(A))
    yield (
        "one of two cancelled, layers",
        lambda: Stage(submit(A, layered), submit(B, layered, known=True)).pieces(SubmissionCancelled(A)),
    )
    yield (
        "one of two cancelled, all ready",
        lambda: Stage(submit(A, flat), submit(B, flat, known=True), join(0, 4)).pieces(SubmissionCancelled(A)),
    )
    yield (
        "another priority, all ready",
        lambda: Stage(submit(A, flat), submit(B, flat, known=True)).pieces(PriorityAsked(B, 5)),
    )
    yield "the cache holds all, layers", lambda: Stage(submit(A, layered)).pieces(ResultsHeld(keys))
    yield "the cache holds all, ready", lambda: Stage(submit(A, flat)).pieces(ResultsHeld(flat_keys))
    yield (
        "the cache holds all but one, the least urgent first",
        lambda: Stage(submit(A, flat)).pieces(ResultsHeld((*reversed(flat_keys[1:-1]), flat_keys[0]))),
    )
    yield (
        "what all others need fails",
        lambda: Stage(submit(A, one), join(0, 4)).pieces(
            BuildFailed(LeaseId(StepKey("base"), 1), BuilderId("builder-0"), Failure(FailureKind.PERMANENT, "it fails"))
        ),
    )
    yield "that again, after it failed", lambda: _again(one)
    yield "the submission of which that failed runs again", lambda: _again(one, A)
    yield "the cache lost what all others need", lambda: _lost_base(one)
    yield (
        "history of an ended one expires, layers",
        lambda: Stage(submit(A, layered), ResultsHeld(keys)).pieces(SubmissionExpired(A)),
    )
    yield (
        "history of an ended one expires, roots",
        lambda: Stage(submit(A, flat), ResultsHeld(flat_keys)).pieces(SubmissionExpired(A)),
    )


def lost(index: int) -> Event:
    """Lose a builder."""
    return BuilderLost(BuilderId(f"builder-{index}"), "1", "it is gone")


def _heartbeat(stage: Stage) -> list[float]:
    leases = tuple(effect.lease for effect in stage.running)
    return stage.pieces(BuilderReported(BuilderId("builder-0"), "1", 10_000, leases), after_s=30.0)


def _after(stage: Stage, event: Event, seconds: float) -> list[float]:
    return stage.pieces(event, after_s=seconds)


def _given_up(flat: tuple[StepSpec, ...]) -> list[float]:
    stage = Stage(submit(A, flat), limits=Limits(give_up_s=60.0))
    seconds: list[float] = []
    for _ in range(len(flat) // 1000 + 2):
        seconds += stage.pieces(TimePassed(), after_s=61.0)
    return seconds


def _fast_and_slow(flat: tuple[StepSpec, ...], works: tuple[tuple[StepKey, int], ...]) -> list[float]:
    speeds = SpeedsMeasured(tuple((BuilderId(f"builder-{i}"), LINUX.system, 0.5 + i / 10) for i in range(16)))
    long = tuple((key, work * 100) for key, work in works)
    stage = Stage(submit(A, flat), WorksEstimated(long), speeds, *(join(i, 4) for i in range(16)))
    return builds(stage, 500, 16)


def _again(one: tuple[StepSpec, ...], name: SubmissionId = B) -> list[float]:
    failure = Failure(FailureKind.PERMANENT, "it fails")
    stage = Stage(submit(A, one), join(0, 4), BuildFailed(LeaseId(StepKey("base"), 1), BuilderId("builder-0"), failure))
    roots = tuple(step.key for step in one[1:])
    return stage.pieces(SubmissionReceived(name, roots, one, asked_at=NOW, again=name == A))


def _lost_base(one: tuple[StepSpec, ...]) -> list[float]:
    lease = LeaseId(StepKey("base"), 1)
    stage = Stage(
        submit(A, one), join(0, 4), BuildSucceeded(lease, BuilderId("builder-0"), b""), OutputsPublished(lease)
    )
    stage.now = Instant(stage.now + 1000)
    base = one[0]
    return stage.pieces(SubmissionReceived(B, (base.key,), (base,), asked_at=stage.now))


def look(layered: tuple[StepSpec, ...], only: str = "", runs: int = 2) -> Iterator[Pieces]:
    """Yield the pieces of each kind of event whose name has `only` in it: of each piece the least of `runs`.

    All runs do the same, so what one took longer for is another load of the machine's.
    """
    gc.disable()
    try:
        for name, scene in scenes(layered):
            if only in name:
                yield Pieces(name, tuple(map(min, *[scene() for _ in range(runs)])))
    finally:
        gc.enable()
        gc.unfreeze()
