"""The servers that other tests talk to."""

from __future__ import annotations

import psycopg

from infra.objects.store import open_object_store
from tests.support.servers import PostgresServer, S3Place


async def test_an_object_store_on_s3_keeps_what_it_is_given(s3: S3Place) -> None:
    store = open_object_store(s3.url)
    await store.put_bytes("nar/x", b"data")
    assert await store.get_bytes("nar/x") == b"data"
    assert [entry.key async for entry in store.list("nar")] == ["nar/x"]


def test_every_test_gets_an_empty_database(postgres_url: str, postgres_server: PostgresServer) -> None:
    name = postgres_url.partition("@/")[2].partition("?")[0]
    with psycopg.connect(postgres_server.conninfo(name)) as connection:
        question = "select count(*) from information_schema.tables where table_schema = 'public'"
        assert connection.execute(question).fetchone() == (0,)
