"""Uploads over HTTP, by relay into a directory and straight to a real S3 store."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from yarl import URL

from coordinator.config import CacheSettings, Settings, UpstreamSettings
from coordinator.http.binary_cache import uploads
from coordinator.security.upload_tokens import UploadTokens
from infra.clock import SystemClock
from infra.nix import narinfo
from infra.objects import http_source
from infra.objects.errors import ObjectMissingError, ObjectStoreError
from infra.objects.http_source import fetch_nar_over_http
from infra.objects.nar_encoder import compress_now, compressing, compressing_files
from infra.objects.store import RETRIES
from infra.upload.answers import parse_message
from infra.upload.errors import SenderRefusedError, UploadFailedError
from infra.upload.protocol import (
    PART_BYTES,
    PIECE_BYTES,
    Begun,
    KeepRequest,
    SendStatus,
    SentOffset,
)
from tests.support.cache import STORE_DIR, chunked
from tests.support.patience import PATIENCE_S
from tests.support.proxy import Fault, FaultyProxy
from tests.support.servers import S3Place, S3Server
from tests.support.uploads import LARGE, Site, begin_of, opened, opener, settings_of, thing


@pytest.fixture(params=["directory", "s3", "s3 by relay"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    return settings_of(request, tmp_path)


@pytest.fixture
async def site(place: Settings) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield await opened(stack, place)


async def test_a_closure_is_sent_once_and_becomes_visible_together(site: Site) -> None:
    base, large = thing("base"), thing("large", LARGE)
    top = thing("top", references=[base, large])
    assert set((await site.push(top, base, large)).values()) == {SendStatus.PUBLISHED}
    for each in (base, large, top):
        assert await site.nar(each.claim.path) == each.nar
    again = site.client()
    result = await again.upload_all([base.claim, large.claim, top.claim], opener(), parallel=4)
    assert result.verdicts == ()
    assert len(result.present) == 3
    assert again.progress.sent_bytes == 0
    left = [entry.key async for entry in site.coordinator.cache.objects.list("incoming")]
    assert left == []


async def test_references_that_nobody_has_are_named_and_nothing_dangles(site: Site) -> None:
    absent = thing("absent")
    top = thing("top", references=[absent])
    result = await site.client().upload_all([top.claim], opener(top), parallel=1)
    (verdict,) = result.verdicts
    assert (verdict.status, verdict.missing) == (SendStatus.MISSING_REFERENCES, (absent.claim.path,))
    assert await site.nar(top.claim.path) is None
    # The object waits: what was missing and the path again are all that is needed.
    assert set((await site.push(absent, top)).values()) == {SendStatus.PUBLISHED}


async def test_two_uploads_of_one_path_at_once_both_end_well(site: Site) -> None:
    large = thing("large", LARGE)
    both = await asyncio.gather(site.push(large), site.push(large))
    assert {status for each in both for status in each.values()} <= {SendStatus.PUBLISHED, SendStatus.PRESENT}
    assert await site.nar(large.claim.path) == LARGE


async def test_other_bits_for_a_published_path_are_a_conflict_and_the_first_stay(site: Site) -> None:
    first = thing("unstable")
    grant = await site.push(first)
    assert grant == {first.claim.path: SendStatus.PUBLISHED}
    cache = site.coordinator.cache
    other = thing("unstable", b"other bits" * 50)
    result = await site.client().upload_all([other.claim], opener(other), parallel=1)
    assert [verdict.status for verdict in result.verdicts] == [SendStatus.CONFLICT]
    assert result.conflicts == (other.claim.path,)
    # What lost once is not sent again, and told again.
    again = site.client()
    result = await again.upload_all([other.claim], opener(), parallel=1)
    assert (result.verdicts, result.present, result.conflicts) == ((), (), (other.claim.path,))
    assert await site.nar(first.claim.path) == first.nar
    info = await cache.info()
    assert (info.paths, info.conflicts) == (1, 1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is another program's doing
            await asyncio.sleep(0.01)


class Cut(Exception):  # noqa: N818 - what ends the test's upload is no error of the program
    pass


@pytest.mark.parametrize("after", [0, 9, 20])
async def test_an_upload_that_was_cut_goes_on_where_it_was(site: Site, after: int) -> None:
    large = thing("large", LARGE)

    async def cut_short() -> AsyncIterator[bytes]:
        async for number, chunk in _numbered(chunked(LARGE, 1024 * 1024)):
            if number == after:
                # What is sent whole is sent before the cut: compressing is quicker than a store.
                await until(lambda: after < 20 or first.progress.sent_bytes >= PART_BYTES)
                raise Cut
            yield chunk

    first = site.client()
    with pytest.raises(Cut):
        await first.upload_all([large.claim], lambda _claim, _compression: compressing(cut_short()), parallel=1)
    second = site.client()
    (verdict,) = (await second.upload_all([large.claim], opener(large), parallel=1)).verdicts
    assert verdict.status is SendStatus.PUBLISHED
    assert await site.nar(large.claim.path) == LARGE
    # At most what was in flight is sent twice.
    assert first.progress.sent_bytes + second.progress.sent_bytes <= len(LARGE) + 17 * 1024 * 1024
    if after >= 20:
        assert second.progress.sent_bytes < len(LARGE)


@pytest.mark.parametrize("place", ["directory"], indirect=True)
async def test_a_piece_that_comes_too_slowly_is_kept_as_far_as_it_came(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "SILENCE_S", 0.3)
    claim, path = thing("slow", LARGE).claim, URL(site.coordinator.ready.cache_url)
    headers = {"Authorization": f"Bearer {site.token}"}
    async with site.session.post(path / "uploads", data=begin_of(claim), headers=headers) as begun:
        nar = path / "uploads" / parse_message(await begun.read(), Begun).id / "nar" / claim.path
    reader, writer = await asyncio.open_connection(path.host, path.port)
    head = f"PUT {nar.raw_path}?offset=0 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {site.token}\r\n"
    writer.write(f"{head}Content-Length: 1000\r\n\r\n".encode() + LARGE[:100])
    answer = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
    sent = 100
    # A byte at a time is never silence, and less than the least pace.
    while not (await asyncio.wait([answer], timeout=0.02))[0]:
        writer.write(LARGE[sent : sent + 1])
        sent += 1
    assert b" 408 " in answer.result()
    writer.close()
    async with site.session.get(nar, headers=headers) as told:
        assert 100 <= parse_message(await told.read(), SentOffset).offset <= sent


async def test_an_upload_goes_on_after_the_coordinator_was_started_again(place: Settings) -> None:
    large = thing("large", LARGE)
    async with AsyncExitStack() as stack:
        site = await opened(stack, place)

        first = site.client()

        async def first_half() -> AsyncIterator[bytes]:
            yield LARGE[: 20 * 1024 * 1024]
            await until(lambda: first.progress.sent_bytes >= PART_BYTES)
            raise Cut

        with pytest.raises(Cut):
            await first.upload_all([large.claim], lambda _claim, _compression: compressing(first_half()), parallel=1)
    async with AsyncExitStack() as stack:
        site = await opened(stack, place)
        client = site.client()
        (verdict,) = (await client.upload_all([large.claim], opener(large), parallel=1)).verdicts
        assert verdict.status is SendStatus.PUBLISHED
        assert client.progress.sent_bytes < len(LARGE)
        assert await site.nar(large.claim.path) == LARGE


async def test_a_path_whose_bytes_are_not_as_claimed_is_not_published(site: Site) -> None:
    honest = thing("honest")
    lying = replace(honest, nar=honest.nar + b"!")
    with pytest.raises(UploadFailedError, match="another hash"):
        await site.client().upload_all([honest.claim], opener(lying), parallel=1)
    assert await site.nar(honest.claim.path) is None


async def test_a_lease_token_uploads_exactly_its_paths_and_publishes_nothing(site: Site, place: Settings) -> None:
    mine, foreign = thing("mine"), thing("foreign")
    tokens = UploadTokens((place.state_dir / "upload-secret").read_bytes().strip())
    soon = SystemClock().now() + 60
    token = tokens.make("default", "step", 1, [mine.claim.path], soon)
    result = await site.client(token).upload_all([mine.claim], opener(mine), parallel=1)
    (verdict,) = result.verdicts
    assert verdict.status is SendStatus.STORED
    assert await site.coordinator.cache.objects.head(verdict.url)
    assert await site.nar(mine.claim.path) is None
    with pytest.raises(SenderRefusedError, match="does not allow"):
        await site.client(token).upload_all([mine.claim, foreign.claim], opener(mine, foreign), parallel=1)
    for bad in (
        tokens.make("other", "step", 1, [mine.claim.path], soon),
        tokens.make("default", "step", 1, [mine.claim.path], soon - 120),
        UploadTokens(b"another secret").make("default", "step", 1, [mine.claim.path], soon),
        token[:-2] + ("A" if token[-2] != "A" else "B") + token[-1],
        secrets.token_urlsafe(),
        "drl1..",
    ):
        with pytest.raises(SenderRefusedError, match="does not know this token"):
            await site.client(bad).upload_all([mine.claim], opener(mine), parallel=1)


async def test_a_named_cache_takes_nothing_from_writers_of_another(site: Site) -> None:
    one = thing("one")
    with pytest.raises(SenderRefusedError, match="does not know this token"):
        await site.client(cache="/other").upload_all([one.claim], opener(one), parallel=1)


async def test_a_malformed_request_of_an_upload_is_refused(site: Site) -> None:
    unknown = "/" + "0" * 32
    for method, address, body, status in (
        ("POST", "", b"{", 400),
        ("POST", "", b'{"paths": []}', 400),
        ("POST", "", b'{"paths": [{"path": "../../../../../../../../etc/passwd-aaaa"}]}', 400),
        ("POST", unknown + "/commit", b'{"sent": []}', 404),
        ("POST", unknown + "/renew", b"", 404),
        ("GET", unknown + "/nar/x", b"", 404),
        ("PUT", unknown + "/nar/..%2f..%2fx?offset=0", b"x", 404),
        ("PUT", unknown + "/nar/x?offset=-1", b"x", 400),
        ("PUT", unknown + "/nar/x?offset=0", bytes(PIECE_BYTES + 1), 400),
        ("DELETE", unknown, b"", 404),
    ):
        url = URL(f"{site.coordinator.ready.cache_url}/uploads{address}", encoded=True)
        headers = {"Authorization": f"Bearer {site.token}"}
        async with site.session.request(method, url, data=BytesIO(body), headers=headers) as response:
            assert response.status == status, (method, address, await response.text())


async def test_files_are_compressed_to_the_same_bytes_as_a_stream() -> None:
    for size in (1, 100_000, 1024 * 1024, 17 * 1024 * 1024 + 5):
        made = []
        for nar in (compressing(chunked(LARGE[:size], 70_000)), compressing_files(iter([LARGE[:size]]))):
            async with nar as compressed:
                data = b"".join([piece async for piece in compressed.pieces])
                made.append((data, compressed.uploaded()))
        assert made[0] == made[1] == compress_now(iter([LARGE[:size]]))


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.CUT, Fault.CUT_BODY])
async def test_a_store_that_fails_for_a_while_costs_only_time(
    s3_server: S3Server, s3: S3Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Fault
) -> None:
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultyProxy(s3_server.port))
        place = s3_server.at(s3.prefix, proxy.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL", place.environment["AWS_ENDPOINT_URL"])
        site = await opened(stack, Settings(state_dir=tmp_path / "farm", port=0, object_store_url=place.url))
        proxy.fail(fault, times=2)
        small, large = thing("small"), thing("large", LARGE)
        assert set((await site.push(small, large)).values()) == {SendStatus.PUBLISHED}
        assert proxy.failed == 2
        assert await site.nar(large.claim.path) == LARGE


async def test_a_store_that_fails_is_not_a_missing_input_for_who_reads_over_http(
    s3_server: S3Server, s3: S3Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http_source, "TRIES", 2)
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultyProxy(s3_server.port))
        place = s3_server.at(s3.prefix, proxy.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL", place.environment["AWS_ENDPOINT_URL"])
        site = await opened(stack, Settings(state_dir=tmp_path / "farm", port=0, object_store_url=place.url))
        sent = thing("sent")
        await site.push(sent)
        text = await site.coordinator.cache.narinfo(sent.claim.path[:32])
        assert text is not None
        info = narinfo.parse(text, STORE_DIR)

        async def read() -> bytes:
            url = f"{site.coordinator.ready.cache_url}/{info.stored.url}"
            return b"".join([data async for data in fetch_nar_over_http(site.session, url, {}, info)])

        # More than the coordinator tries by itself for one request, less than for two.
        proxy.fail(Fault.UNAVAILABLE, RETRIES + 2)
        assert await read() == sent.nar
        assert proxy.failed == RETRIES + 2
        proxy.fail(Fault.UNAVAILABLE, 1000)
        with pytest.raises(ObjectStoreError, match="answered with status 404") as caught:
            await read()
        assert not isinstance(caught.value, ObjectMissingError)


async def _numbered(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    number = 0
    async for chunk in chunks:
        yield number, chunk
        number += 1


async def test_pushed_paths_are_a_root_as_the_sender_wishes(site: Site) -> None:
    base = thing("base")
    top = thing("top", references=[base])
    await site.push(top, base, keep=KeepRequest(name="release", paths=(top.claim.path,), days=0))
    await site.push(thing("other"))
    roots = {root.name: root for root in await site.coordinator.cache.roots()}
    assert (roots["release"].kind, roots["release"].paths, roots["release"].expires_at) == ("push", 1, None)
    (other,) = (root for name, root in roots.items() if name != "release")
    assert other.expires_at is not None


async def test_paths_of_a_trusted_upstream_are_not_sent_and_come_from_there(tmp_path: Path) -> None:
    base, own = thing("base"), thing("own")
    top = thing("top", references=[base])
    async with AsyncExitStack() as stack:
        upstream = await opened(stack, Settings(state_dir=tmp_path / "upstream", port=0))
        await upstream.push(base, own)
        (key,) = upstream.coordinator.ready.public_keys
        trusted = UpstreamSettings(url=upstream.coordinator.ready.cache_url, public_keys=(key,))
        settings = Settings(state_dir=tmp_path / "farm", port=0, cache=CacheSettings(upstreams=(trusted,)))
        site = await opened(stack, settings)
        changed = replace(own, claim=thing("own", b"other bits").claim, nar=b"other bits")
        result = await site.client().upload_all(
            [each.claim for each in (top, base, changed)], opener(top, changed), parallel=2
        )
        assert (result.upstream, {sent.path for sent in result.sent}) == (
            (base.claim.path,),
            {top.claim.path, changed.claim.path},
        )
        assert [await site.nar(each.claim.path) for each in (base, top, changed)] == [base.nar, top.nar, b"other bits"]


async def test_a_name_with_a_question_mark_is_sent_whole(site: Site) -> None:
    odd = thing("odd+name.1?x=2")
    assert set((await site.push(odd)).values()) == {SendStatus.PUBLISHED}
    assert await site.nar(odd.claim.path) == odd.nar
