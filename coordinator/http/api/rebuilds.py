"""Handlers for builds that are not submitted yet, and for two builds of the same."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api import routes
from coordinator.api.limits import MAX_OUTPUT_PAIRS, MAX_PAIRS, MAX_ROOTS
from coordinator.api.rebuild_models import ComparedOutputsView, ComparedOutputView
from coordinator.api.requests import ForecastQuery, PairsQuery
from coordinator.api.route import Route
from coordinator.errors import IntakeError, UnavailableError
from coordinator.http.answers import json_of
from coordinator.http.bodies import BodyBounds, read_model
from coordinator.intake.forecast import Forecaster
from coordinator.readmodel.comparisons import Comparisons
from coordinator.rebuild.causes import causes_view
from infra.cache.likeness import ComparedOutputs, Likenesses, TooManyQuestionsError
from infra.nix.difference import ChangedInput
from infra.nix.errors import FormatError
from infra.nix.store_path import base_name_of, parse_base_name

#: Bodies: so many paths of some 150 bytes.
_FORECAST: Final = BodyBounds(32 * 1024 * 1024, items=MAX_ROOTS + 64, containers=16)
_PAIRS: Final = BodyBounds(32 * 1024 * 1024, items=2 * MAX_PAIRS + 64, containers=16)
#: Questions about causes that wait for the one that is answered.
MAX_WAITING: Final = 4


class RebuildApi:
    """The handlers, with the rooms that they ask."""

    def __init__(self, forecaster: Forecaster, likenesses: Likenesses, comparisons: Comparisons) -> None:
        self._forecaster = forecaster
        self._likenesses = likenesses
        self._comparisons = comparisons
        self._folding = 0

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {
            routes.FORECAST: self.forecast,
            routes.COMPARE_OUTPUTS: self.compare_outputs,
            routes.REBUILD_CAUSES: self.causes,
        }

    async def forecast(self, request: web.Request) -> web.Response:
        """Say what a submission would build."""
        query = await read_model(request, ForecastQuery, _FORECAST)
        return await _large(await self._forecaster.of(query.drvs))

    async def compare_outputs(self, request: web.Request) -> web.Response:
        """Say which outputs are equal but for hashes."""
        query = await read_model(request, PairsQuery, _PAIRS)
        pairs = _pairs(query)
        if len(pairs) > MAX_OUTPUT_PAIRS:
            raise IntakeError(f"{len(pairs)} pairs of outputs; ask for {MAX_OUTPUT_PAIRS} at once at most.")
        try:
            found = await self._likenesses.compare(pairs)
        except TooManyQuestionsError:
            raise UnavailableError("too many outputs are being compared; ask again in a moment.") from None
        return await _large(ComparedOutputsView(outputs=tuple(map(_output_view, found))))

    async def causes(self, request: web.Request) -> web.Response:
        """Say what changed derivations follow from."""
        query = await read_model(request, PairsQuery, _PAIRS)
        changed = [ChangedInput(before, after) for before, after in _pairs(query)]
        await asyncio.to_thread(_require_derivations, changed)
        if self._folding >= MAX_WAITING:
            raise UnavailableError("too many sets of derivations are being compared; ask again in a moment.")
        self._folding += 1
        try:
            folded = await self._comparisons.fold(changed)
        finally:
            self._folding -= 1
        return await _large(await asyncio.to_thread(causes_view, changed, folded))


def _pairs(query: PairsQuery) -> list[tuple[str, str]]:
    if len(query.before) != len(query.after):
        raise IntakeError(f"there are {len(query.before)} paths before and {len(query.after)} after; send pairs.")
    return list(zip(query.before, query.after, strict=True))


def _require_derivations(changed: list[ChangedInput]) -> None:
    for pair in changed:
        for path in (pair.before, pair.after):
            try:
                parse_base_name(base_name_of(path))
            except FormatError:
                raise IntakeError(f"{path[:300]!r} is not the path of a derivation.") from None
            if not path.endswith(".drv"):
                raise IntakeError(f"{path[:300]!r} is not the path of a derivation.")


def _output_view(compared: ComparedOutputs) -> ComparedOutputView:
    return ComparedOutputView(
        likeness=compared.likeness.value,
        nar_before=compared.nar_sizes[0],
        nar_after=compared.nar_sizes[1],
        closure_before=compared.closure_sizes[0],
        closure_after=compared.closure_sizes[1],
    )


async def _large(record: object) -> web.Response:
    """Answer with what may take long to write, beside the event loop."""
    return web.Response(body=await asyncio.to_thread(json_of, record), content_type="application/json")
