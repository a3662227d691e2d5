"""The route tables: all of them is served, nothing else is, and each route asks for what its right says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel, RootModel

from coordinator.api import requests
from coordinator.api.cache_routes import CACHE_ROUTES, NARINFO
from coordinator.api.route import Content, Right, Route
from coordinator.api.routes import ROUTES, SUBMIT
from coordinator.api.web_routes import WEB_ROUTES
from coordinator.config import NamedCacheSettings, OwnerSettings, Settings
from coordinator.errors import BadRequestError, CoordinatorError
from coordinator.http.bodies import parse_model
from coordinator.http.middleware import require_token
from coordinator.http.routing import SERVED, serve
from coordinator.main import open_coordinator
from coordinator.security.clients import ClientTokens
from tests.support.local_fleet import no_workers
from tests.support.routes import addresses

READER, WRITER, OWNER = "r" * 32, "w" * 32, "o" * 32
PUBLIC, PRIVATE = "/cache", "/cache/team"


@pytest.fixture
def with_a_private_cache(tmp_path: Path) -> Settings:
    sources = []
    for name, token in (("readers", READER), ("writers", WRITER), ("owners", OWNER)):
        file = tmp_path / name
        file.write_text(token)
        file.chmod(0o600)
        sources.append(str(file))
    team = NamedCacheSettings(name="team", readers=(sources[0],), writers=(sources[1],))
    owner = OwnerSettings(name="ci", tokens=(sources[2],))
    return Settings(state_dir=tmp_path / "farm", port=0, caches=(team,), owners=(owner,))


def admits(right: Right, prefix: str, holder: str) -> bool:
    """Return whom a right admits at a cache that is public and the API token's to write, and at one that is neither."""
    writer = "api" if prefix == PUBLIC else "writer"
    match right:
        case Right.NONE:
            return True
        case Right.API:
            return holder in {"api", "owner"}
        case Right.PAGE | Right.OPERATE:
            return holder == "api"
        case Right.CHANGE:
            # Forms come from the pages of a session, whatever token is shown beside.
            return False
        case Right.READ:
            return prefix == PUBLIC or holder in {"reader", "writer"}
        case Right.WRITE | Right.UPLOAD:
            return holder == writer


def model_of(route: Route[Any]) -> type[BaseModel] | None:
    """The model that a route's body is."""
    if isinstance(route.body, Content) or route.body is None:
        return None
    found: Any = getattr(requests, route.body) if isinstance(route.body, str) else route.body
    return found if issubclass(found, BaseModel) else RootModel[found]


async def test_each_route_asks_for_what_its_right_says(with_a_private_cache: Settings) -> None:
    wrong = []
    async with open_coordinator(with_a_private_cache, no_workers) as coordinator, aiohttp.ClientSession() as session:
        tokens = {
            "nobody": "",
            "reader": READER,
            "writer": WRITER,
            "owner": OWNER,
            "api": coordinator.ready.token_file.read_text(),
        }
        for route, address, prefix in addresses(PUBLIC, PRIVATE):
            for holder, token in tokens.items():
                headers = {"Authorization": f"Bearer {token.strip()}"} if token else {}
                for method in {route.method, "HEAD"} if route.method == "GET" and route.head else {route.method}:
                    body = b"{}" if route.body is not None else None
                    async with session.request(
                        method, coordinator.ready.url + address, data=body, headers=headers, allow_redirects=False
                    ) as answer:
                        # What is made while the farm serves already may be away at first.
                        broken = answer.status >= 500 and answer.status != 503
                        refused = answer.status == (403 if (route.right, holder) == (Right.OPERATE, "owner") else 401)
                        if refused == admits(route.right, prefix, holder) or broken:
                            wrong.append((holder, method, address, route.right.value, answer.status))
    assert wrong == []


async def test_the_tables_and_nothing_else_are_served(with_a_private_cache: Settings) -> None:
    async with open_coordinator(with_a_private_cache, no_workers) as coordinator:
        served = coordinator.app[SERVED]
        assert set(coordinator.app.router.routes()) == set(served)
        assert set(served.values()) == {*ROUTES, *WEB_ROUTES, *CACHE_ROUTES}


async def test_each_body_is_the_model_that_the_table_names(with_a_private_cache: Settings) -> None:
    nonsense = b'{"nonsense": 1}'
    seen: dict[str, tuple[str, str]] = {}
    async with open_coordinator(with_a_private_cache, no_workers) as coordinator, aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {coordinator.ready.token_file.read_text().strip()}"}
        for route, address, _prefix in addresses(PUBLIC):
            model = model_of(route)
            if model is None:
                continue
            with pytest.raises(BadRequestError) as expected:
                parse_model(nonsense, model)
            url = coordinator.ready.url + address
            async with session.request(route.method, url, data=nonsense, headers=headers) as answer:
                seen[address] = (str(expected.value), (await answer.json())["error"]["message"])
    assert len(seen) >= 11
    assert {address: pair for address, pair in seen.items() if pair[0] != pair[1]} == {}


async def test_an_unknown_address_below_the_api_tells_a_stranger_nothing(with_a_private_cache: Settings) -> None:
    async with open_coordinator(with_a_private_cache, no_workers) as coordinator, aiohttp.ClientSession() as session:
        url, token = coordinator.ready.url, coordinator.ready.token_file.read_text().strip()
        asked: Mapping[str, tuple[int, int]] = {"/api/v1/no-such-thing": (401, 404), "/no-such-thing": (404, 404)}
        for address, expected in asked.items():
            for headers, status in zip(({}, {"Authorization": f"Bearer {token}"}), expected, strict=True):
                async with session.get(url + address, headers=headers) as answer:
                    assert answer.status == status


def test_a_route_without_a_right_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="right"):
        Route("GET", "/x")  # type: ignore[call-arg]


async def _anything(_request: web.Request) -> web.Response:
    return web.Response()


def test_a_cache_s_route_is_not_served_without_its_guard() -> None:
    with pytest.raises(ValueError, match="without the guard for read"):
        serve(web.Application(), {NARINFO: _anything})


@web.middleware
async def _status_of_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except CoordinatorError as error:
        return web.Response(status=error.status)


async def test_a_handler_that_no_table_has_wants_the_token() -> None:
    app = web.Application(middlewares=[_status_of_errors, require_token(ClientTokens("t" * 32))])
    app.router.add_get("/forgotten", _anything)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/forgotten"
        async with aiohttp.ClientSession() as session:
            async with session.get(url) as refused:
                assert refused.status == 401
            async with session.get(url, headers={"Authorization": f"Bearer {'t' * 32}"}) as taken:
                assert taken.status == 200
    finally:
        await runner.cleanup()


def test_parts_of_an_address_are_one_segment_each() -> None:
    hash_part = "0" * 32
    assert NARINFO.address("/cache", hash_part=hash_part) == f"/cache/{hash_part}.narinfo"
    assert Route[None]("GET", "/a/{b}", Right.NONE).address(b="c/../d?e") == "/a/c%2F..%2Fd%3Fe"
    assert SUBMIT.address() == "/api/v1/submissions"
    with pytest.raises(KeyError):
        NARINFO.address("/cache")
