"""The installed Nix, unmodified, as client of the cache: SQLite and a directory, PostgreSQL and S3."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from coordinator.cli.commands import run as drover
from coordinator.config import CacheSettings, Settings
from coordinator.main import Coordinator, open_coordinator
from infra.nix import narinfo
from infra.nix.narinfo import NarInfo
from tests.coordinator.conftest import nix_workers
from tests.support.cache import STORE_DIR, secret_key
from tests.support.patience import PATIENCE_S
from tests.support.proxy import Fault, FaultyProxy

EXPRESSION = """
let
  run = extra: name: script: derivation ({
    inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ]; PATH = "/bin";
  } // extra);
  base = run { } "base" "echo base > $out; i=0; while [ $i -lt 20000 ]; do echo $i $out; i=$((i+1)); done >> $out";
  floating = { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
in rec {
  odd = run { } "odd+name.1?x=2" "echo ${base} $out > $out; echo made odd";
  content = run floating "content" "echo addressed > $out";
  above = run floating "above" "read x < ${content}; echo above $x > $out";
}
"""
SANDBOX = {"sandbox": "true", "sandbox-paths": "/bin/sh=/bin/busybox", "build-users-group": ""}


@dataclass
class Site:
    """A running coordinator, and Nix stores beside it."""

    coordinator: Coordinator
    root: Path
    token_file: Path
    #: What clients are told; a proxy may stand there.
    url: str

    def nix(self, store: str, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a Nix command on the store of that name, which trusts only the farm's key unless told otherwise."""
        told = {
            "substituters": "",
            "trusted-public-keys": " ".join(self.coordinator.ready.public_keys),
            "netrc-file": str(self.root / "netrc"),
            "experimental-features": "nix-command ca-derivations",
            **SANDBOX,
            **settings,
        }
        words = [word for name, value in told.items() for word in ("--option", name.replace("_", "-"), value)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.root / f"cache-{store}")}
        return subprocess.run(
            [*command, "--store", str(self.root / store), *words],
            capture_output=True,
            text=True,
            env=environment,
            timeout=PATIENCE_S,
            check=False,
        )

    async def run(self, store: str, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run it beside the event loop, which serves it."""
        return await asyncio.to_thread(self.nix, store, *command, **settings)

    async def built(self, attribute: str) -> str:
        file = self.root / "default.nix"
        file.write_text(EXPRESSION)
        done = await self.run("source", "nix-build", str(file), "-A", attribute, "--no-out-link")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    async def pushed(self, path: str) -> None:
        arguments = ["cache", "push", path, "--store", str(self.root / "source"), "--token-file", str(self.token_file)]
        arguments += ["--coordinator", self.coordinator.ready.url]
        assert await asyncio.to_thread(drover, arguments) == 0

    async def fetched(self, store: str, path: str, **settings: str) -> subprocess.CompletedProcess[str]:
        told = {"substituters": self.url, "narinfo_cache_negative_ttl": "0", **settings}
        return await self.run(store, "nix-store", "-r", path, **told)

    async def info(self, path: str) -> NarInfo:
        text = await self.coordinator.cache.narinfo(path.rpartition("/")[2][:32])
        assert text is not None
        return narinfo.parse(text, STORE_DIR)


@pytest.fixture(params=["sqlite and a directory", "postgresql and s3"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    told: dict[str, object] = {}
    if request.param != "sqlite and a directory":
        told["object_store_url"] = request.getfixturevalue("s3").url
        told["cache_database_url"] = request.getfixturevalue("postgres_url")
    settings = Settings(state_dir=tmp_path / "farm", port=0, cache=CacheSettings(), **told)  # type: ignore[arg-type]
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(open_coordinator(settings, nix_workers(tmp_path, ())))
        token_file = coordinator.ready.token_file
        netrc = tmp_path / "netrc"
        netrc.touch(mode=0o600)
        netrc.write_text(f"machine 127.0.0.1 login ci password {token_file.read_text().strip()}\n")
        yield Site(coordinator, tmp_path, token_file, coordinator.ready.cache_url)


async def test_what_is_pushed_is_fetched_whole_by_a_client_that_trusts_only_the_key(site: Site) -> None:
    path = await site.built("odd")
    await site.pushed(path)
    done = await site.fetched("client", path)
    assert done.returncode == 0, done.stderr
    checked = await site.run("client", "nix-store", "--verify", "--check-contents")
    assert (checked.returncode, "error" in checked.stderr) == (0, False), checked.stderr
    source, client = (site.root / store / path.lstrip("/") for store in ("source", "client"))
    assert client.read_bytes() == source.read_bytes()
    (root,) = await site.coordinator.cache.roots()
    assert (root.kind, root.name, root.paths) == ("push", path.rpartition("/")[2], 1)
    # Again nothing is sent, and the root is renewed.
    sent = site.coordinator.cache.counters.published
    await site.pushed(path)
    assert site.coordinator.cache.counters.published == sent


async def test_nix_copies_to_the_cache_and_back(site: Site) -> None:
    path = await site.built("odd")
    copied = await site.run("source", "nix", "copy", "--to", site.url, path)
    assert copied.returncode == 0, copied.stderr
    back = await site.fetched("client", path)
    assert back.returncode == 0, back.stderr
    asked = await site.run("client", "nix", "path-info", "--sigs", path)
    assert site.coordinator.ready.public_keys[0].partition(":")[0] in asked.stdout


async def test_another_key_and_changed_bytes_are_refused(site: Site) -> None:
    path = await site.built("odd")
    await site.pushed(path)
    stranger = await site.fetched("stranger", path, trusted_public_keys=str(secret_key("stranger-1", 9).public))
    assert stranger.returncode != 0
    assert not (site.root / "stranger" / path.lstrip("/")).exists()
    info = await site.info(path)
    objects = site.coordinator.cache.objects
    data = bytearray(await objects.get_bytes(info.stored.url))
    data[len(data) // 2] ^= 0xFF
    await objects.put_bytes(info.stored.url, bytes(data))
    corrupted = await site.fetched("client", path)
    assert corrupted.returncode != 0
    assert not (site.root / "client" / path.lstrip("/")).exists()


async def test_a_transfer_that_is_cut_is_resumed(site: Site) -> None:
    path = await site.built("odd")
    await site.pushed(path)
    port = int(site.coordinator.ready.url.rpartition(":")[2])
    async with FaultyProxy(port) as proxy:
        if site.coordinator.cache.objects.local_path("nar/x") is not None:
            # From a directory the bytes come through here; from S3 the redirect is followed past it.
            proxy.fail(Fault.CUT_ANSWER, 1, r"/nar/")
        site.url = f"{proxy.endpoint}/cache"
        done = await site.fetched("client", path)
        assert done.returncode == 0, done.stderr
        assert any("/nar/" in line for line in proxy.requests)
    assert (site.root / "client" / path.lstrip("/")).exists()


async def test_a_log_that_nix_uploaded_is_shown_by_nix_log(site: Site) -> None:
    path = await site.built("odd")
    deriver = await site.run("source", "nix-store", "-q", "--deriver", path)
    derivation = deriver.stdout.strip()
    headers = {"Authorization": f"Bearer {site.token_file.read_text().strip()}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        name = re.sub(r"\?", "%3F", derivation.rpartition("/")[2])
        async with http.put(f"{site.url}/log/{name}", data=b"made odd\n") as answer:
            assert answer.status == 200, await answer.text()
    # A client that has the derivation, but never built it.
    instantiated = await site.run("client", "nix-instantiate", str(site.root / "default.nix"), "-A", "odd")
    assert instantiated.stdout.strip() == derivation, instantiated.stderr
    shown = await site.run("client", "nix", "log", derivation, substituters=site.url)
    assert shown.stdout == "made odd\n", shown.stderr


async def test_content_addressed_outputs_are_found_by_signed_realisations(site: Site) -> None:
    path = await site.built("above")
    file = str(site.root / "default.nix")
    copied = await site.run("source", "nix", "copy", "--to", site.url, "-f", file, "above", "content")
    assert copied.returncode == 0, copied.stderr
    # Without builders, only a trusted realisation tells what the output became.
    done = await site.run(
        "client", "nix", "build", "-f", file, "above", "--no-link", max_jobs="0", substituters=site.url
    )
    assert done.returncode == 0, done.stderr
    assert (site.root / "client" / path.lstrip("/")).read_text() == "above addressed\n"
