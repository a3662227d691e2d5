"""Early leases: a step follows needs that its own builder builds or publishes, and begins there once they are built.

Such a lease is open before the needs are done. Their outputs lie in the builder's store, where the step finds them, but
not yet in the cache: what the step has built is published after them. Where one of them ends in another way, the lease
of the step ends first (`succession.handing_back`).

A *follower* is one of which a need is not built yet. It holds no place of its own: it takes that of the need that is
built last. At most one follows each lease, so that it has a place whenever it begins.

Written by `FarmState.evolve` alone, but for `fresh`, which `succession` takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

from scheduler.model import BuilderId, ImpossibleError, StepKey, StepState
from scheduler.records import Builder, Step

#: Steps whose dependents are still to be looked at; the oldest are passed over where there are more.
FRESH: Final = 256


def is_follower(step: Step) -> bool:
    """Return whether a leased step follows one that is not built yet."""
    return any(need.state is StepState.LEASED for need in step.follows)


class EarlyLeases:
    """The steps that follow others, by these."""

    __slots__ = ("_restored", "counts", "fresh", "released", "successors")

    def __init__(self) -> None:
        #: The steps that follow each, by their sequence; never empty.
        self.successors: dict[Step, tuple[Step, ...]] = {}
        #: How many steps follow others at a builder, where there are any: followers, and what was built or runs.
        self.counts: dict[BuilderId, int] = {}
        #: What was built, and may be published since the last step was done.
        self.released: tuple[Step, ...] = ()
        #: Steps that were leased or built since leases were last granted: others may follow them now.
        self.fresh: deque[Step] = deque(maxlen=FRESH)
        self._restored: list[tuple[Step, tuple[StepKey, ...]]] = []

    def behind(self, step: Step) -> list[Step]:
        """Return all that follows a step, through others too: each before what it follows."""
        found: dict[Step, None] = {}
        pending = [step]
        while pending:
            for each in self.successors.get(pending.pop(), ()):
                if each not in found:
                    found[each] = None
                    pending.append(each)
        return sorted(found, key=lambda each: (each.depth, each.sequence))

    def begin(self, step: Step, builder: BuilderId) -> None:
        """A waiting step gets a lease. Raises `ImpossibleError` unless all that it needs is done or open there."""
        ahead = tuple([need for need in step.needs if need.state is not StepState.DONE])
        if not ahead or any(need.builder != builder for need in ahead):
            raise ImpossibleError(f"{step} cannot follow its needs to {builder}")
        self._link(step, ahead, builder)

    def _link(self, step: Step, ahead: tuple[Step, ...], builder: BuilderId) -> None:
        step.follows = ahead
        self.counts[builder] = self.counts.get(builder, 0) + 1
        for need in ahead:
            behind = (*self.successors.get(need, ()), step)
            self.successors[need] = tuple(sorted(behind, key=lambda each: each.sequence))

    def built(self, need: Step, take_place: Callable[[Step], None]) -> None:
        """A step was built: what follows nothing that is not built yet takes its place."""
        for step in self.successors.get(need, ()):
            if step.state is StepState.LEASED and not is_follower(step):
                take_place(step)
                # Others may follow it now that it runs.
                self.fresh.append(step)

    def done(self, need: Step) -> None:
        """A step is done: what follows nothing any more has an ordinary lease."""
        released: list[Step] = []
        for step in self.successors.pop(need, ()):
            step.follows = tuple([each for each in step.follows if each is not need])
            if not step.follows:
                self._uncount(step)
                if step.state is StepState.PUBLISHING:
                    released.append(step)
        self.released = tuple(released)

    def end(self, step: Step) -> None:
        """The lease of a step ends without a result, before its builder is forgotten."""
        if not step.follows:
            return
        for need in step.follows:
            behind = tuple([each for each in self.successors[need] if each is not step])
            if behind:
                self.successors[need] = behind
            else:
                del self.successors[need]
        step.follows = ()
        self._uncount(step)

    def _uncount(self, step: Step) -> None:
        left = self.counts[step.builder] - 1
        if left:
            self.counts[step.builder] = left
        else:
            del self.counts[step.builder]

    def restore(self, step: Step, follows: tuple[StepKey, ...]) -> None:
        """Remember what a step of a snapshot follows, until all steps are known."""
        self._restored.append((step, follows))

    def link_restored(self, steps: Mapping[StepKey, Step], builders: Mapping[BuilderId, Builder]) -> None:
        """Link what a snapshot has restored."""
        for step, keys in self._restored:
            self._link(step, tuple([steps[key] for key in keys]), step.builder)
            if step.state is StepState.LEASED and is_follower(step):
                builder = builders[step.builder]
                builder.followers[step.key] = step
                builder.memory_bytes -= step.memory_bytes
                builder.free += 1
        self._restored = []
