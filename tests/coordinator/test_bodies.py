"""Bodies of requests: every nasty one is one clear refusal, for little work."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from io import BytesIO
from traceback import walk_tb

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pydantic import BaseModel

from coordinator.api.cache_routes import NarinfosQuestion
from coordinator.api.requests import DrainRequest, SubmitRequest
from coordinator.errors import BadRequestError
from coordinator.http.binary_cache.closures import QUESTION_BOUNDS
from coordinator.http.bodies import SMALL, BodyBounds, parse_model, read_model
from coordinator.http.middleware import is_host, is_own_host
from infra.loop_watch import STALL_S, LoopWatch
from infra.upload.protocol import Begin
from tests.support.bodies import NASTY


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """Python's collector looks at all that the tests before have left: that is no cost of a body."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("model", [NarinfosQuestion, SubmitRequest, Begin, DrainRequest])
@pytest.mark.parametrize("name", NASTY)
async def test_every_nasty_body_is_one_short_refusal(name: str, model: type[BaseModel]) -> None:
    with LoopWatch() as watch, pytest.raises(BadRequestError) as raised:
        parse_model(NASTY[name][: QUESTION_BOUNDS.size_bytes], model, QUESTION_BOUNDS)
    assert len(str(raised.value)) < 300
    assert watch.longest_s < STALL_S


@pytest.mark.parametrize("name", ["half a million ones", "half a million objects", "half a million keys"])
async def test_a_wide_route_counts_before_it_makes_objects(name: str) -> None:
    bounds = BodyBounds(size_bytes=2**30, items=100_000, containers=100_000)
    with LoopWatch() as watch, pytest.raises(BadRequestError, match="elements"):
        parse_model(NASTY[name], SubmitRequest, bounds)
    assert watch.longest_s < STALL_S


async def test_the_first_wrong_element_of_many_is_the_only_one_that_is_looked_at() -> None:
    bounds = BodyBounds(size_bytes=2**30, items=10**6, containers=10**6)
    body = b'{"roots":[' + b",".join([b'{"x":1}'] * 100_000) + b"]}"
    with pytest.raises(BadRequestError, match=r"^the request's roots\.0\.attr is wrong"):
        parse_model(body, SubmitRequest, bounds)


async def test_what_a_refused_body_became_does_not_come_to_the_event_loop() -> None:
    bounds = BodyBounds(size_bytes=2**30, items=10**6, containers=10**6)
    refusals: list[Exception] = []

    async def handle(request: web.Request) -> web.Response:
        try:
            await read_model(request, SubmitRequest, bounds)
        except BadRequestError as error:
            refusals.append(error)
        return web.Response()

    app = web.Application()
    app.router.add_put("/", handle)
    async with TestClient(TestServer(app)) as client:
        await client.put("/", data=BytesIO(b'{"roots":[' + b",".join([b'{"x":1}'] * 100_000) + b"]}"))
    [refusal] = refusals
    holders = [frame.f_code.co_name for frame, _ in walk_tb(refusal.__traceback__)]
    assert "read_model" in holders
    assert "parse_model" not in holders, "its frame keeps what it made"


def test_keys_are_counted_before_they_are_made() -> None:
    bounds = BodyBounds(size_bytes=2**30, items=10**6, containers=10**6)
    tracemalloc.start()
    try:
        with pytest.raises(BadRequestError, match="more than 32 keys"):
            parse_model(NASTY["half a million keys"], SubmitRequest, bounds)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_text_that_looks_like_keys_is_taken() -> None:
    tricky = b'{"roots": [{"attr" : "a\\":\\\\", "drv":"\\"x\\":{1}[,]"}], "label": "\\"label\\":"}'
    assert parse_model(tricky, SubmitRequest, SMALL).label == '"label":'


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.0.0.1:1", "[::1]:7878", "farm.example:65535", "LOCALHOST:7878"]
)
def test_a_host_is_a_name_or_an_address_and_perhaps_a_port(host: str) -> None:
    assert is_host(host)
    assert is_own_host(host, "http://farm.example:7878")


NO_HOSTS = (
    *("", "evil@127.0.0.1", "127.0.0.1:abc", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:", "127.0.0.1:80:80", "::1"),
    *("[::1", "[::1%lo]", "[x]", "127.0.0.1/", "127.0.0.1#", "127.0.0.1,127.0.0.1", " 127.0.0.1", "localhost\u0660"),
)


@pytest.mark.parametrize("host", NO_HOSTS)
def test_no_other_text_is_a_host(host: str) -> None:
    assert not is_host(host)
    assert not is_own_host(host, "http://farm.example:7878")
