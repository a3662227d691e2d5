"""Objects that arrive in pieces: those that began last are proven by the time they are whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from infra.cache.uploads import relay
from infra.cache.uploads.relay import RelayStaging
from infra.nix.hashing import sha256_text
from infra.objects.nar_encoder import compress_now
from infra.objects.store import open_object_store
from infra.objects.verification import ArrivingNar
from tests.support.cache import chunked

MOST = 10_000_000


async def test_of_more_objects_than_are_unpacked_at_one_time_the_last_are_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "MAX_PROOFS", 2)
    objects = open_object_store((tmp_path / "objects").as_uri())
    staging = RelayStaging(objects, tmp_path / "staging")
    made = {f"slot{number}": compress_now(iter([bytes([number]) * 200_000])) for number in range(3)}
    for slot, (data, nar) in made.items():
        half = len(data) // 2
        unpacked = partial(ArrivingNar, "zstd", nar.nar_size)
        assert await staging.append(slot, 0, chunked(data[:half]), MOST, unpacked) == half
        assert not staging.proves(slot, nar.nar_hash, nar.nar_size)
    for slot, (data, nar) in made.items():
        await staging.append(slot, len(data) // 2, chunked(data[len(data) // 2 :]), MOST)
        # The first was let go for the third; it is whole all the same, and read back by the commit.
        assert staging.proves(slot, nar.nar_hash, nar.nar_size) is (None if slot == "slot0" else True)
        assert not staging.proves(slot, sha256_text(bytes(32)), nar.nar_size)
        stored = nar.stored
        assert await staging.place(slot, stored.url, stored.file_hash, stored.file_size)
        assert await objects.get_bytes(stored.url) == data
        assert not staging.proves(slot, nar.nar_hash, nar.nar_size)
