"""The API behind `drover sources`."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from coordinator.api.route import Route
from coordinator.api.source_routes import SOURCES
from coordinator.http.api.pages import Page, answer_page, cut, limit_of, position_of, words_of
from coordinator.sources.listing import SourceListing


class SourcesApi:
    """The handler."""

    def __init__(self, listing: SourceListing) -> None:
        self._listing = listing

    def handlers(self) -> dict[Route[Any], Handler]:
        """Return the handler of each route."""
        return {SOURCES: self.sources}

    async def sources(self, request: web.Request) -> web.Response:
        """List sources that the farm could not do without."""
        position, limit = position_of(request), limit_of(request)
        rows = await self._listing.rows(words_of(request, SOURCES.named("trouble")))
        page = cut(rows, position, limit)
        views = Page(await self._listing.views(page.rows), page.following)
        return await answer_page(request, views, lambda view: view)
