"""A binary cache in memory, of small paths: it counts what it is asked, and can be made to fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from hashlib import sha256
from typing import TypeAlias

import orjson
import zstandard
from aiohttp import web

from infra.nix.hashing import sha256_text
from infra.nix.narinfo import NarInfo, StoredNar
from infra.nix.path_info import PathInfo
from infra.nix.signing import SecretKey
from tests.support.cache import base_name, secret_key, store_path

Answer: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def nar_of(content: bytes) -> bytes:
    """Return the NAR of a regular file."""
    words = (b"nix-archive-1", b"(", b"type", b"regular", b"contents", content, b")")
    return b"".join(len(word).to_bytes(8, "little") + word + bytes(-len(word) % 8) for word in words)


class SmallCache:
    """The cache; `answer` is a handler. With `closures` it answers the question for a closure as a coordinator does."""

    def __init__(self, *, closures: bool = True, key: SecretKey | None = None) -> None:
        self.key = key or secret_key()
        self.closures = closures
        self.infos: dict[str, NarInfo] = {}
        self.nars: dict[str, bytes] = {}
        #: Requests by method and kind of address: `GET narinfo`, `GET nar`, `POST narinfos`.
        self.asked: Counter[str] = Counter()
        self.addresses: list[str] = []
        #: `Authorization` of each request.
        self.tokens: list[str] = []
        #: Answers before the cache does, where it returns something.
        self.first: Answer | None = None

    def add(self, name: str, content: bytes = b"", references: Iterable[str] = ()) -> str:
        """Publish a file as a path that refers to others; returns the path."""
        path, nar = store_path(name), nar_of(content or name.encode())
        file = zstandard.compress(nar)
        url = f"nar/{digest(file).removeprefix('sha256:')}.nar.zst"
        stored = StoredNar(url, "zstd", digest(file), len(file))
        names = tuple(sorted(base_name(each) for each in references))
        info = NarInfo(PathInfo(path, digest(nar), len(nar), names), stored)
        self.infos[info.hash_part] = info.signed((self.key.sign(info.path.fingerprint()),))
        self.nars[url] = file
        return path

    def chain(self, name: str, length: int, size: int = 0) -> list[str]:
        """Publish paths of which each refers to the two before it."""
        paths: list[str] = []
        for number in range(length):
            text = f"{name}-{number}"
            paths.append(self.add(text, text.encode().ljust(size, b"."), paths[-2:]))
        return paths

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        address = request.path.removeprefix("/cache/")
        kind = address.partition("/")[0] if "/" in address else address.rpartition(".")[2]
        self.asked[f"{request.method} {kind}"] += 1
        self.addresses.append(address)
        self.tokens.append(request.headers.get("Authorization", ""))
        if self.first is not None and (given := await self.first(request)) is not None:
            return given
        if request.method == "POST" and self.closures and address == "narinfos":
            return self._closure(orjson.loads(await request.read())["paths"])
        if request.method == "GET":
            if address == "nix-cache-info":
                return web.Response(text="StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n")
            info = self.infos.get(address.removesuffix(".narinfo"))
            if info is not None:
                return web.Response(body=info.render())
            if address in self.nars:
                return web.Response(body=self.nars[address])
        return web.Response(status=404)

    def _closure(self, parts: list[str]) -> web.Response:
        found: dict[str, NarInfo] = {}
        left = list(parts)
        while left:
            part = left.pop()[:32]
            if part in self.infos and part not in found:
                found[part] = self.infos[part]
                left += found[part].path.references
        lines = ",\n".join(orjson.dumps(info.render().decode()).decode() for info in found.values())
        missing = orjson.dumps([part for part in parts if part[:32] not in found]).decode()
        return web.Response(text=f'{{"narinfos":[\n{lines}\n],"missing":{missing},"next":""}}')


def digest(data: bytes) -> str:
    return sha256_text(sha256(data).digest())
