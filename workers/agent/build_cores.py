"""Cores of one build (NIX_BUILD_CORES): as configured, and a share of the machine for what asks to be built so.

A worker has as many slots as cores unless its operator says otherwise, so most builds get one core. A derivation that
asks for `big-parallel` has work for all of them: it gets its share of the machine, which is the machine's cores divided
by the builds that run when it begins; those that begin later press it only as far as the machine lets them. A package
of which the farm knows how many processors it uses gets up to half as many more, of the same share: so what can use
more shows it, and what cannot leaves them to others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

PARALLEL_FEATURE: Final = "big-parallel"


@dataclass(frozen=True, slots=True)
class BuildCores:
    """Cores of the machine, and of a usual build; `fixed` where the operator has set the latter."""

    machine: int
    usual: int
    fixed: bool = False

    def of(self, features: Sequence[str], running: int, useful: int = 0) -> int:
        """Return the cores of a build with these required features, the last to begin of `running`.

        `useful` are those that it should have use for, by earlier builds; 0: not known.
        """
        if self.fixed or (not useful and PARALLEL_FEATURE not in features):
            return self.usual
        share = self.machine // max(1, running)
        return max(self.usual, min(share, useful) if useful else share)
