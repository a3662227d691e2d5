"""Repairs of what the cache has lost while steps wait for it.

A worker that cannot have an input, and a publication whose references are gone, name the paths. Rules:

1. A report is verified: only a path that the step stands on, and that the cache itself cannot deliver, is lost. So no
   worker makes the farm forget anything, and one that merely cannot reach the cache is blamed for that.
2. The step waits meanwhile; no attempt is used up, and no worker is blamed.
3. A lost object is had again from a worker's store or an upstream, bit for bit. Where none has it, the path leaves
   the cache with all that refers to it, because a path is published only with everything that it refers to.
4. Then the running submissions of the step are planned anew: what is gone is built again. A lost source has no deriver;
   the step waits (`StepView.lost_input`) until a client sends it: one that watches does so by itself.

The store is queried only for the objects of paths that a report names: one request each. Intake believes the
database, where it cannot look at files.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from coordinator.errors import CoordinatorError
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from coordinator.stores.derivations import DerivationsError, DerivationStore
from infra.cache.cache import Cache
from infra.cache.errors import ClosureTooLargeError
from infra.cache.repair.fsck import RepairSource
from infra.clock import Clock
from infra.objects.errors import CacheError
from scheduler.farm import Farm
from scheduler.model import StepKey

#: Steps whose losses wait to be repaired; further ones report theirs again.
MAX_WAITING: Final = 1000
#: Lost paths that are remembered, and for how many seconds: another worker may report what is repaired by then.
MAX_RECENT: Final = 10_000
RECENT_S: Final = 600.0

_log = logging.getLogger(__name__)


class Losses:
    """Verifies reports of lost paths and repairs them, in `run`, until that is cancelled."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        cache: Cache,
        derivations: DerivationStore,
        farm: Farm,
        views: Views,
        clock: Clock,
        replan: Callable[[SubmissionRow], Awaitable[None]],
        sources: Sequence[RepairSource],
    ) -> None:
        self._cache = cache
        self._derivations = derivations
        self._farm = farm
        self._views = views
        self._clock = clock
        self._replan = replan
        self._sources = sources
        self._waiting: dict[StepKey, set[str]] = {}
        self._filled = asyncio.Event()
        #: When a path was found lost, oldest first.
        self._recent: OrderedDict[str, float] = OrderedDict()

    async def check(self, step: StepKey, paths: Sequence[str]) -> str:
        """Look whether the cache has lost what a step needs. Return a sentence about it, "" where it has not.

        What is lost is repaired later, in `run`. `paths` are full paths that a reader did not find.
        """
        try:
            inputs = await self._derivations.inputs(step, self._farm.recipe_of(step))
            lost = await self._cache.lost(inputs, paths)
            sources = await self._sources_of(step)
        except ClosureTooLargeError:
            return ""
        except (CacheError, DerivationsError) as error:
            # The step tries again, and reports it again.
            return f"an input could not be looked for: {error}"
        now = self._clock.now()
        while self._recent and (len(self._recent) > MAX_RECENT or next(iter(self._recent.values())) < now - RECENT_S):
            self._recent.popitem(last=False)
        for path in lost:
            self._recent[path] = now
            self._recent.move_to_end(path)
        if lost and (step in self._waiting or len(self._waiting) < MAX_WAITING):
            self._waiting.setdefault(step, set()).update(lost)
            self._filled.set()
        known = sorted(lost) or sorted(path for path in paths if path in self._recent)
        if not known:
            return ""
        for path in known:
            if path in sources:
                return (
                    f"the source {path} is gone from the farm's cache; unless a worker or an upstream has it, "
                    "`drover build` sends it again"
                )
        return f"{known[0]} is gone from the farm's cache; it is had from a worker or an upstream, or built again"

    async def run(self) -> None:
        """Repair what was found lost, one batch after the other."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            batch, self._waiting = self._waiting, {}
            try:
                restored = await self._cache.restore(set().union(*batch.values()), self._sources)
            except CacheError as error:
                _log.warning("what the cache has lost could not be repaired; it will be tried again: %s", error)
                continue
            gone = set(restored.gone)
            submissions = {
                row.id: row
                for step, paths in batch.items()
                if not gone.isdisjoint(paths)
                for row in self._views.submissions_of(step)
            }
            for row in submissions.values():
                try:
                    await self._replan(row)
                except (CoordinatorError, CacheError) as error:
                    _log.warning("submission %s could not be planned anew after a loss: %s", row.id, error)

    async def _sources_of(self, step: StepKey) -> frozenset[str]:
        drvs = (await self._derivations.members([step])).get(step, [])
        nodes = await self._derivations.nodes(drvs)
        return frozenset(source for node in nodes.values() for source in node.sources)
