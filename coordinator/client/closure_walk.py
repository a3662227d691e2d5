"""Walk through a client's derivations that ends where the farm knows them.

The farm has a derivation only with all that it stands on, and a .drv's path names its content and all that it refers
to. So what stands below one that the farm knows is neither read nor asked about: an evaluation that was submitted
before costs one question about its roots, and a change costs what it changed.

A question takes about as long as reading some hundred files. So between two questions the walk reads ahead, at most
`READ_AHEAD` files or as many as were found to be unknown: a graph that is wholly new takes few questions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Final

from coordinator.client.closure import Closure, LocalStore, closure_of
from infra.nix.drv_head import DrvHead

#: Files that are read between two questions although the farm may know them, at least.
READ_AHEAD: Final = 256


class ClosureWalk:
    """One walk. The caller asks the farm about `questions`, gives its answer to `learn`, until there are none."""

    def __init__(self, store: LocalStore, roots: Sequence[str], known: Collection[str] = frozenset()) -> None:
        """`roots` are full paths, `known` those that the farm has or was sent."""
        self._store = store
        self._roots = roots
        self._known = set(known)
        self._heads: dict[str, DrvHead] = {}
        #: Members that were met and not read, the one that was met first at the left.
        self._unread = deque(drv for drv in dict.fromkeys(roots) if drv not in self._known)
        self._met = self._known.union(self._unread)
        #: Members to ask about; and those that the farm lacks.
        self.questions = list(self._unread)
        self._unknown: set[str] = set()
        #: How many the farm was asked about.
        self.asked = 0

    def learn(self, unknown: Collection[str]) -> None:
        """Take the answer, those of `questions` that the farm lacks, and read on. For a thread.

        Raises:
            ClosureError: As `read_closure`.
        """
        self.asked += len(self.questions)
        self._unknown.update(unknown)
        self._known.update(drv for drv in self.questions if drv not in self._unknown)
        waiting = [drv for drv in self._unread if drv not in self._known]
        self._unread.clear()
        for drv in waiting:
            self._read(drv)
        ahead: list[str] = []
        while self._unread and len(ahead) < max(READ_AHEAD, len(self._unknown)):
            ahead.append(self._unread.popleft())
            self._read(ahead[-1])
        self.questions = [*ahead, *self._unread]

    def _read(self, drv: str) -> None:
        head = self._heads[drv] = self._store.head(drv)
        for need in head.input_drvs:
            if need not in self._met:
                self._met.add(need)
                self._unread.append(need)

    def closure(self) -> Closure:
        """Return what the farm lacks, once there are no further questions. For a thread."""
        return closure_of(self._roots, lambda drv: None if drv in self._known else self._heads[drv])

    def head(self, drv: str) -> DrvHead:
        """Return the head of a member that was read."""
        return self._heads[drv]

    @property
    def known(self) -> set[str]:
        """Members at which the walk ended."""
        return self._known
