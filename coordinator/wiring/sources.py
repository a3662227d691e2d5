"""Places that sources are had from, opened."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack

import aiohttp

from coordinator.source_settings import SourceSettings
from coordinator.sources.mirror import Mirror
from coordinator.sources.room import SourceRoom
from infra.cache.pulls.upstream import Upstream
from infra.clock import Clock


async def open_mirrors(
    stack: AsyncExitStack, settings: SourceSettings, clock: Clock, sources: SourceRoom, upstreams: Sequence[Upstream]
) -> None:
    """Give `sources` its mirrors, and the upstreams where they are to be asked; `stack` closes what they need."""
    if settings.upstreams:
        sources.upstreams.extend(upstreams)
    if settings.mirrors:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=settings.at_once), cookie_jar=aiohttp.DummyCookieJar()
            )
        )
        max_bytes = settings.max_mib << 20
        sources.mirrors.extend(Mirror(url, session, max_bytes, clock.now) for url in settings.mirrors)
