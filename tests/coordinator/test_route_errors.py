"""The refusals that the route tables list: each is provoked on its route, and no other is ever given.

The second half is held by every test of this directory (`only_listed_refusals` in its `conftest`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import aiohttp
import pytest
from aiohttp import web

from coordinator.api import (
    cache_routes,
    environment_routes,
    evaluation_routes,
    mirror_routes,
    plan_routes,
    routes,
    web_routes,
)
from coordinator.api.route import EVERY_ROUTE, Content, Right, Route
from coordinator.config import OwnerSettings, Settings
from coordinator.environments.submitted import SubmittedContent
from coordinator.environments.tracker import EnvironmentTracker
from coordinator.errors import ConflictError, ForbiddenError, IntakeError, NotFoundError
from coordinator.http import bodies
from coordinator.http.api import environments, evaluations, submissions
from coordinator.http.binary_cache import uploads as upload_routes
from coordinator.http.routing import serve
from coordinator.http.web import forms
from coordinator.intake.growth import Growth
from coordinator.intake.intake import Intake
from coordinator.intake.submissions import Submissions
from coordinator.main import Coordinator, open_coordinator
from coordinator.remote_evaluation.evaluations import RemoteEvaluations
from coordinator.remote_settings import RemoteEvaluationSettings
from coordinator.security.farm_secrets import UPLOAD_SECRET
from coordinator.security.upload_tokens import UploadTokens
from coordinator.wishes.model import WishList, WishSource
from infra.cache.cache import Cache
from infra.cache.uploads import uploads
from infra.cache.uploads.errors import ForbiddenPathError, WrongOffsetError
from infra.clock import SystemClock
from infra.nix.narinfo import StoredNar
from infra.objects.errors import CacheError, StoreFullError
from infra.objects.nar_encoder import UploadedNar
from infra.upload.packs import make_pack
from infra.upload.protocol import PathClaim
from scheduler.model import LeaseId, StepKey
from tests.coordinator.test_http_cache_puts import upload_of
from tests.coordinator.test_web import CSRF
from tests.support import patience
from tests.support.cache import base_name, publish, store_path
from tests.support.local_fleet import no_workers
from tests.support.routes import PARTS, addresses

Pair = tuple[str, int]
PREFIX = "/cache"
#: Token of an owner.
OWNER = "o" * 32
#: Bytes that a request announces and never sends.
TOO_LARGE = 10**13
#: What a sender of half a body is granted here.
PATIENCE_S = 0.2
A, B = store_path("a"), store_path("b")
HASH = f"sha256:{'0' * 52}"
CLAIM = {"path": base_name(A), "nar_hash": HASH, "nar_size": 100}
#: A body of each route that takes JSON and refuses what it names.
BODIES: Mapping[Route[Any], object] = {
    routes.DRAIN: {},
    routes.PIN: {"paths": [A]},
    routes.COLLECT: {},
    mirror_routes.MIRROR: {"paths": [A]},
    mirror_routes.KNOWN_DERIVATIONS: {},
    evaluation_routes.EVALUATE: {"tree": PARTS["tree"], "file": "default.nix"},
    routes.VERIFY: {},
    environment_routes.PUSH_SUBMISSION: {"submission": "0"},
    cache_routes.URLS: {"paths": [base_name(B)]},
    cache_routes.PARTS: {"path": base_name(B), "first": 1, "count": 1},
    cache_routes.COMMIT: {"sent": [{"path": base_name(B), "file_hash": HASH, "file_size": 1}]},
}
FIELDS = {"path": A, "name": "p", "on": "yes"}


def named(route: Route[Any]) -> str:
    return f"{route.method} {route.path}"


@dataclass
class Asker:
    """Sends requests to a farm, byte by byte, with all the rights that there are; notes the refusals."""

    coordinator: Coordinator
    token: str
    cookie: str
    csrf: str
    refused: set[Pair]

    def headers(self, route: Route[Any]) -> dict[str, str]:
        if route.right in {Right.PAGE, Right.CHANGE, Right.NONE}:
            return {"Cookie": self.cookie, "Origin": self.coordinator.ready.url}
        return {"Authorization": f"Bearer {self.token}"}

    async def ask(
        self, route: Route[Any], address: str, body: bytes = b"", *, length: int | None = None, **headers: str
    ) -> int:
        """Send a request that announces `length` bytes (-1: nothing at all) and has `body`; return the status."""
        head = {"Host": urlsplit(self.coordinator.ready.url).netloc, "Connection": "close", **self.headers(route)}
        if route.body is Content.FORM:
            head["Content-Type"] = Content.FORM.value
        size = len(body) if length is None else length
        head |= {"Transfer-Encoding": "chunked"} if size < 0 else {"Content-Length": str(size)}
        lines = [
            f"{route.method} {address} HTTP/1.1",
            *(f"{name}: {value}" for name, value in (head | headers).items()),
        ]
        url = urlsplit(self.coordinator.ready.url)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode() + (b"0\r\n\r\n" if size < 0 else body))
            async with asyncio.timeout(patience.PATIENCE_S):
                status = int((await reader.readline()).split()[1])
        finally:
            writer.close()
        if status >= 400 and status not in EVERY_ROUTE:
            self.refused.add((named(route), status))
        return status

    async def upload(self) -> str:
        """Begin an upload of `A`; return where it is."""
        client = {"Authorization": f"Bearer {self.token}"}
        async with aiohttp.ClientSession(headers=client) as session:
            begun = await session.post(self.coordinator.ready.cache_url + "/uploads", json={"paths": [CLAIM]})
            return str((await begun.json())["id"])


@pytest.fixture
async def asker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Asker]:
    for module, name in (
        (bodies, "PATIENCE_S"),
        (forms, "PATIENCE_S"),
        (submissions, "STREAM_PATIENCE_S"),
        (evaluations, "STREAM_PATIENCE_S"),
        (environments, "STREAM_PATIENCE_S"),
        (upload_routes, "SILENCE_S"),
    ):
        monkeypatch.setattr(module, name, PATIENCE_S)
    monkeypatch.setenv("OWNER_TOKEN", OWNER)
    owners = (OwnerSettings(name="ci", tokens=("env:OWNER_TOKEN",)),)
    remote = RemoteEvaluationSettings(enabled=True)
    settings = Settings(state_dir=tmp_path / "farm", port=0, owners=owners, remote_evaluation=remote)
    async with open_coordinator(settings, no_workers) as coordinator:
        token = coordinator.ready.token_file.read_text().strip()
        jar = aiohttp.CookieJar(unsafe=True)
        async with aiohttp.ClientSession(cookie_jar=jar, headers={"Origin": coordinator.ready.url}) as session:
            await session.post(coordinator.ready.url + "/login", data={"token": token})
            async with session.get(coordinator.ready.url) as page:
                found = CSRF.search(await page.text())
        assert found is not None
        cookie = "; ".join(f"{each.key}={each.value}" for each in jar)
        yield Asker(coordinator, token, cookie, found[1], set())


def form_of(asker: Asker, **fields: str) -> bytes:
    return urlencode({"csrf": asker.csrf, **FIELDS, **fields}).encode()


async def names_that_are_not_there(asker: Asker) -> None:
    for route, _, prefix in addresses(PREFIX):
        address = route.address(prefix, **{**PARTS, "cache": "no-such-cache"})
        body = form_of(asker) if route.body is Content.FORM else json.dumps(BODIES.get(route, {})).encode()
        if 404 in route.errors:
            await asker.ask(route, address, body if route.body is not None else b"")
    await asker.ask(routes.SUBMISSIONS, f"{routes.SUBMISSIONS.address()}?after=none")
    await asker.ask(web_routes.SUBMISSIONS_PAGE, "/submissions?after=none")
    await asker.ask(web_routes.FIND_STEP, "/steps?find=none")
    await asker.ask(cache_routes.APPEND, f"{PREFIX}/uploads/{'0' * 32}/nar/{base_name(A)}?offset=0", b"x")


async def bodies_that_are_too_large_or_have_no_length(asker: Asker) -> None:
    for route, address, _prefix in addresses(PREFIX):
        if 413 in route.errors:
            await asker.ask(route, address, b"x" * 20_000, length=TOO_LARGE)
        if 411 in route.errors:
            await asker.ask(route, address, length=-1)


async def bodies_that_come_too_slowly(asker: Asker) -> None:
    upload = await asker.upload()
    begun = {
        cache_routes.APPEND: f"{PREFIX}/uploads/{upload}/nar/{base_name(A)}?offset=0",
        cache_routes.PACK: f"{PREFIX}/uploads/{upload}/pack",
    }
    slow = [(route, address) for route, address, _ in addresses(PREFIX) if 408 in route.errors]
    asked = [asker.ask(route, begun.get(route, address), length=8) for route, address in slow]
    await asyncio.gather(*asked)


async def graphs_that_the_farm_does_not_take(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"store_dir": "/elsewhere", "derivations": [], "sources": []}
    await asker.ask(routes.MISSING, routes.MISSING.address(), json.dumps(missing).encode())
    submit = {"roots": [{"attr": "x", "drv": f"/nix/store/{PARTS['key']}"}]}
    await asker.ask(routes.SUBMIT, routes.SUBMIT.address(), json.dumps(submit).encode())
    forecast = {"drvs": [f"/nix/store/{PARTS['key']}"]}
    await asker.ask(routes.FORECAST, routes.FORECAST.address(), json.dumps(forecast).encode())
    wish = {"name": "a", "system": "x86_64-linux", "target": {"kind": "derivation", "path": "/elsewhere/a.drv"}}
    plan = {"wishes": {"form": 1, "place": "a", "source": "paths", "systems": [], "wishes": [wish]}}
    await asker.ask(plan_routes.PLAN, plan_routes.PLAN.address(), json.dumps(plan).encode())
    uneven = json.dumps({"before": ["/nix/store/a.drv"], "after": ["/nix/store/a.drv", "/nix/store/b.drv"]}).encode()
    await asker.ask(routes.COMPARE_OUTPUTS, routes.COMPARE_OUTPUTS.address(), uneven)
    await asker.ask(routes.REBUILD_CAUSES, routes.REBUILD_CAUSES.address(), uneven)

    elsewhere = json.dumps({"paths": ["/elsewhere/x"]}).encode()
    await asker.ask(mirror_routes.MIRROR, mirror_routes.MIRROR.address(), elsewhere)
    await asker.ask(evaluation_routes.PUT_TREE, evaluation_routes.PUT_TREE.address(**PARTS), b"x")
    await asker.ask(evaluation_routes.EVALUATE, evaluation_routes.EVALUATE.address(), b"{}")

    # What needs a stream of real derivations, or a submission (`test_intake`, `tests/hostile`).
    async def refuse(*_args: object, **_more: object) -> None:
        raise IntakeError("x")

    for room, method, route in (
        (Intake, "add_derivations", routes.PUT_DERIVATIONS),
        (Intake, "add_sources", routes.PUT_SOURCES),
        (Growth, "grow", routes.GROW),
        (Submissions, "retry", routes.RETRY),
        (Submissions, "retry_step", routes.RETRY_STEP),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(room, method, refuse)
            patched.setattr(submissions.Api, "_require_owner", lambda *_: None)
            body = b"" if route.body is None else b"{}" if route is routes.GROW else b"x"
            await asker.ask(route, route.address(**PARTS), body)


async def roots_that_come_too_late(asker: Asker) -> None:
    async with aiohttp.ClientSession(headers=asker.headers(routes.SUBMIT)) as session:
        begun = await session.post(
            asker.coordinator.ready.url + routes.SUBMIT.address(), json={"roots": [], "open": True, "client": "first"}
        )
        opened = (await begun.json())["id"]
    await asker.ask(routes.SEAL, routes.SEAL.address(id=opened), b'{"client": "second"}')
    await asker.ask(routes.SEAL, routes.SEAL.address(id=opened), b"{}")
    body = json.dumps({"roots": [{"attr": "x", "drv": f"/nix/store/{PARTS['key']}"}]}).encode()
    await asker.ask(routes.GROW, routes.GROW.address(id=opened), body)


async def what_is_another_owner_s(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = f"Bearer {OWNER}"
    for route, address, _prefix in addresses(PREFIX):
        if route.right is Right.OPERATE:
            await asker.ask(route, address, Authorization=stranger)

    def refuse(*_: object) -> None:
        raise ForbiddenError("x")

    # What needs submissions (`test_origins`).
    submit = json.dumps({"roots": [{"attr": "x", "drv": "/d"}]}).encode()
    for method, route, error in (
        ("cancel", routes.CANCEL, ForbiddenError("x")),
        ("retry", routes.RETRY, ForbiddenError("x")),
        ("retry_step", routes.RETRY_STEP, ForbiddenError("x")),
        ("submit", routes.SUBMIT, ConflictError("x")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(submissions.Api, "_require_owner", lambda *_: None)
            patched.setattr(Submissions, method, failing(error))
            await asker.ask(route, route.address(**PARTS), submit if route.body is not None else b"")
    with monkeypatch.context() as patched:

        def contradict(*_: object) -> None:
            raise ConflictError("x")

        # A key that another evaluation has (`tests/hostile`).
        patched.setattr(RemoteEvaluations, "begin", contradict)
        body = json.dumps(BODIES[evaluation_routes.EVALUATE]).encode()
        await asker.ask(evaluation_routes.EVALUATE, evaluation_routes.EVALUATE.address(), body)
    with monkeypatch.context() as patched:
        patched.setattr(submissions.Api, "_require_owner", refuse)
        await asker.ask(routes.GROW, routes.GROW.address(**PARTS), b"{}")
        await asker.ask(routes.SEAL, routes.SEAL.address(**PARTS), b"{}")
        await asker.ask(routes.BUMP, routes.BUMP.address(**PARTS), b"{}")


async def environments_that_cannot_be(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    track, push = environment_routes.TRACK, environment_routes.PUSH_CONTENT
    submission = json.dumps({"submission": "0"}).encode()
    await asker.ask(track, track.address(**PARTS), b'{"kind": "push"}')
    await asker.ask(environment_routes.ROLL_BACK, environment_routes.ROLL_BACK.address(**PARTS), b"{}")
    for route in environment_routes.ENVIRONMENT_ROUTES:
        if 403 in route.errors:
            body = b'{"kind": "push"}' if route is track else json.dumps(BODIES.get(route, {})).encode()
            await asker.ask(route, route.address(**PARTS), body if route.body else b"", Authorization=f"Bearer {OWNER}")
    await asker.ask(track, track.address(**PARTS), b'{"kind": "git"}')
    await asker.ask(push, push.address(**PARTS), b"?")
    await asker.ask(environment_routes.PUSH_SUBMISSION, environment_routes.PUSH_SUBMISSION.address(**PARTS), submission)
    # What needs a source that fails, a submission, or as many environments as there may be (`test_environments`).
    for method, route, error in (
        ("look", environment_routes.LOOK, IntakeError("x")),
        ("roll_back", environment_routes.ROLL_BACK, IntakeError("x")),
        ("track", track, ConflictError("x")),
        ("push", push, ConflictError("x")),
        ("push", environment_routes.PUSH_SUBMISSION, ConflictError("x")),
        ("push", environment_routes.PUSH_SUBMISSION, IntakeError("x")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(EnvironmentTracker, method, failing(error))
            patched.setattr(SubmittedContent, "content", content_of_nothing)
            bodies_of = {track: b'{"kind": "push"}', push: A.encode(), environment_routes.ROLL_BACK: b"{}"}
            await asker.ask(route, route.address(**PARTS), bodies_of.get(route, submission) if route.body else b"")


async def content_of_nothing(*_: object) -> tuple[WishList, str]:
    return WishList("x", WishSource.PATHS, (), ()), ""


async def forms_of_other_pages(asker: Asker) -> None:
    for route, address, _prefix in addresses(PREFIX):
        if route.body is Content.FORM:
            await asker.ask(route, address, form_of(asker), Origin="http://elsewhere.example")


async def uploads_that_cannot_be(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = (asker.coordinator.ready.token_file.parent / UPLOAD_SECRET).read_bytes()
    lease = UploadTokens(secret.strip()).for_lease(SystemClock())(LeaseId(StepKey("k"), 1), [B])
    begin = json.dumps({"paths": [CLAIM]}).encode()
    await asker.ask(cache_routes.BEGIN, f"{PREFIX}/uploads", begin, Authorization=f"Bearer {lease}")
    upload = f"{PREFIX}/uploads/{await asker.upload()}"
    await asker.ask(cache_routes.COMMIT, f"{upload}/commit", json.dumps(BODIES[cache_routes.COMMIT]).encode())
    await asker.ask(cache_routes.OFFSET, f"{upload}/nar/{base_name(B)}")
    await asker.ask(cache_routes.APPEND, f"{upload}/nar/{base_name(B)}?offset=0", b"x")
    await asker.ask(cache_routes.APPEND, f"{upload}/nar/{base_name(A)}?offset=7", b"x")
    unnamed = make_pack([PathClaim(path=base_name(B), nar_hash=HASH, nar_size=100)], "none", as_claimed).body
    await asker.ask(cache_routes.PACK, f"{upload}/pack", unnamed)
    with monkeypatch.context() as patched:
        patched.setattr(uploads, "MAX_UPLOADS", 1)
        await asker.ask(cache_routes.BEGIN, f"{PREFIX}/uploads", begin)
    # What needs an object store that takes uploads itself, or a disk that is full (`test_http_uploads`, `tests/e2e`).
    below: tuple[tuple[str, Exception, Route[Any], str, bytes], ...] = (
        ("urls", ForbiddenPathError("x"), cache_routes.URLS, f"{upload}/urls", b""),
        ("parts", ForbiddenPathError("x"), cache_routes.PARTS, f"{upload}/parts", b""),
        ("parts", WrongOffsetError(0), cache_routes.PARTS, f"{upload}/parts", b""),
        ("append", StoreFullError("x"), cache_routes.APPEND, f"{upload}/nar/{base_name(A)}?offset=0", b"x"),
        ("pack", StoreFullError("x"), cache_routes.PACK, f"{upload}/pack", b"x"),
    )
    for method, error, route, address, body in below:
        with monkeypatch.context() as patched:
            patched.setattr(uploads.Uploads, method, failing(error))
            await asker.ask(route, address, body or json.dumps(BODIES[route]).encode())


def as_claimed(claim: PathClaim, _: object) -> tuple[bytes, UploadedNar]:
    return b"x", UploadedNar(claim.nar_hash, claim.nar_size, StoredNar("x", "none", claim.nar_hash, 1))


def failing(error: Exception) -> Callable[..., Awaitable[None]]:
    async def fail(*_args: object, **_more: object) -> None:
        raise error

    return fail


async def what_nix_sends_and_the_cache_cannot_take(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    await publish(asker.coordinator.cache, A)
    other, absent = upload_of(A, b"other bits"), upload_of(B, b"b")
    await asker.ask(cache_routes.PUT_NAR, f"{PREFIX}/{other.info.stored.url}", other.data)
    narinfo = f"{PREFIX}/{other.narinfo_address}", other.info.render()
    await asker.ask(cache_routes.PUT_NARINFO, *narinfo)
    await asker.ask(cache_routes.PUT_NARINFO, f"{PREFIX}/{absent.narinfo_address}", absent.info.render())
    await asker.ask(cache_routes.PUT_CACHE_INFO, f"{PREFIX}/nix-cache-info", b"StoreDir: /elsewhere\n")
    await asker.ask(cache_routes.NAR, f"{PREFIX}/{other.info.stored.url}", Range="bytes=999999-")
    sent = []
    key, drv = f"sha256:{'a' * 64}!out", f"{'0' * 32}-x.drv"
    for route, address, value in (
        (cache_routes.PUT_REALISATION, f"{PREFIX}/realisations/{key}.doi", {"id": key, "dependentRealisations": {}}),
        (cache_routes.PUT_BUILD_TRACE, f"{PREFIX}/build-trace-v2/{drv}/out.doi", {}),
    ):
        for path in (B, A, store_path("c")):
            body = json.dumps({**value, "outPath": base_name(path), "signatures": []}).encode()
            if path == store_path("c"):
                await publish(asker.coordinator.cache, path)
            sent.append((route, address, body))
            await asker.ask(*sent[-1])
    log = f"{PREFIX}/log/{drv}"
    away = failing(CacheError("the store is away"))
    for method in ("put_bytes", "put_stream"):
        monkeypatch.setattr(type(asker.coordinator.cache.objects), method, away)
    for method in ("register", "keep"):
        monkeypatch.setattr(Cache, method, away)
    await asker.ask(cache_routes.PUT_NAR, f"{PREFIX}/{absent.info.stored.url}", absent.data)
    await asker.ask(cache_routes.PUT_NARINFO, *narinfo)
    await asker.ask(cache_routes.PUT_LOG, log, b"a log")
    for each in sent:
        await asker.ask(*each)


async def test_each_refusal_that_a_table_lists_is_given_and_no_other(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await names_that_are_not_there(asker)
    await environments_that_cannot_be(asker, monkeypatch)
    await bodies_that_are_too_large_or_have_no_length(asker)
    await bodies_that_come_too_slowly(asker)
    await graphs_that_the_farm_does_not_take(asker, monkeypatch)
    await roots_that_come_too_late(asker)
    await what_is_another_owner_s(asker, monkeypatch)
    await forms_of_other_pages(asker)
    await uploads_that_cannot_be(asker, monkeypatch)
    await what_nix_sends_and_the_cache_cannot_take(asker, monkeypatch)
    listed = {(named(route), status) for route, _, _ in addresses(PREFIX) for status in route.errors}
    assert listed - asker.refused == set()
    assert asker.refused - listed <= {(named(cache_routes.NOTHING), 404)}


def test_a_route_lists_no_refusal_that_every_route_may_give() -> None:
    assert [named(route) for route, _, _ in addresses(PREFIX) if set(route.errors) & set(EVERY_ROUTE)] == []


@pytest.mark.parametrize("raises", [True, False])
async def test_an_answer_that_its_route_does_not_list_is_logged(
    raises: bool, only_listed_refusals: list[logging.LogRecord]
) -> None:
    async def handler(_request: web.Request) -> web.Response:
        if raises:
            raise NotFoundError("nothing is here.")
        return web.Response(status=404)

    app = web.Application()
    serve(
        app,
        {Route[None]("GET", "/x", Right.NONE): handler, Route[None]("GET", "/y", Right.NONE, errors=(404,)): handler},
    )
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as session:
            for address in ("/x", "/y"):
                async with session.get(f"http://127.0.0.1:{runner.addresses[0][1]}{address}") as answer:
                    assert answer.status == (500 if raises else 404)
    finally:
        await runner.cleanup()
    assert [record.getMessage() for record in only_listed_refusals] == [
        "GET /x answered 404, which the route table does not list"
    ]
    only_listed_refusals.clear()
