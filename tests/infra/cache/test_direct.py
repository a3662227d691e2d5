"""Presigned uploads and remote objects over a real S3 store: what is abandoned goes, and silence is an error."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from infra.cache.uploads import s3_direct
from infra.cache.uploads.s3_direct import direct_uploads
from infra.objects import store as objects
from infra.objects.errors import ObjectMissingError, ObjectStoreError
from infra.objects.store import open_object_store
from tests.support.proxy import Fault, FaultyProxy
from tests.support.servers import S3Place, S3Server


async def test_abandoned_uploads_are_swept_however_many_there_are(s3: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_direct, "PAGE", 2)
    uploads = direct_uploads(open_object_store(s3.url))
    assert uploads is not None
    begun = [await uploads.open_multipart(f"nar/{number}-", ".nar.zst") for number in range(7)]
    assert await uploads.open_multipart("nar/3-", ".nar.zst") == begun[3]
    assert await uploads.sweep(time.time() - 3600) == 0
    assert await uploads.sweep(time.time() + 60) == 7
    for key, upload in begun:
        with pytest.raises(ObjectMissingError):
            await uploads.parts(key, upload, range(1, 2))
    assert await uploads.sweep(time.time() + 60) == 0


async def test_a_store_that_takes_a_request_and_never_answers_is_asked_again_and_then_an_error(
    s3_server: S3Server, s3: S3Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("read_timeout", "timeout"):
        monkeypatch.setitem(objects.CLIENT_OPTIONS, name, timedelta(seconds=0.3))
    monkeypatch.setitem(objects.RETRY_CONFIG, "max_retries", 2)
    async with FaultyProxy(s3_server.port) as proxy:
        place = s3_server.at(s3.prefix, proxy.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL", place.endpoint)
        store = open_object_store(place.url)
        proxy.fail(Fault.SILENT, 2)
        await store.put_bytes("nar/x", b"data")
        assert proxy.failed == 2
        proxy.fail(Fault.SILENT, 1000)
        with pytest.raises(ObjectStoreError, match="cannot read nar/x"):
            await store.get_bytes("nar/x")
        assert proxy.failed == 3
        proxy.fail(Fault.SILENT, 0)
        assert await store.get_bytes("nar/x") == b"data"
