"""Several caches in one coordinator, and who may use which."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from coordinator.caches.opening import OpenCache, open_caches
from coordinator.config import CacheSettings, ConfigError, NamedCacheSettings, Settings, load_settings
from coordinator.http.binary_cache.routes import add_cache_routes
from coordinator.security.farm_secrets import Succession
from coordinator.security.tokens import CacheAccess, TokenError, TokenSet, load_tokens, told_token
from infra.cache.catalog.database import FencingToken
from infra.clock import SystemClock
from tests.support.cache import base_name, publish, store_path, uploaded_claim

A = store_path("a")
READER, WRITER, API, FARM = (f"{name}-token-of-enough-length" for name in ("reader", "writer", "api", "farm"))


@dataclass
class Caches:
    opened: dict[str, OpenCache]
    url: str
    http: aiohttp.ClientSession

    async def status(self, address: str, authorization: str = "", method: str = "GET") -> int:
        headers = {"Authorization": authorization} if authorization else {}
        async with self.http.request(method, f"{self.url}/{address}", headers=headers) as answer:
            if answer.status == 401:
                assert answer.headers["WWW-Authenticate"].startswith("Basic ")
                assert answer.headers["Cache-Control"] == "no-store"
            return answer.status


@asynccontextmanager
async def serve(
    state_dir: Path, cache: CacheSettings | None = None, caches: Sequence[NamedCacheSettings] = ()
) -> AsyncGenerator[Caches, None]:
    settings = Settings(state_dir=state_dir, cache=cache or CacheSettings(), caches=tuple(caches))
    async with AsyncExitStack() as stack:
        secrets = replace(await Succession(settings).load({}, stood_by=False), api_token=API)
        opened = await open_caches(stack, settings, SystemClock(), FencingToken(1, 1), secrets=secrets, farm_token=FARM)
        app = web.Application()
        for each in reversed(opened):
            add_cache_routes(app, each)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield Caches({each.name: each for each in opened}, f"http://127.0.0.1:{runner.addresses[0][1]}/cache", http)


def token_file(directory: Path, name: str, *tokens: str) -> str:
    file = directory / name
    file.write_text("# who\n" + "\n".join(tokens) + "\n")
    file.chmod(0o600)
    return str(file)


def basic(token: str, user: str = "anybody") -> str:
    return "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()


async def test_caches_share_nothing_but_the_process(tmp_path: Path) -> None:
    names = [NamedCacheSettings(name="team1", priority=20), NamedCacheSettings(name="team-2")]
    async with serve(tmp_path, caches=names) as caches:
        await publish(caches.opened["default"].cache, A)
        claim = await uploaded_claim(caches.opened["team1"].cache, A, b"other bits")
        await caches.opened["team1"].cache.publish([claim])
        narinfo = f"{base_name(A)[:32]}.narinfo"
        texts = []
        for prefix in ("", "team1/"):
            async with caches.http.get(f"{caches.url}/{prefix}{narinfo}") as answer:
                texts.append(await answer.text())
        assert len({line for text in texts for line in text.splitlines() if line.startswith("NarHash")}) == 2
        assert [text.partition("Sig: ")[2].partition(":")[0] for text in texts] == ["drover-1", "team1-drover-1"]
        assert await caches.status(f"team-2/{narinfo}") == 404
        assert [await caches.status(f"{prefix}{claim.stored.url}") for prefix in ("", "team1/", "team-2/")] == [
            404,
            200,
            404,
        ]
        async with caches.http.get(f"{caches.url}/team1/nix-cache-info") as answer:
            assert "Priority: 20\n" in await answer.text()
        assert (tmp_path / "objects/caches/team1" / claim.stored.url).is_file()
        for name in ("cache.sqlite3", "cache-team1.sqlite3", "cache-team-2.sqlite3"):
            assert (tmp_path / name).is_file()
        for key in ("cache-key", "cache-team1-key", "cache-team-2-key"):
            assert (tmp_path / key).stat().st_mode & 0o777 == 0o600


async def test_a_private_cache_answers_only_those_with_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM1_WRITERS", WRITER)
    readers = (token_file(tmp_path, "readers", "somebody-elses-long-token", READER),)
    team1 = NamedCacheSettings(name="team1", readers=readers, writers=("env:TEAM1_WRITERS",))
    async with serve(tmp_path, caches=[team1]) as caches:
        claim = await uploaded_claim(caches.opened["team1"].cache, A)
        await caches.opened["team1"].cache.publish([claim])
        addresses = ["nix-cache-info", f"{base_name(A)[:32]}.narinfo", claim.stored.url]
        for address in [*addresses, "anything"]:
            for wrong in ("", basic("wrong-token-of-enough-length"), f"Bearer {API}", basic(READER)[:-4], basic("")):
                for method in ("GET", "HEAD"):
                    assert await caches.status(f"team1/{address}", wrong, method) == 401
            assert await caches.status(address) == (200 if address == "nix-cache-info" else 404)
        for address in addresses:
            for right in (basic(READER), basic(READER, ""), f"bearer {READER}", basic(WRITER)):
                assert await caches.status(f"team1/{address}", right) == 200
        async with caches.http.get(
            f"{caches.url}/team1/{claim.stored.url}", headers={"Authorization": basic(READER)}
        ) as answer:
            assert answer.headers["Cache-Control"].startswith("private")


async def test_the_farms_own_workers_may_read_its_private_cache(tmp_path: Path) -> None:
    private = CacheSettings(readers=(token_file(tmp_path, "readers", READER),))
    async with serve(tmp_path, cache=private) as caches:
        for token in (READER, FARM, API):
            assert await caches.status("nix-cache-info", f"Bearer {token}") == 200
        assert await caches.status("nix-cache-info") == 401


@given(header=st.text(max_size=80), token=st.text(min_size=1, max_size=40))
def test_no_header_is_mistaken_for_a_token(header: str, token: str) -> None:
    access = CacheAccess(TokenSet([token]))
    assert told_token({"Authorization": basic(token)}) == token
    told = told_token({"Authorization": header})
    assert (told in TokenSet([token])) == (told == token)
    assert not access.public


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [
        ("short\n", 0o600, "fewer than 16 characters"),
        ("# nothing\n\n", 0o600, "there is no token"),
        (f"{READER}\n", 0o640, "others can read"),
        (None, 0o600, "No such file"),
    ],
)
def test_tokens_that_are_no_secret_are_refused(tmp_path: Path, content: str | None, mode: int, sentence: str) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(TokenError, match=sentence) as caught:
        load_tokens([str(file)])
    assert READER not in str(caught.value)


def test_a_variable_that_is_not_set_is_named() -> None:
    assert "DROVER_NO_SUCH" not in os.environ
    with pytest.raises(TokenError, match="DROVER_NO_SUCH"):
        load_tokens(["env:DROVER_NO_SUCH"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[caches]]\nname = 'nar'", "cannot be called nar"),
        ("[[caches]]\nname = '../x'", "setting caches.0.name"),
        ("[[caches]]\nname = 'a'\n[[caches]]\nname = 'a'", "two caches are called a"),
        ("[cache]\naccel_prefix = 'x'", "setting cache.accel_prefix"),
        ("[cache]\nreader = ['x']", "setting cache.reader"),
    ],
)
def test_a_wrong_setting_of_a_cache_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "drover.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_settings(file)


def test_a_named_caches_metadata_lie_beside_the_default_ones_or_in_a_schema_of_their_own(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    assert settings.named_cache_database_url("a") == f"sqlite+aiosqlite:///{tmp_path}/cache-a.sqlite3"
    settings = Settings(cache_database_url="postgresql+psycopg://user@host/db?sslmode=require")
    assert settings.named_cache_database_url("a-b") == (
        "postgresql+psycopg://user@host/db?sslmode=require&options=-csearch_path%3Dcache_a_b"
    )
