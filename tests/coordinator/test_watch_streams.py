"""Watch streams over real sockets: what is new is rendered once for all, and a reader that stops costs no other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from coordinator.api.models import StepView
from coordinator.http.api import events
from coordinator.http.api.events import LEAST_PAUSE_S, PAUSE_S, WatchStreams, pause_s
from coordinator.readmodel.rows import StepRow
from tests.coordinator.test_views import DrivenViews, spec, submission
from tests.support.patience import PATIENCE_S

WATCHERS = 40


class Reader:
    """One stream, with what its reader knows of the submission after each event."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.types: list[str] = []
        self.states: dict[str, str] = {}
        self.places: dict[str, tuple[str, int]] = {}
        self.done = 0
        #: What the newest `id:` says.
        self.last_id = ""

    async def until_done(self, count: int) -> None:
        """Read until the counts say that so many steps are done, and where one would go on behind that."""
        async with asyncio.timeout(PATIENCE_S):
            while self.done < count or not self.types:
                await self._event()
                self.last_id = ""
            while not self.last_id:
                await self._event()

    def leave(self) -> None:
        """Break the connection."""
        self._response.close()

    async def until_end(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while "end" not in self.types:
                await self._event()

    async def _event(self) -> None:
        lines = []
        while line := (await self._response.content.readline()).strip():
            lines.append(line)
        if lines[0].startswith(b":"):
            return
        if lines[0].startswith(b"id: "):
            self.last_id = lines[0].removeprefix(b"id: ").decode()
            return
        self.types.append(lines[0].split()[1].decode())
        event = orjson.loads(lines[1].removeprefix(b"data: "))
        steps = event["steps"] if self.types[-1] == "snapshot" else [event["step"]] if "step" in event else []
        if self.types[-1] == "snapshot":
            self.states, self.places = {}, {}
        self.states.update({step["key"]: step["state"] for step in steps})
        self.places.update({node["key"]: (node["above"], node["pending"]) for node in event.get("tree", ())})
        counts = event.get("counts") or event.get("submission", {}).get("counts")
        self.done = counts["done"] if counts else self.done


class Served:
    """Views of a real core with one submission, and a server of its streams."""

    def __init__(self, driven: DrivenViews, url: str, http: aiohttp.ClientSession) -> None:
        self.driven = driven
        self.url = url
        self._http = http

    async def watch(self, last_id: str = "") -> Reader:
        return Reader(await self._http.get(self.url, headers={"Last-Event-ID": last_id} if last_id else {}))


@asynccontextmanager
async def served(steps: int) -> AsyncIterator[Served]:
    """Serve a chain of steps, the first of which is needed first."""
    driven = DrivenViews()
    names = [f"k{number}" for number in range(steps)]
    graph = [spec(name, *names[number - 1 : number]) for number, name in enumerate(names)]
    driven.tell(submission("s", names[-1], *graph))
    streams = WatchStreams(driven.views, 1000)
    app = web.Application()

    async def serve(request: web.Request) -> web.StreamResponse:
        return await streams.serve(request, driven.views.submission("s"))

    app.router.add_get("/", serve)
    listener = socket.create_server(("127.0.0.1", 0))
    # Connections inherit it: the system keeps little for a reader that stops.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    async with aiohttp.ClientSession() as http:
        try:
            yield Served(driven, f"http://127.0.0.1:{listener.getsockname()[1]}/", http)
        finally:
            streams.stop()
            await runner.cleanup()
            listener.close()


async def test_a_change_is_rendered_once_for_all_watchers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(5) as farm:
        driven = farm.driven
        driven.join()
        readers = [await farm.watch() for _ in range(WATCHERS)]
        for reader in readers:
            await reader.until_done(0)
        rendered: list[str] = []
        original = driven.views.step_view

        def counted(row: StepRow) -> StepView:
            rendered.append(row.key)
            return original(row)

        monkeypatch.setattr(driven.views, "step_view", counted)
        driven.publish("k0")
        for reader in readers:
            await reader.until_done(1)
        assert sorted(rendered) == ["k0", "k1"]
        assert all(reader.states == {"k0": "done", "k1": "running"} for reader in readers)


def test_the_next_change_waits_by_what_the_one_before_cost_all_feeds() -> None:
    """A build that ends for one watcher, a thousand builds, a thousand watchers, and fifty submissions with some."""
    assert pause_s(1_500, 1, 1) == pytest.approx(LEAST_PAUSE_S, abs=0.002)
    assert pause_s(1_000_000, 1, 1) == pause_s(1_500, 1_000, 1) == pause_s(1_500, 5, 50) == PAUSE_S
    assert pause_s(1_500, 5, 1) < pause_s(15_000, 5, 1) < pause_s(15_000, 5, 2) < PAUSE_S


async def test_changes_do_not_wait_for_what_a_snapshot_cost_and_the_next_snapshot_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "RENDERED_BYTE_S", 1.0)
    monkeypatch.setattr(events, "PAUSE_S", 3600.0)
    async with served(6) as farm:
        farm.driven.join()
        reader = await farm.watch()
        await reader.until_done(0)
        # The one change that there may be in this hour.
        farm.driven.publish("k0")
        await reader.until_done(1)
        assert reader.types[0] == "snapshot"
        assert set(reader.types[1:]) == {"step", "counts"}


