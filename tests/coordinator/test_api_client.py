"""The client against a real HTTP server that behaves well, badly, and not at all."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from coordinator.api.models import Counts, Ended, Snapshot, SubmissionState, SubmissionView
from coordinator.api.requests import IntakeQuery
from coordinator.api.sent_streams import FramingError
from coordinator.client import token as token_module
from coordinator.client import transport
from coordinator.client.api_client import ApiClient
from coordinator.client.errors import ClientError, RefusedError, UnreachableError
from coordinator.client.event_reader import EventReader
from coordinator.client.token import find_token
from tests.support.served import Handler, served

ENDED = SubmissionView(id="s", label="", state=SubmissionState.SUCCEEDED, created_at=1.0, roots=(), counts=Counts())


@asynccontextmanager
async def client_of(handler: Handler) -> AsyncIterator[ApiClient]:
    async with served(handler, "/") as url, ApiClient(url, "token") as client:
        yield client


def refusal(status: int, body: Any) -> Handler:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    return handler


async def test_a_refusal_keeps_the_coordinator_s_words() -> None:
    error = {"error": {"code": "not_found", "message": "no submission is called x"}}
    async with client_of(refusal(404, error)) as client:
        with pytest.raises(RefusedError, match="no submission is called x") as caught:
            await client.submission("x")
        assert (caught.value.http_status, caught.value.reason) == (404, "not_found")


async def test_a_token_that_is_not_accepted_says_where_to_find_one() -> None:
    async with client_of(refusal(401, {"error": {"code": "unauthorized", "message": "no"}})) as client:
        with pytest.raises(RefusedError, match="--token-file"):
            await client.workers()


async def test_a_server_that_is_no_coordinator_is_named() -> None:
    async with client_of(refusal(502, "<html>")) as client:
        with pytest.raises(RefusedError, match="status 502; is that a drover coordinator"):
            await client.farm()
    async with client_of(refusal(200, "{}")) as client:
        with pytest.raises(ClientError, match="of one version"):
            await client.farm()


async def test_nobody_there_and_no_address_are_told_apart() -> None:
    async with ApiClient("http://127.0.0.1:1", "") as client:
        with pytest.raises(UnreachableError, match=r"http://127\.0\.0\.1:1 \(connection refused\).*drover up"):
            await client.farm()
    async with ApiClient("nonsense", "") as client:
        with pytest.raises(ClientError, match="nonsense"):
            await client.farm()


@pytest.mark.parametrize("fault", [OSError(36, "File name too long"), ValueError("no tree"), FramingError("a cut")])
async def test_an_error_while_a_body_is_made_is_not_reported_as_the_networks(fault: Exception) -> None:
    async def swallow(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(text="{}")

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 1_000_000
        raise fault

    for send in (ApiClient.send_sources, ApiClient.send_derivations):
        async with client_of(swallow) as client:
            with pytest.raises((ClientError, FramingError)) as caught:
                await send(client, pieces())
        assert not isinstance(caught.value, UnreachableError)
        assert str(fault) in str(caught.value)


async def test_names_become_one_segment_of_the_path_and_the_token_a_header() -> None:
    seen: list[tuple[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.raw_path, request.headers["Authorization"]))
        raise web.HTTPNotFound

    async with client_of(handler) as client:
        with pytest.raises(RefusedError):
            await client.step("a/../b?c=d+e")
    assert seen == [("/api/v1/steps/a%2F..%2Fb%3Fc%3Dd%2Be", "Bearer token")]


async def test_a_stream_that_fails_while_it_is_made_says_why() -> None:
    async def handler(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=204)

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        raise FramingError("the source s changed while it was being sent")

    async with client_of(handler) as client:
        with pytest.raises(FramingError, match="the source s changed"):
            await client.send_sources(body())


async def test_a_question_about_many_names_is_one_request() -> None:
    bodies: list[bytes] = []

    async def handler(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.json_response({"derivations": [], "sources": []})

    names = tuple(f"{n:032d}-x.drv" for n in range(50_000))
    app_limit = 64 * 1024 * 1024
    app = web.Application(client_max_size=app_limit)
    app.router.add_post("/api/v1/intake/missing", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ApiClient(f"http://127.0.0.1:{runner.addresses[0][1]}", "") as client:
            await client.missing(IntakeQuery(store_dir="/nix/store", derivations=names, sources=()))
    finally:
        await runner.cleanup()
    assert len(json.loads(bodies[0])["derivations"]) == 50_000
    assert len(bodies) == 1


async def test_a_question_whose_answer_was_lost_is_sent_again_where_that_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "RECONNECT_FIRST_S", 0.01)
    standing_by = refusal(503, {"error": {"code": "unavailable", "message": "this coordinator stands by"}})
    left: list[Handler | None] = []
    asked: list[str] = []

    async def lost(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path}")
        behave = left.pop(0) if left else None
        return await behave(request) if behave else web.Response(body=orjson.dumps(ENDED))

    why: list[str] = []
    async with client_of(handler) as client:
        client.on_lost = why.append
        left[:] = [lost]
        with pytest.raises(UnreachableError):
            await client.submission("s")
        assert len(asked) == 1, "before the first answer the address is most often wrong"
        await client.submission("s")
        asked.clear()
        left[:] = [lost, standing_by, lost]
        await client.cancel("s")
        assert asked == ["POST /api/v1/submissions/s/cancel"] * 4
        assert len(why) == 1
        asked.clear()
        left[:] = [lost]
        with pytest.raises(UnreachableError):
            await client.collect("default", dry_run=False)
        assert len(asked) == 1, "a collection takes long and is begun once"
        left[:] = [standing_by] * 1000
        monkeypatch.setattr(transport, "RECONNECT_GIVE_UP_S", 0.05)
        with pytest.raises(RefusedError, match="stands by"):
            await client.submission("s")


def frames(*events: Snapshot | Ended) -> bytes:
    return b"".join(b": comment\n\nevent: x\ndata: " + orjson.dumps(event) + b"\n\n" for event in events)


async def test_a_watch_begins_again_after_a_break_and_reports_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RECONNECT_FIRST_S", 0.01)
    snapshot = Snapshot(submission=ENDED, steps=())
    answers = [frames(snapshot)[:-1], frames(snapshot), None, frames(snapshot, Ended(submission=ENDED))]

    async def handler(request: web.Request) -> web.StreamResponse:
        answer = answers.pop(0)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.prepare(request)
        await response.write(answer)
        return response

    lost: list[str] = []
    async with client_of(handler) as client:
        events = [event async for event in client.watch("s", on_lost=lost.append)]
    assert [type(event) for event in events] == [Snapshot, Snapshot, Ended]
    assert not answers
    assert len(lost) == 2


async def test_a_watch_that_broke_names_what_it_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RECONNECT_FIRST_S", 0.01)
    snapshot = Snapshot(submission=ENDED, steps=())
    answers = [frames(snapshot) + b"id: feed-7\n\n", b"id: feed-8\n\n", frames(Ended(submission=ENDED))]
    named: list[str | None] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        named.append(request.headers.get("Last-Event-ID"))
        return web.Response(body=answers.pop(0), content_type="text/event-stream")

    async with client_of(handler) as client:
        events = [event async for event in client.watch("s")]
    assert [type(event) for event in events] == [Snapshot, Ended]
    assert named == [None, "feed-7", "feed-8"]


async def test_a_watch_that_finds_no_stream_free_looks_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RECONNECT_LONGEST_S", 0.01)
    states = [SubmissionState.RUNNING, SubmissionState.RUNNING, SubmissionState.SUCCEEDED]
    crowded = refusal(503, {"error": {"code": "unavailable", "message": "too many clients are watching"}})

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/events"):
            return await crowded(request)
        if request.path.endswith("/steps"):
            return web.json_response([])
        return web.Response(body=orjson.dumps(replace(ENDED, state=states.pop(0))))

    lost: list[str] = []
    async with client_of(handler) as client:
        events = [event async for event in client.watch("s", on_lost=lost.append)]
    assert [type(event) for event in events] == [Snapshot, Snapshot, Snapshot, Ended]
    assert lost == ["too many clients are watching"]


async def test_a_watch_gives_up_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RECONNECT_FIRST_S", 0.01)
    monkeypatch.setattr(transport, "RECONNECT_GIVE_UP_S", 0.1)
    sent = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        if not sent.is_set():
            sent.set()
            await response.write(frames(Snapshot(submission=ENDED, steps=())))
        return response

    async with client_of(handler) as client:
        with pytest.raises(UnreachableError):
            async for _ in client.watch("s"):
                pass


def test_events_are_cut_at_blank_lines_wherever_the_chunks_end() -> None:
    stream = b": hello\n\nevent: a\ndata: 1\ndata: 2\n\r\ndata:3\r\n\r\n"
    for size in range(1, len(stream)):
        reader = EventReader()
        found = [data for at in range(0, len(stream), size) for data in reader.feed(stream[at : at + size])]
        assert found == [b"1\n2", b"3"], size


def test_the_token_is_found_where_it_is_named_or_in_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DROVER_TOKEN_FILE", raising=False)
    monkeypatch.setenv("DROVER_STATE_DIR", str(tmp_path))
    assert find_token() == ""
    (tmp_path / "api-token").write_text("from-state\n")
    assert find_token() == "from-state"
    (tmp_path / "other").write_text("named\n")
    monkeypatch.setenv("DROVER_TOKEN_FILE", str(tmp_path / "other"))
    assert find_token() == "named"
    monkeypatch.setattr(token_module, "_taken", [])
    monkeypatch.setenv("DROVER_TOKEN", "itself\n")
    assert find_token(str(tmp_path / "other")) == "named"
    # Nothing that the program starts has it, and the program itself still does.
    assert "DROVER_TOKEN" not in os.environ
    assert find_token() == find_token() == "itself"
    with pytest.raises(ClientError, match="cannot read the token file"):
        find_token(str(tmp_path / "none"))
