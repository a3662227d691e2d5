"""The object store: keys never leave it, objects appear whole or not at all."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.objects.errors import CacheError, ObjectKeyError, ObjectMissingError, ObjectStoreError, StoreUnreachableError
from infra.objects.store import (
    LocalObjectStore,
    ObjectStore,
    check_key,
    incoming_key,
    open_object_store,
    sweep_incoming,
)
from tests.support.cache import chunked
from tests.support.servers import S3Place

SEGMENTS = st.sampled_from(["..", ".", "", "nar", "a.zst", ".hidden", "~", "C:", "a b", "\0", "%2e%2e", "\\", "a#1"])


@pytest.fixture(params=["directory", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    match request.param:
        case "directory":
            return open_object_store((tmp_path / "o").as_uri())
        case "memory":
            # obstore's memory store speaks the very API that GCS and Azure stores do.
            return ObjectStore("memory:///")
        case _:
            place: S3Place = request.getfixturevalue("s3")
            return open_object_store(place.url)


@given(st.one_of(st.text(), st.lists(SEGMENTS, min_size=1).map("/".join)))
def test_a_key_that_is_accepted_stays_in_the_store(key: str) -> None:
    try:
        check_key(key)
    except ObjectKeyError:
        return
    root = Path("/store/root")
    assert (root / key).resolve().is_relative_to(root)
    assert all(segment and not segment.startswith(".") for segment in key.split("/"))
    assert not set(key) & set("\0\\%#?")


async def test_an_object_is_read_as_it_was_put(store: ObjectStore) -> None:
    data = bytes(range(256)) * 30_000
    await store.put_bytes("nar/small", data[:10])
    assert await store.put_stream("nar/large", chunked(data, 1_000_000)) == len(data)
    assert await store.head("nar/large") == len(data)
    assert await store.head("nar/none") is None
    assert await store.get_bytes("nar/small") == data[:10]
    assert b"".join([part async for part in store.get_stream("nar/large")]) == data
    assert b"".join([part async for part in store.get_stream("nar/large", 5)]) == data[5:]
    assert b"".join([part async for part in store.get_stream("nar/large", 5, 300)]) == data[5:300]
    source = store.open_blocking("nar/large")
    assert b"".join(iter(lambda: source.read(70_000), b"")) == data
    source.close()
    assert sorted([entry.key async for entry in store.list("nar")]) == ["nar/large", "nar/small"]
    await store.rename("nar/small", "other/place")
    assert await store.head("nar/small") is None
    await store.delete("other/place")
    await store.delete("other/place")
    assert await store.head("other/place") is None


async def test_reading_what_is_not_there_is_a_typed_error(store: ObjectStore) -> None:
    for read in (store.get_bytes("nar/x"), anext(store.get_stream("nar/x"))):
        with pytest.raises(ObjectMissingError, match="nar/x"):
            await read
    with pytest.raises(ObjectMissingError):
        store.open_blocking("nar/x")


async def test_a_stream_that_fails_leaves_no_object(store: ObjectStore) -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        for _ in range(12):
            yield bytes(2_000_000)
        raise RuntimeError("cut")

    key = incoming_key()
    with pytest.raises(RuntimeError):
        await store.put_stream(key, failing())
    assert await store.head(key) is None


async def test_a_worker_that_does_not_see_the_farms_store_gets_the_reason(tmp_path: Path) -> None:
    url = (tmp_path / "objects").as_uri()
    with pytest.raises(StoreUnreachableError, match="mount the same directory"):
        await open_object_store(url).check_marker()
    assert not (tmp_path / "objects").exists()
    mark = await open_object_store(url).write_marker()
    assert await open_object_store(url).write_marker() == mark
    assert await open_object_store(url).check_marker() == mark


async def test_a_store_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ObjectStoreError, match="cannot write nar/x"):
        await LocalObjectStore(tmp_path / "file").put_bytes("nar/x", b"data")


@pytest.mark.parametrize("url", ["", "ftp://host/x", "file://host/x", "file:relative", "/plain"])
def test_an_address_that_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(CacheError, match=r"object store"):
        open_object_store(url)


def test_credentials_in_an_address_are_never_shown() -> None:
    store = open_object_store("s3://user:hunter2@bucket/prefix?secret_access_key=hunter2")
    assert "hunter2" not in repr(store) + store.url


async def test_only_old_leftovers_are_swept(tmp_path: Path, store: ObjectStore) -> None:
    await store.put_bytes(incoming_key(), b"left by a crash")
    await store.put_bytes("nar/kept", b"object")
    assert await sweep_incoming(store, before=time.time() - 3600) == 0
    if local := store.local_path("incoming"):
        # What the kernel leaves of a multipart upload whose process was killed.
        (local / "0123#1").write_bytes(b"half")
    assert await sweep_incoming(store, before=time.time() + 3600) >= 1
    assert [entry.key async for entry in store.list("incoming")] == []
    assert await store.head("nar/kept") == 6
