"""The proxy as a whole: its parts, the socket it listens on, and its life."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from coordinator.cache_proxy.disk import LEAST_BYTES, ProxyFiles
from coordinator.cache_proxy.errors import ProxyError, ProxySettingsError
from coordinator.cache_proxy.lookups import NarinfoLookups
from coordinator.cache_proxy.model import ProxySettings
from coordinator.cache_proxy.nars import ProxyNars
from coordinator.cache_proxy.prefetch import NarPrefetch
from coordinator.cache_proxy.server import ProxySite, is_loopback, own_hosts
from coordinator.cache_proxy.tokens import upstream_headers
from coordinator.cache_proxy.upstream import CLOSURE_SILENCE_S, CONNECT_S, CONNECTIONS, ProxyUpstream
from infra.nix.store_path import StoreDir

#: Seconds that a connection may be idle: longer than any client (Nix 2.35: 90) keeps one.
KEEP_ALIVE_S: Final = 120.0
#: Seconds for answers that are under way when the proxy ends.
ENDING_S: Final = 2.0
#: Bytes that wait to be read of one answer of an upstream.
READ_BYTES: Final = 256 * 1024


def checked(settings: ProxySettings) -> ProxySettings:
    """Return the settings with tidy addresses.

    Raises:
        ProxySettingsError: one of them cannot be.
    """
    if not settings.upstreams:
        raise ProxySettingsError("name a cache to ask: --upstream https://farm.example.org/cache")
    urls = tuple(dict.fromkeys(url.rstrip("/") for url in settings.upstreams))
    for url in urls:
        try:
            place = urlsplit(url)
            port = place.port
        except ValueError:
            place, port = urlsplit(""), None
        if place.scheme not in {"http", "https"} or not place.hostname or place.query or place.fragment:
            raise ProxySettingsError(f"an upstream is written like https://farm.example.org/cache, not {url[:80]!r}")
        if place.username or place.password:
            raise ProxySettingsError("a token belongs into the file of --netrc, not into the address of an upstream")
        if is_loopback(place.hostname) and settings.port and port == settings.port:
            raise ProxySettingsError(f"{url} is this proxy itself; name another --port")
    if settings.max_bytes < LEAST_BYTES:
        raise ProxySettingsError(f"--max-size must be at least {LEAST_BYTES // 1024**2}M")
    headers = upstream_headers(settings.netrc, urls)
    if any(headers.values()) and not is_loopback(settings.listen):
        raise ProxySettingsError(
            f"with a token for an upstream the proxy listens on this machine alone, not on {settings.listen}: "
            "whoever reaches it would read with that token"
        )
    return ProxySettings(
        urls, settings.directory, settings.max_bytes, settings.listen, settings.port, settings.netrc, settings.store_dir
    )


@asynccontextmanager
async def running(settings: ProxySettings, now: Callable[[], float] = time.time) -> AsyncIterator[str]:
    """Run a proxy; gives its address. It has ended, and given its directory back, when this is left.

    Raises:
        ProxyError: it cannot start.
    """
    settings = checked(settings)
    loop = asyncio.get_running_loop()
    headers = upstream_headers(settings.netrc, settings.upstreams)
    listener = _listen(settings)
    try:
        files = ProxyFiles(settings.directory, settings.max_bytes)
        await asyncio.to_thread(files.open)
    except BaseException:
        listener.close()
        raise
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=CLOSURE_SILENCE_S)
    connector = aiohttp.TCPConnector(limit=0, limit_per_host=CONNECTIONS, keepalive_timeout=60.0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), read_bufsize=READ_BYTES
    ) as session:
        upstreams = [ProxyUpstream(url, session, headers[url], loop.time) for url in settings.upstreams]
        lookups = NarinfoLookups(upstreams, files, StoreDir(settings.store_dir), now)
        nars = ProxyNars(lookups, files)
        prefetch = NarPrefetch(lookups, nars, settings.max_bytes, loop.time)
        port = listener.getsockname()[1]
        site = ProxySite(lookups, nars, prefetch, settings.store_dir)
        runner = web.AppRunner(
            site.application(own_hosts(settings.listen, port)),
            access_log=None,
            keepalive_timeout=KEEP_ALIVE_S,
            shutdown_timeout=ENDING_S,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            host = f"[{settings.listen}]" if ":" in settings.listen else settings.listen
            yield f"http://{host}:{port}"
        finally:
            await nars.close()
            await lookups.close()
            await runner.cleanup()
            files.close()


def _listen(settings: ProxySettings) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(
            settings.listen, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(place[:2], family=family, backlog=256)
    except OSError as error:
        raise ProxyError(
            f"cannot listen on {settings.listen} port {settings.port}: {error.strerror}; name another --port"
        ) from None
    listener.setblocking(False)
    return listener
