"""Small paths of a push, many in one request."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from coordinator.config import Settings
from coordinator.security.upload_tokens import UploadTokens
from infra.cache.publishing import publisher as publisher_module
from infra.cache.uploads.relay import blocks
from infra.clock import SystemClock
from infra.nix.narinfo import NarInfo
from infra.objects.compression import Compression
from infra.objects.nar_encoder import UploadedNar, compress_now
from infra.objects.store import BlockingSource
from infra.objects.verification import verify_nar
from infra.upload.answers import parse_message
from infra.upload.client import UploadClient
from infra.upload.packs import MAGIC, SourceChangedError, make_pack
from infra.upload.protocol import (
    MAX_PACK_BYTES,
    PACK_NAR_BYTES,
    PACK_PATHS,
    Begun,
    Commit,
    Committed,
    PathClaim,
    SendStatus,
    SendVerdict,
    SentPath,
)
from tests.support.cache import store_path
from tests.support.patience import PATIENCE_S
from tests.support.uploads import LARGE, Site, begin_of, maker, opened, opener, pack_of, settings_of, thing


@pytest.fixture(params=["directory", "s3 by relay"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    return settings_of(request, tmp_path)


@pytest.fixture
async def site(place: Settings) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield await opened(stack, place)


@pytest.mark.parametrize("place", ["directory", "s3 by relay"], indirect=True)
async def test_of_many_small_paths_in_packs_the_good_ones_are_published_and_a_bad_one_is_named(
    site: Site, place: Settings
) -> None:
    # Several packs, where objects cost little.
    goods = [thing(f"good-{number}") for number in range(40 if place.object_store_url else 1_999)]
    bad = thing("bad")
    top = thing("top", references=[bad])
    ours = {each.claim.path: each for each in (*goods, replace(bad, nar=b"other bits"), top)}

    def lying(claim: PathClaim, compression: Compression) -> tuple[bytes, UploadedNar]:
        data, made = compress_now(iter([ours[claim.path].nar]), compression)
        # What arrives is another NAR than this sender says.
        return data, replace(made, nar_hash=claim.nar_hash, nar_size=claim.nar_size)

    client = site.client()
    result = await client.upload_all(
        [each.claim for each in (*goods, bad, top)], opener(), parallel=2, make_object=lying
    )
    verdicts = {verdict.path: verdict for verdict in result.verdicts}
    # The bad one is sent once more, and all are committed again then.
    assert {verdicts[each.claim.path].status for each in goods} == {SendStatus.PRESENT}
    assert verdicts[bad.claim.path].status is SendStatus.REFUSED
    assert f"the NAR of {store_path('bad')} is corrupt" in verdicts[bad.claim.path].message
    assert verdicts[top.claim.path].missing == (bad.claim.path,)
    assert [await site.nar(each.claim.path) for each in (goods[0], goods[-1], bad, top)] == [
        goods[0].nar, goods[-1].nar, None, None,
    ]  # fmt: skip
    assert [entry.key async for entry in site.coordinator.cache.objects.list("incoming")] == []


@pytest.mark.parametrize("place", ["directory"], indirect=True)
async def test_a_large_object_is_verified_while_it_arrives_and_not_read_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back: list[str] = []

    def verify(source: BlockingSource, promise: NarInfo) -> None:
        read_back.append(promise.store_path)
        verify_nar(source, promise)

    monkeypatch.setattr(publisher_module, "verify_nar", verify)
    honest, liar = thing("honest", LARGE[:9_000_000]), thing("liar", LARGE[9_000_000:12_000_000])
    liar = replace(liar, claim=replace(liar.claim, nar_hash=honest.claim.nar_hash))
    assert await site.push(honest) == {honest.claim.path: SendStatus.PUBLISHED}
    assert await site.nar(honest.claim.path) == honest.nar
    assert read_back == []
    # A sender that lies, whose object is what it says it sent: only reading it finds the NAR to be another.
    data, made = compress_now(iter([liar.nar]))
    base, headers = f"{site.coordinator.ready.cache_url}/uploads", {"Authorization": f"Bearer {site.token}"}
    async with site.session.post(base, data=begin_of(liar.claim), headers=headers) as response:
        upload = parse_message(await response.read(), Begun).id
    url = f"{base}/{upload}/nar/{liar.claim.path}?offset=0"
    async with site.session.put(url, data=BytesIO(data), headers=headers) as response:
        assert response.status == 200
    stored = made.stored
    sent = SentPath(path=liar.claim.path, file_hash=stored.file_hash, file_size=stored.file_size)
    commit = Commit(sent=(sent,)).json()
    async with site.session.post(f"{base}/{upload}/commit", data=commit, headers=headers) as response:
        (verdict,) = parse_message(await response.read(), Committed).verdicts
    assert (verdict.status, read_back) == (SendStatus.REFUSED, [f"/nix/store/{liar.claim.path}"])
    assert await site.nar(liar.claim.path) is None


@pytest.mark.parametrize("place", ["directory"], indirect=True)
async def test_a_source_that_changes_under_a_push_is_named_and_costs_only_what_needs_it(site: Site) -> None:
    good, changed, large = thing("good"), thing("changed"), thing("large", LARGE)
    gone = thing("gone")

    def make_object(claim: PathClaim, compression: Compression) -> tuple[bytes, UploadedNar]:
        if claim == gone.claim:
            raise SourceChangedError(f"{claim.path} cannot be sent: it shrank while it was packed")
        return maker(good, replace(changed, nar=b"changed since"))(claim, compression)

    claims = [each.claim for each in (good, changed, gone, large)]
    with pytest.raises(SourceChangedError) as caught:
        await site.client().upload_all(claims, opener(large), parallel=2, make_object=make_object)
    assert f"{changed.claim.path} is not what its store says: its NAR has another hash" in str(caught.value)
    assert f"{gone.claim.path} cannot be sent: it shrank" in str(caught.value)
    assert str(caught.value).endswith("; what does not refer to it was uploaded")
    assert await site.nar(good.claim.path) == good.nar
    assert await site.nar(large.claim.path) == LARGE
    assert await site.nar(changed.claim.path) is None


@pytest.mark.parametrize("place", ["directory"], indirect=True)
async def test_a_push_in_packs_that_is_cut_at_any_byte_loses_nothing_that_had_come_whole(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = [thing(f"part-{number}", random.Random(number).randbytes(3000)) for number in range(4)]
    body = pack_of(*things)
    record = (len(body) - len(MAGIC) - 4) // 4
    cache = URL(site.coordinator.ready.cache_url)
    headers = {"Authorization": f"Bearer {site.token}"}

    async def begin() -> Begun:
        message = begin_of(*(each.claim for each in things))
        async with site.session.post(cache / "uploads", data=message, headers=headers) as answer:
            return parse_message(await answer.read(), Begun)

    rest = 0
    came = asyncio.Event()

    async def counted(data: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        nonlocal rest
        async for chunk in data:
            rest -= len(chunk)
            if not rest:
                came.set()
            yield chunk

    async def arrived(count: int) -> Begun:
        # The connection can end before the last object is stored.
        for _ in range(6000):
            begun = await begin()
            if len(begun.arrived) >= count:
                return begun
            await asyncio.sleep(0.01)
        pytest.fail(f"{count} objects came whole, and are not kept")

    monkeypatch.setattr("infra.cache.uploads.packs.blocks", lambda data: blocks(counted(data)))
    whole = 0
    for size in (0, 7, len(MAGIC), len(MAGIC) + 2, len(MAGIC) + record + 40, len(MAGIC) + 3 * record, len(body) - 4):
        begun, rest = await begin(), size
        came.clear()
        reader, writer = await asyncio.open_connection(cache.host, cache.port)
        head = f"POST {cache.raw_path}/uploads/{begun.id}/pack HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Authorization: Bearer {site.token}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[:size])
        async with asyncio.timeout(PATIENCE_S):
            # What a server has not read when a connection ends is lost with it.
            if size:
                await came.wait()
            writer.write_eof()
            await reader.read()
        writer.close()
        whole = min(4, max(0, size - len(MAGIC)) // record)
        assert len((await arrived(whole)).arrived) == whole
    assert whole == 4
    # Nothing is visible before the commit, and then nothing is sent again.
    assert await site.nar(things[0].claim.path) is None
    client = site.client()
    result = await client.upload_all([each.claim for each in things], opener(), parallel=1, make_object=maker())
    assert {verdict.status for verdict in result.verdicts} == {SendStatus.PUBLISHED}
    assert client.progress.sent_bytes == 0
    assert [await site.nar(each.claim.path) for each in things] == [each.nar for each in things]


@pytest.mark.parametrize("place", ["directory"], indirect=True)
async def test_a_pack_takes_what_its_upload_named_from_its_sender_alone(site: Site, place: Settings) -> None:
    mine, foreign, large = thing("mine"), thing("foreign"), thing("large", LARGE[: PACK_NAR_BYTES + 1])
    tokens = UploadTokens((place.state_dir / "upload-secret").read_bytes().strip())
    lease = tokens.make("default", "step", 1, [mine.claim.path, large.claim.path], SystemClock().now() + 60)
    cache = URL(site.coordinator.ready.cache_url)

    async def post(token: str, address: str, body: bytes) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"}
        async with site.session.post(URL(f"{cache}/uploads{address}"), data=BytesIO(body), headers=headers) as answer:
            return answer.status, await answer.text()

    async def begin(token: str) -> str:
        return parse_message((await post(token, "", begin_of(mine.claim, large.claim)))[1], Begun).id

    upload = await begin(lease)
    good = pack_of(mine)
    assert (await post(secrets.token_urlsafe(), f"/{upload}/pack", good))[0] == 401
    # The upload of one sender is unknown to another, also to one who may do more.
    assert (await post(site.token, f"/{upload}/pack", good))[0] == 404
    status, text = await post(lease, f"/{upload}/pack", pack_of(mine, foreign))
    assert (status, "was not named when the upload began" in text) == (403, True)
    for body, reason in (
        (b"", "ends too early"),
        (b"no pack", "does not begin as a pack does"),
        (good + b"x", "goes on after its end"),
        (MAGIC + (256).to_bytes(4, "little"), "at most 255 bytes"),
        (MAGIC + (1).to_bytes(4, "little") + b"x" + (1 << 31).to_bytes(4, "little"), "an object in a pack has at most"),
        (MAGIC + b"".join([good[len(MAGIC) : -4]] * (PACK_PATHS + 1)), f"at most {PACK_PATHS} paths"),
        (bytes(MAX_PACK_BYTES + 1), "says its length"),
    ):
        status, text = await post(lease, f"/{upload}/pack", body)
        assert (status, reason in text) == (400, True), text
    assert "comes in pieces" in (await post(lease, f"/{upload}/pack", pack_of(large)))[1]
    # What a lease sends is stored for it, neither published nor taken for what another sent.
    assert await post(lease, f"/{upload}/pack", good) == (200, '{"refused":{}}')
    result = await site.client(lease).upload_all([mine.claim], opener(), parallel=1)
    assert [verdict.status for verdict in result.verdicts] == [SendStatus.STORED]
    assert await site.nar(mine.claim.path) is None
    with pytest.raises(KeyError):
        await site.client().upload_all([mine.claim], opener(), parallel=1)
    # What was proven of one claim is not of another on the same NAR.
    upload = parse_message((await post(site.token, "", begin_of(mine.claim)))[1], Begun).id
    assert (await post(site.token, f"/{upload}/pack", good))[0] == 200
    longer = replace(mine.claim, nar_size=mine.claim.nar_size + 1)
    (sent,) = make_pack([mine.claim], "zstd", maker(mine)).sent
    again = parse_message((await post(site.token, "", begin_of(longer)))[1], Begun)
    assert (again.arrived, again.send) == ((), (mine.claim.path,))
    commit = Commit(sent=(sent,)).json()
    assert '"status":"refused"' in (await post(site.token, f"/{again.id}/commit", commit))[1]
    assert await site.nar(mine.claim.path) is None


@pytest.mark.parametrize("place", ["directory"], indirect=True)
async def test_an_object_of_a_pack_that_was_collected_before_the_commit_is_sent_again(site: Site) -> None:
    small = thing("small")
    objects = site.coordinator.cache.objects
    made: list[str] = []

    def make_object(claim: PathClaim, compression: Compression) -> tuple[bytes, UploadedNar]:
        made.append(claim.path)
        return maker(small)(claim, compression)

    class Collecting(UploadClient):
        async def _commit(self, *arguments: Any) -> list[SendVerdict]:
            if len(made) == 1:
                await objects.delete(compress_now(iter([small.nar]))[1].stored.url)
            return await super()._commit(*arguments)

    client = Collecting(site.connections, site.coordinator.ready.cache_url, site.token)
    result = await client.upload_all([small.claim], opener(), parallel=1, make_object=make_object)
    assert [verdict.status for verdict in result.verdicts] == [SendStatus.PUBLISHED]
    assert made == [small.claim.path] * 2
    assert await site.nar(small.claim.path) == small.nar
