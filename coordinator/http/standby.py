"""Answers of a coordinator that stands by while another one works on the same database: status 503 everywhere."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import orjson
from aiohttp import web

from coordinator.api.routes import HEALTH
from coordinator.http.answers import error_answer
from coordinator.http.binary_cache.fast_answers import FastAnswers, FastSite

#: When a client may ask again, in seconds.
RETRY_AFTER_S = 2
_HEADERS: Final = {"Retry-After": str(RETRY_AFTER_S), "Cache-Control": "no-store"}
_SENTENCE = "this coordinator stands by while another one works on the same database; ask that one, or try again later."


@asynccontextmanager
async def serving_standby(listener: socket.socket) -> AsyncIterator[Callable[[], None]]:
    """Give a function that makes `listener` answer until the block ends; the socket itself stays open."""
    app = web.Application()
    app.router.add_get(HEALTH.path, _health)
    app.router.add_route("*", "/{anything:.*}", _refuse)
    runner = web.AppRunner(app, shutdown_timeout=1.0, access_log=None)
    starting: list[asyncio.Task[None]] = []

    async def start() -> None:
        await runner.setup()
        # A copy: ending the site closes it, and clients go on knocking at the same address.
        await FastSite(runner, listener.dup(), FastAnswers((), lambda _: False)).start()

    def answer() -> None:
        starting.append(asyncio.create_task(start(), name="standby"))

    try:
        yield answer
    finally:
        for task in starting:
            await task
        await runner.cleanup()


async def _health(_request: web.Request) -> web.Response:
    return web.Response(
        body=orjson.dumps({"status": "standby"}), status=503, content_type="application/json", headers=_HEADERS
    )


async def _refuse(_request: web.Request) -> web.Response:
    return error_answer(503, "standby", _SENTENCE, _HEADERS)
