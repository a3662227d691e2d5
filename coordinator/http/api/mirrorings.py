"""Handlers of what populating a cache asks: paths from upstreams, and derivations that the farm has."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import mirror_routes
from coordinator.api.mirroring import KnownDerivationsView, KnownDerivationView
from coordinator.api.requests import KnownDerivationsQuery, MirrorRequest
from coordinator.api.route import Route
from coordinator.caches.mirroring import Mirroring
from coordinator.http.answers import answer
from coordinator.http.bodies import BodyBounds, read_model
from coordinator.http.middleware import CLIENT
from coordinator.stores.derivations import DerivationStore
from infra.nix.errors import FormatError
from infra.nix.store_path import StoreDir, base_name_of

#: 10,000 paths of the longest name.
MIRROR_BODY: Final = BodyBounds(size_bytes=4 * 1024 * 1024, items=10_064, containers=16)
#: A hundred thousand derivations and as many paths.
KNOWN_BODY: Final = BodyBounds(size_bytes=64 * 1024 * 1024, items=200_064, containers=16)


class MirrorApi:
    """The handlers, with the rooms that they ask."""

    def __init__(self, mirroring: Mirroring, derivations: DerivationStore, store_dir: StoreDir) -> None:
        self._mirroring = mirroring
        self._derivations = derivations
        self._store_dir = store_dir

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            mirror_routes.MIRROR: self.begin,
            mirror_routes.MIRRORING: self.run,
            mirror_routes.CANCEL_MIRRORING: self.cancel,
            mirror_routes.KNOWN_DERIVATIONS: self.known,
        }

    async def begin(self, request: web.Request) -> web.Response:
        """Begin a run."""
        wish = await read_model(request, MirrorRequest, MIRROR_BODY)
        owner = request[CLIENT].owner
        return answer(await self._mirroring.begin(wish.paths, owner, wish.keep_as, pull=wish.pull), status=201)

    async def run(self, request: web.Request) -> web.Response:
        """Show a run."""
        return answer(await self._mirroring.view(request.match_info["id"], request.query.get("seen", "")))

    async def cancel(self, request: web.Request) -> web.Response:
        """End a run."""
        return answer(await self._mirroring.cancel(request.match_info["id"]))

    async def known(self, request: web.Request) -> web.Response:
        """Show which derivations are here, and which make some paths."""
        query = await read_model(request, KnownDerivationsQuery, KNOWN_BODY)
        makers = await self._derivations.makers(await asyncio.to_thread(self._store_paths, query.outputs))
        names = map(base_name_of, await asyncio.to_thread(self._store_paths, query.derivations))
        nodes = await self._derivations.nodes(list(dict.fromkeys([*names, *makers.values()])))
        full = self._store_dir.full
        found = tuple(
            KnownDerivationView(path=full(name), system=node.system, outputs=dict(node.outputs))
            for name, node in nodes.items()
        )
        named = {path: full(name) for path, name in makers.items() if name in nodes}
        return answer(KnownDerivationsView(derivations=found, makers=named))

    def _store_paths(self, texts: Sequence[str]) -> list[str]:
        """Return those texts that are full paths of this store."""
        found = []
        for text in texts:
            with suppress(FormatError):
                found.append(self._store_dir.render(self._store_dir.parse(text)))
        return found
