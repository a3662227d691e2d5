"""Leases that follow others: each begins as soon as those that it needs are built here, published or not.

One that waits so has no slot and is not late: it takes the slot of the build that it waits for. The coordinator counts
it likewise until it has the report of that build, which comes only after the upload.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from workers.agent.lease_actions import LeaseKey


class Following:
    """The leases in hand that follow others in hand. Written by `lease_machine` alone."""

    __slots__ = ("_after", "_waits")

    def __init__(self) -> None:
        #: Of each that follows others: these, and those of them that are not built yet (absent where all are).
        self._after: dict[LeaseKey, tuple[LeaseKey, ...]] = {}
        self._waits: dict[LeaseKey, set[LeaseKey]] = {}

    def begin(self, key: LeaseKey, after: Collection[LeaseKey], unbuilt: Iterable[LeaseKey]) -> None:
        """Take a lease that follows others, of which some are not built yet."""
        if after:
            self._after[key] = tuple(after)
            waits = set(unbuilt)
            if waits:
                self._waits[key] = waits

    def waits(self, key: LeaseKey) -> bool:
        """Return whether a lease waits for another one's build."""
        return key in self._waits

    def waiting_for(self, key: LeaseKey) -> list[LeaseKey]:
        """Return the leases that wait for this one's build."""
        return [each for each, waits in self._waits.items() if key in waits]

    def built(self, key: LeaseKey) -> list[LeaseKey]:
        """A lease was built: return those that waited for nothing else, which may go on."""
        released = []
        for each in self.waiting_for(key):
            self._waits[each].discard(key)
            if not self._waits[each]:
                del self._waits[each]
                released.append(each)
        return released

    def end(self, key: LeaseKey) -> None:
        """Forget a lease that waits for nothing any more, and what it followed."""
        self._after.pop(key, None)
        self._waits.pop(key, None)

    def stop_waiting(self, key: LeaseKey) -> None:
        """A lease ends whatever becomes of what it follows."""
        self._waits.pop(key, None)

    def begun(self, is_told: Callable[[LeaseKey], bool]) -> int:
        """Return how many have begun that the coordinator still takes for waiting, having no report of the others."""
        return sum(
            not (key in self._waits or is_told(key) or all(is_told(ahead) for ahead in after))
            for key, after in self._after.items()
        )
