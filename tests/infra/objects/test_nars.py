"""NARs into the store and out of it: streaming, whole or nothing, and never trusted."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import zstandard

from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.objects.compression import SUFFIXES, Compression
from infra.objects.errors import CacheError, CorruptNarError, ObjectMissingError, ObjectStoreError
from infra.objects.nar_encoder import BLOCK_BYTES, FRAME_BYTES, UploadedNar
from infra.objects.nar_reader import fetch_nar
from infra.objects.nar_writer import QUICK_BYTES, upload_nar
from infra.objects.object_files import INLINE_BYTES
from infra.objects.store import LocalObjectStore, ObjectStore
from tests.support.cache import chunked, narinfo_of
from tests.support.patience import PATIENCE_S

NOISE = random.Random(7).randbytes(24 * 1024 * 1024)
#: What xz, which takes a second for each MiB of noise, compresses fast: noise that is repeated.
ECHO = NOISE[:BLOCK_BYTES] * (len(NOISE) // BLOCK_BYTES)
SIZES = [1, INLINE_BYTES, INLINE_BYTES + 1, BLOCK_BYTES, FRAME_BYTES, FRAME_BYTES + 1, len(NOISE)]


def promise(uploaded: UploadedNar) -> NarInfo:
    return narinfo_of("/nix/store/6k1mvl8ixhsqvqzhy7i4hdfpyvbfvmjf-x", uploaded)


async def fetched(store: ObjectStore, wanted: NarInfo) -> bytes:
    return b"".join([data async for data in fetch_nar(store, wanted)])


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(tmp_path)


def files(store: LocalObjectStore, folder: str) -> list[Path]:
    path = store.local_path(folder)
    assert path is not None
    return sorted(path.iterdir()) if path.exists() else []


@pytest.mark.parametrize("compression", ["zstd", "xz", "none"])
@pytest.mark.parametrize("size", SIZES)
async def test_what_is_uploaded_is_described_truly_and_read_back(
    store: LocalObjectStore, size: int, compression: Compression
) -> None:
    nar = (ECHO if compression == "xz" else NOISE)[:size]
    uploaded = await upload_nar(store, chunked(nar, 300_000), compression)
    data = await store.get_bytes(uploaded.stored.url)
    file_hash = sha256_text(sha256(data).digest())
    url = f"nar/{file_hash.removeprefix('sha256:')}.nar{SUFFIXES[compression]}"
    stored = StoredNar(url, compression, file_hash, len(data))
    assert uploaded == UploadedNar(sha256_text(sha256(nar).digest()), size, stored)
    assert await fetched(store, promise(uploaded)) == nar
    assert files(store, "incoming") == []


async def test_a_large_nar_is_whole_frames_that_a_reader_can_seek_to(store: LocalObjectStore) -> None:
    assert len(NOISE) > FRAME_BYTES > QUICK_BYTES
    uploaded = await upload_nar(store, chunked(NOISE))
    rest, frames = await store.get_bytes(uploaded.stored.url), []
    while rest:
        frame = zstandard.ZstdDecompressor().decompressobj()
        frames.append(frame.decompress(rest))
        rest = frame.unused_data
    assert [len(frame) for frame in frames] == [FRAME_BYTES, len(NOISE) - FRAME_BYTES]
    assert b"".join(frames) == NOISE


async def test_one_nar_uploaded_twice_is_one_object_however_it_was_cut(store: LocalObjectStore) -> None:
    nar = NOISE[: 3 * BLOCK_BYTES]
    both = await asyncio.gather(upload_nar(store, chunked(nar, 1000)), upload_nar(store, chunked(nar, 1 << 21)))
    assert both[0] == both[1]
    assert len(files(store, "nar")) == 1


async def test_the_same_through_a_remote_store() -> None:
    remote = ObjectStore("memory:///")
    for size in (100, len(NOISE)):
        uploaded = await upload_nar(remote, chunked(NOISE[:size]))
        assert await fetched(remote, promise(uploaded)) == NOISE[:size]


@pytest.mark.parametrize("size", [10, BLOCK_BYTES + 10, len(NOISE)])
async def test_an_upload_whose_source_fails_leaves_nothing(store: LocalObjectStore, size: int) -> None:
    async def failing() -> AsyncGenerator[bytes, None]:
        async for chunk in chunked(NOISE[:size]):
            yield chunk
        raise RuntimeError("the builder's machine went away")

    with pytest.raises(RuntimeError, match="went away"):
        await upload_nar(store, failing())
    assert files(store, "nar") == files(store, "incoming") == []


class FullAtTheEnd(LocalObjectStore):
    """A store that takes a large object, and cannot give it its name."""

    async def rename(self, source: str, target: str) -> None:
        assert await self.head(source)
        raise ObjectStoreError(f"cannot rename to {target}: no space left on device")


async def test_an_upload_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    store = FullAtTheEnd(tmp_path)
    with pytest.raises(ObjectStoreError, match="no space left"):
        await upload_nar(store, chunked(NOISE))
    assert files(store, "nar") == files(store, "incoming") == []


async def test_a_cancelled_upload_leaves_nothing(store: LocalObjectStore) -> None:
    reached = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        yield NOISE
        reached.set()
        await asyncio.sleep(3600)

    upload = asyncio.create_task(upload_nar(store, endless()))
    await reached.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert files(store, "nar") == files(store, "incoming") == []


async def test_nothing_is_not_a_nar(store: LocalObjectStore) -> None:
    with pytest.raises(CacheError, match="empty"):
        await upload_nar(store, chunked(b""))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": lambda data: data[:50] + bytes([data[50] ^ 4]) + data[51:],
    "a lost end": lambda data: data[:-1],
    "nothing left": lambda _data: b"",
    "rubbish behind": lambda data: data + b"rubbish",
    "another frame behind": lambda data: data + zstandard.compress(b"more"),
    "other content": lambda _data: zstandard.compress(b"other"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("size", [2000, 3_000_000])
async def test_a_damaged_object_is_never_read_to_the_end(store: LocalObjectStore, damage: str, size: int) -> None:
    uploaded = await upload_nar(store, chunked(NOISE[:size]))
    await store.put_bytes(uploaded.stored.url, DAMAGES[damage](await store.get_bytes(uploaded.stored.url)))
    with pytest.raises(CorruptNarError, match="6k1mvl8ixhsqvqzhy7i4hdfpyvbfvmjf-x"):
        await fetched(store, promise(uploaded))


async def test_a_promise_about_another_nar_is_not_kept(store: LocalObjectStore) -> None:
    true = promise(await upload_nar(store, chunked(NOISE[:5000])))
    other = sha256_text(sha256(b"other").digest())
    path, stored = true.path, true.stored
    for false in (
        NarInfo(replace(path, nar_hash=other), stored),
        NarInfo(replace(path, nar_size=4999), stored),
        NarInfo(replace(path, nar_size=5001), stored),
        NarInfo(path, replace(stored, file_hash=other)),
        NarInfo(path, replace(stored, file_size=stored.file_size + 1)),
        NarInfo(path, replace(stored, compression="xz")),
    ):
        with pytest.raises(CorruptNarError):
            await fetched(store, false)
    with pytest.raises(ObjectMissingError):
        await fetched(store, NarInfo(path, replace(stored, url="nar/none")))


async def test_a_bomb_is_left_after_its_promised_size(store: LocalObjectStore) -> None:
    # 4 GiB in a file of some 400 KB; reading it all would take seconds and, taken at once, all memory.
    frame = zstandard.ZstdCompressor(level=3).compress(bytes(64 * 1024 * 1024))
    await store.put_bytes("nar/bomb", frame * 64)
    wanted = promise(UploadedNar(sha256_text(sha256(b"x").digest()), 1000, StoredNar("nar/bomb", "zstd", "", 0)))
    with pytest.raises(CorruptNarError, match="more than 1000 bytes"):
        await fetched(store, wanted)


async def test_a_reader_may_leave_early(store: LocalObjectStore) -> None:
    uploaded = await upload_nar(store, chunked(NOISE))
    reader = fetch_nar(store, promise(uploaded))
    assert await anext(reader)
    await reader.aclose()


MEMORY = """
import asyncio, sys
from pathlib import Path
from infra.objects.store import open_object_store
from infra.objects.nar_writer import upload_nar
from infra.objects.verification import verify_nar
import random

async def nar(blocks):
    noise = random.Random(1)
    for _ in range(blocks):
        yield noise.randbytes(500_000) + bytes(500_000)

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

async def main():
    store = open_object_store(Path(sys.argv[1]).as_uri())
    await upload_nar(store, nar(40))
    before = peak()
    await upload_nar(store, nar(300))
    print(peak() - before)

asyncio.run(main())
"""


def test_memory_does_not_grow_with_the_nar(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[3],
        timeout=PATIENCE_S,
    )
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    # A slow disk keeps more parts in flight than a quick one; the whole object would be 150 MiB.
    assert int(result.stdout) < 64, "MiB more for 300 MB than for 40 MB"
