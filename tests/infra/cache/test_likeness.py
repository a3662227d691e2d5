"""Likeness of outputs: equal but for hashes, different, absent, too large; read once, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.cache import likeness
from infra.cache.cache import Cache
from infra.cache.likeness import Likeness, Likenesses, TooManyQuestionsError
from infra.nix.store_path import hash_part_of
from tests.support.cache import object_file, open_cache, publish, store_path, uploaded_claim


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[Cache]:
    async with open_cache(tmp_path) as opened:
        yield opened


def path_of(name: str) -> str:
    """Return a path whose name is that without its side, `-a` or `-b`."""
    return f"/nix/store/{hash_part_of(store_path(name))}-{name.rpartition('-')[0]}"


async def published(cache: Cache, name: str, text: str, *references: str) -> str:
    """Publish a path whose NAR holds a text in which `{self}` and `{0}` stand for itself and its references."""
    path = path_of(name)
    data = b"-" * 70_000 + text.format(*references, self=path).encode()
    await publish(cache, path, data, [*references, *([path] if "{self}" in text else [])])
    return path


async def test_outputs_that_differ_in_their_own_and_their_references_hashes_are_a_no_op(cache: Cache) -> None:
    deps = [await published(cache, name, "stdenv") for name in ("stdenv-a", "stdenv-b")]
    pairs: list[tuple[str, str]] = []
    for text in ("{self} needs {0}", "{0} and more", "no path at all"):
        name = f"p{len(pairs)}"
        before, after = [
            await published(cache, f"{name}-{side}", text, dep) for side, dep in zip("ab", deps, strict=True)
        ]
        pairs.append((before, after))
    # The same hash where it is no reference, another text, another length; and what is not there.
    left = await published(cache, "u-a", path_of("other-a"))
    right = await published(cache, "u-b", path_of("other-b"))
    pairs += [(left, right), (left, deps[0]), (left, store_path("absent"))]
    found = await Likenesses(cache).compare(pairs)
    assert [each.likeness for each in found] == [
        Likeness.NO_OP,
        Likeness.NO_OP,
        Likeness.SAME,
        Likeness.DIFFERENT,
        Likeness.DIFFERENT,
        Likeness.ABSENT,
    ]
    first = found[0]
    assert first.nar_sizes[0] == first.nar_sizes[1] is not None
    assert first.closure_sizes[0] == first.nar_sizes[0] + found[4].nar_sizes[1]  # type: ignore[operator]
    assert found[-1].nar_sizes[1] is None is found[-1].closure_sizes[1]


async def test_a_digest_is_remembered_and_what_is_corrupt_counts_as_absent(cache: Cache) -> None:
    dep = await published(cache, "dep-a", "dep")
    claims = [
        await uploaded_claim(cache, path_of(name), path_of(name).encode(), [path_of(name), dep])
        for name in ("x-a", "x-b")
    ]
    await cache.publish(claims)
    pair = (claims[0].store_path, claims[1].store_path)
    likenesses = Likenesses(cache)
    assert (await likenesses.compare([pair]))[0].likeness is Likeness.NO_OP
    file = object_file(cache, claims[0])
    file.write_bytes(bytes(file.stat().st_size))
    assert (await likenesses.compare([pair]))[0].likeness is Likeness.NO_OP
    assert (await Likenesses(cache).compare([pair]))[0].likeness is Likeness.ABSENT


async def test_what_is_too_large_or_too_much_for_one_question_is_not_read(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = []
    for name in ("v", "w"):
        sides = [await published(cache, f"{name}-{side}", "{self}") for side in "ab"]
        pairs.append((sides[0], sides[1]))
    monkeypatch.setattr(likeness, "QUESTION_BYTES", 200_000)
    likenesses = Likenesses(cache)
    assert [each.likeness for each in await likenesses.compare(pairs)] == [Likeness.NO_OP, Likeness.UNREAD]
    assert [each.likeness for each in await likenesses.compare(pairs)] == [Likeness.NO_OP, Likeness.NO_OP]
    monkeypatch.setattr(likeness, "MAX_SEARCHED_BYTES", 100_000)
    assert [each.likeness for each in await Likenesses(cache).compare(pairs)] == [Likeness.TOO_LARGE] * 2
    monkeypatch.setattr(likeness, "MAX_QUESTIONS", 1)
    asked = [asyncio.create_task(likenesses.compare(pairs)) for _ in range(2)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sorted(isinstance(each, TooManyQuestionsError) for each in answers) == [False, True]
