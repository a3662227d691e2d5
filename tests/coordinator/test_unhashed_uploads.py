"""Paths that their sender does not hash: the coordinator makes the hashes, and trusts nothing for it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from coordinator.config import Settings
from coordinator.security.upload_tokens import UploadTokens
from infra.clock import SystemClock
from infra.exchange import Answer, Connections
from infra.nix import narinfo
from infra.objects.nar_encoder import compressing_files
from infra.upload.answers import parse_message
from infra.upload.client import CONNECT_S, SILENCE_S, OpenNar, UploadClient
from infra.upload.packs import SourceChangedError
from infra.upload.protocol import HASHES_HEADER, Begun, Commit, SendStatus, SentPath
from tests.support.cache import STORE_DIR
from tests.support.uploads import Site, Thing, begin_of, maker, opened, thing

#: Compressed, this is two pieces.
TWO_PIECES = random.Random(5).randbytes(5 * 1024 * 1024)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        yield await opened(stack, Settings(state_dir=tmp_path / "farm", port=0))


def files_of(*things: Thing, is_hashed: bool) -> OpenNar:
    nars = {each.claim.path: each.nar for each in things}
    return lambda claim, compression: compressing_files(iter([nars[claim.path]]), compression, is_hashed=is_hashed)


def never(*_: object) -> Any:
    raise AssertionError("it was read again")


class _Cut(Exception):  # noqa: N818 - what ends the test's push is no error of the program
    pass


class _CutConnections(Connections):
    """Connections that end with the last of some requests: before it is sent, or when it was answered."""

    def __init__(self, requests: int, *, is_answered: bool) -> None:
        super().__init__(connect_s=CONNECT_S, silence_s=SILENCE_S)
        self.left = requests
        self._is_answered = is_answered

    async def ask(self, *words: Any, **named: Any) -> Answer:
        self.left -= 1
        if self.left <= 0 and not self._is_answered:
            raise _Cut
        answer = await super().ask(*words, **named)
        if self.left <= 0:
            raise _Cut
        return answer


class _RepeatedCommits(Connections):
    """Connections on which the first answer to a commit is lost."""

    async def ask(self, method: str, url: str, **named: Any) -> Answer:
        answer = await super().ask(method, url, **named)
        return await super().ask(method, url, **named) if url.endswith("/commit") else answer


async def test_it_is_published_under_the_hash_of_what_arrived_also_by_a_commit_that_is_repeated(site: Site) -> None:
    large = thing("large", TWO_PIECES)
    async with _RepeatedCommits(connect_s=CONNECT_S, silence_s=SILENCE_S) as connections:
        client = UploadClient(connections, site.coordinator.ready.cache_url, site.token)
        unhashed = files_of(large, is_hashed=False)
        result = await client.upload_all([large.claim], never, parallel=1, open_unhashed=unhashed)
    assert [verdict.status for verdict in result.verdicts] == [SendStatus.PRESENT]
    assert await site.nar(large.claim.path) == TWO_PIECES
    text = await site.coordinator.cache.narinfo(large.claim.path[:32])
    assert text is not None
    info = narinfo.parse(text, STORE_DIR)
    async with files_of(large, is_hashed=True)(large.claim, "zstd") as nar:
        size = sum([len(piece) async for piece in nar.pieces])
        assert (info.stored, size) == (nar.uploaded().stored, info.stored.file_size)


async def test_a_source_that_changed_is_named_and_one_that_was_changed_back_is_sent_again(site: Site) -> None:
    good, small, large = thing("good"), thing("small"), thing("large", TWO_PIECES)
    top = thing("top", references=[good, small, large])
    changed, changed_small = replace(large, nar=TWO_PIECES[:-1] + b"!"), replace(small, nar=small.nar[:-1] + b"!")

    async def push(again: Thing, again_small: Thing) -> dict[str, SendStatus]:
        result = await site.client().upload_all(
            [each.claim for each in (good, small, large, top)],
            files_of(again, is_hashed=True),
            parallel=2,
            make_object=maker(good, again_small, top),
            open_unhashed=files_of(changed, is_hashed=False),
            make_unhashed=maker(good, changed_small, top, is_hashed=False),
        )
        return {verdict.path: verdict.status for verdict in result.verdicts}

    with pytest.raises(SourceChangedError) as caught:
        await push(changed, changed_small)
    assert large.claim.path in str(caught.value)
    assert f"{small.claim.path} is not what its store says" in str(caught.value)
    assert [await site.nar(each.claim.path) for each in (good, small, large, top)] == [good.nar, None, None, None]
    assert set((await push(large, small)).values()) == {SendStatus.PUBLISHED}
    assert [await site.nar(each.claim.path) for each in (small, large)] == [small.nar, TWO_PIECES]
    assert [entry.key async for entry in site.coordinator.cache.objects.list("incoming")] == []


@pytest.mark.parametrize("is_answered", [False, True])
async def test_a_push_that_is_cut_between_any_two_messages_loses_nothing_and_publishes_nothing_half(
    site: Site, *, is_answered: bool
) -> None:
    for requests in range(1, 20):
        names = [f"{word}-{requests}-{is_answered}" for word in ("base", "large", "top")]
        base, large = thing(names[0]), thing(names[1], TWO_PIECES + names[1].encode())
        top = thing(names[2], references=[base, large])
        claims = [base.claim, large.claim, top.claim]

        async def push(connections: Connections, things: tuple[Thing, ...] = (base, large, top)) -> list[SendStatus]:
            client = UploadClient(connections, site.coordinator.ready.cache_url, site.token)
            result = await client.upload_all(
                [each.claim for each in things],
                files_of(*things, is_hashed=True),
                parallel=2,
                make_object=maker(*things),
                open_unhashed=files_of(*things, is_hashed=False),
                make_unhashed=maker(*things, is_hashed=False),
            )
            return [verdict.status for verdict in result.verdicts]

        async with _CutConnections(requests, is_answered=is_answered) as connections:
            try:
                await push(connections)
            except _Cut:
                there = [await site.nar(claim.path) for claim in claims]
                assert there[2] is None or None not in there
            else:
                assert requests > 5
                return
        assert set(await push(site.connections)) <= {SendStatus.PUBLISHED}
        assert [await site.nar(claim.path) for claim in claims] == [base.nar, large.nar, top.nar]
    raise AssertionError("a push of three paths has fewer messages")


async def test_a_worker_says_the_hash_of_what_it_sends(site: Site, tmp_path: Path) -> None:
    mine = thing("mine", TWO_PIECES)
    tokens = UploadTokens((tmp_path / "farm/upload-secret").read_bytes().strip())
    lease = tokens.make("default", "step", 1, [mine.claim.path], SystemClock().now() + 60)
    cache = f"{site.coordinator.ready.cache_url}/uploads"
    headers = {"Authorization": f"Bearer {lease}"}
    async with site.session.post(cache, data=begin_of(mine.claim), headers=headers) as answer:
        assert HASHES_HEADER not in answer.headers
        upload = parse_message(await answer.read(), Begun).id
    commit = Commit(sent=(SentPath(path=mine.claim.path, file_hash="", file_size=1),)).json()
    async with site.session.post(f"{cache}/{upload}/commit", data=commit, headers=headers) as answer:
        assert (answer.status, "comes with its hash" in await answer.text()) == (400, True)
    result = await site.client(lease).upload_all(
        [mine.claim], files_of(mine, is_hashed=True), parallel=1, open_unhashed=never, make_unhashed=never
    )
    assert all(sent.file_hash for sent in result.sent)


async def test_an_object_that_is_neither_hashed_nor_sent_is_refused(site: Site) -> None:
    mine = thing("mine", TWO_PIECES)
    cache = f"{site.coordinator.ready.cache_url}/uploads"
    headers = {"Authorization": f"Bearer {site.token}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        async with session.post(cache, data=begin_of(mine.claim)) as answer:
            upload = parse_message(await answer.read(), Begun).id
        commit = Commit(sent=(SentPath(path=mine.claim.path, file_hash="", file_size=1),)).json()
        async with session.post(f"{cache}/{upload}/commit", data=commit) as answer:
            assert (answer.status, "was not sent" in await answer.text()) == (200, True)