async def test_a_stream_that_begins_late_knows_what_the_others_know() -> None:
    async with served(6) as farm:
        farm.driven.join()
        first = await farm.watch()
        await first.until_done(0)
        for number in range(3):
            farm.driven.publish(f"k{number}")
            await first.until_done(number + 1)
        late = await farm.watch()
        await late.until_done(3)
        assert late.types[0] == "snapshot"
        open_places = {key: place for key, place in first.places.items() if first.states.get(key) != "done"}
        assert {key: late.places[key] for key in open_places} == open_places
        for reader in (first, late):
            farm.driven.finish()
            await reader.until_end()
        assert late.states["k5"] == first.states["k5"] == "done"
        after = await farm.watch()
        await after.until_end()
        assert after.types == ["snapshot", "end"]


async def test_a_reader_that_stops_has_little_queued_and_gets_a_snapshot_when_it_reads_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "BEHIND_BYTES", 16 * 1024)
    async with served(1_000) as farm:
        driven = farm.driven
        driven.join()
        other = await farm.watch()
        await other.until_done(0)
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = farm.url.removeprefix("http://").rstrip("/").partition(":")
        plain.connect((host, int(port)))
        reader, writer = await asyncio.open_connection(sock=plain, limit=1 << 24)
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await reader.readuntil(b"event: snapshot")
        transport: Any = writer.transport
        transport.pause_reading()
        for number in range(900):
            driven.publish(f"k{number}")
            # Else the builder has been silent for too long.
            driven.now = 1000.0
            if number % 100 == 99:
                await other.until_done(number + 1)
        transport.resume_reading()
        async with asyncio.timeout(PATIENCE_S):
            await reader.readuntil(b"event: snapshot")
            await reader.readline()
            assert b'"done":900' in await reader.readline()
            driven.publish("k900")
            rest = await reader.readuntil(b"event: counts")
        writer.close()
        assert b"event: snapshot" not in rest
        assert b'"k901"' in rest


async def test_a_stream_that_comes_back_goes_on_behind_what_it_has_read() -> None:
    async with served(6) as farm:
        farm.driven.join()
        first = await farm.watch()
        await first.until_done(0)
        farm.driven.publish("k0")
        await first.until_done(1)
        first.leave()
        for number in (1, 2):
            farm.driven.publish(f"k{number}")
        again = await farm.watch(first.last_id)
        again.states = dict(first.states)
        await again.until_done(3)
        assert "snapshot" not in again.types
        assert again.states == {"k0": "done", "k1": "done", "k2": "done", "k3": "running"}
        farm.driven.finish()
        await again.until_end()
        assert again.states["k5"] == "done"


@pytest.mark.parametrize(
    "last_id", ["", "0123456789abcdef-1", "{}-99", "{}--1", "{}-\u0663", "{}-" + "9" * 40, "{}", "-"]
)
async def test_an_id_that_names_nothing_kept_gets_a_snapshot(last_id: str) -> None:
    async with served(3) as farm:
        farm.driven.join()
        first = await farm.watch()
        await first.until_done(0)
        name = first.last_id.partition("-")[0]
        other = await farm.watch(last_id.format(name))
        await other.until_done(0)
        assert other.types[0] == "snapshot"


async def test_what_is_kept_for_streams_that_come_back_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEPT_BYTES", 1500)
    async with served(20) as farm:
        farm.driven.join()
        first, other = await farm.watch(), await farm.watch()
        await first.until_done(0)
        await other.until_done(0)
        first.leave()
        for number in range(15):
            farm.driven.publish(f"k{number}")
            await other.until_done(number + 1)
        again = await farm.watch(first.last_id)
        await again.until_done(15)
        assert again.types[0] == "snapshot"
        late = await farm.watch(other.last_id)
        farm.driven.publish("k15")
        await late.until_done(16)
        assert "snapshot" not in late.types


async def test_a_submission_without_a_stream_is_followed_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LINGER_S", 0.0)
    async with served(6) as farm:
        farm.driven.join()
        first = await farm.watch()
        await first.until_done(0)
        feeds = {task for task in asyncio.all_tasks() if task.get_name() == "watch feed"}
        assert len(feeds) == 1
        first.leave()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait(feeds)
        again = await farm.watch(first.last_id)
        await again.until_done(0)
        assert again.types[0] == "snapshot"
