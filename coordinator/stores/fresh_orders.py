"""Small derivations that came last, kept for the orders of their builds, which often follow within seconds.

An order that is kept spares a question to the database, in another thread, between a lease and its worker. A row is
given once: a second attempt asks the database. Fixed outputs are not kept, since several recipes may make one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from coordinator.stores.derivation_records import Kind, PackedDerivation
from scheduler.model import StepKey

#: Derivations that are kept, of at most so many bytes each and in all; the oldest make room.
KEPT: Final = 4096
KEPT_BYTES_EACH: Final = 16 * 1024
KEPT_BYTES: Final = 4 * 1024 * 1024


class FreshOrders:
    """Derivations by step, the oldest first."""

    def __init__(self) -> None:
        self._rows: dict[StepKey, PackedDerivation] = {}
        #: Those of them that are the first recipe of their step.
        self._placed: set[StepKey] = set()
        self._bytes = 0

    def add(self, batch: Sequence[PackedDerivation]) -> None:
        """Keep what was stored."""
        for each in batch[-KEPT:]:
            step = each.node.step
            if each.node.kind is Kind.FIXED or _bytes_of(each) > KEPT_BYTES_EACH or step in self._rows:
                continue
            self._rows[step] = each
            self._bytes += _bytes_of(each)
        while len(self._rows) > KEPT or self._bytes > KEPT_BYTES:
            self._drop(next(iter(self._rows)))

    def place(self, members: Iterable[tuple[StepKey, int, str]]) -> None:
        """Note which derivations (step, recipe index, .drv base name) have become recipes."""
        for step, index, drv in members:
            row = self._rows.get(step)
            if row is not None and index == 0 and row.node.drv == drv:
                self._placed.add(step)

    def take(self, wanted: Sequence[tuple[StepKey, int]]) -> list[PackedDerivation]:
        """Return the recipes of all steps, and keep them no longer; none where one is not kept."""
        if not all(index == 0 and step in self._placed for step, index in wanted):
            return []
        return [self._drop(step) for step in dict.fromkeys(step for step, _ in wanted)]

    def clear(self) -> None:
        """Keep none."""
        self._rows.clear()
        self._placed.clear()
        self._bytes = 0

    def _drop(self, step: StepKey) -> PackedDerivation:
        row = self._rows.pop(step)
        self._placed.discard(step)
        self._bytes -= _bytes_of(row)
        return row


def _bytes_of(row: PackedDerivation) -> int:
    return len(row.aterm) + len(row.detail) + len(row.inputs)
