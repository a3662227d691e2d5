"""NARs that the cache has lost, from the workers that still have them in their stores.

A worker is ordered to upload the path again, as after a build: it may write exactly that path. What came is read
back and verified like anything else, and must be the very bits that were published.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable

from coordinator.readmodel.views import Views
from infra.nix.narinfo import NarInfo
from infra.objects.errors import CacheError
from infra.objects.nar_reader import fetch_nar
from infra.objects.store import ObjectStore
from workers.wire.fleet import Fleet, FleetError

_log = logging.getLogger(__name__)


class WorkerSource:
    """The workers of a farm as a `RepairSource`; `token` makes what lets one upload the path of a base name."""

    name = "a worker"

    def __init__(self, fleet: Fleet, views: Views, objects: ObjectStore, token: Callable[[str], str]) -> None:
        self._fleet = fleet
        self._views = views
        self._objects = objects
        self._token = token

    async def nar(self, info: NarInfo) -> AsyncGenerator[bytes, None] | None:
        """Return the NAR of a path that a worker has with the same bits. What a worker cannot do is no error."""
        for worker in self._views.workforce.answering():
            try:
                outputs = await self._fleet.provide(worker, [info.store_path], self._token(info.base_name))
            except (FleetError, CacheError) as error:
                _log.warning("worker %s was asked for %s: %s", worker, info.base_name, error)
                continue
            for output in outputs:
                if (output.path, output.nar_hash) == (info.store_path, info.path.nar_hash):
                    return fetch_nar(self._objects, output.narinfo())
        return None
