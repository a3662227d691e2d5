"""Release pointers over the cache's HTTP side: the revision of an environment that is stable on each system.

`stable.json` is for programs, `stable.nix` for Nix, which imports it. Both name the store paths, so that a reader
realises them from this cache without asking anything else. They are rendered once for each move of a pointer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final

import orjson
from aiohttp import web

from coordinator.environments.model import NAME
from coordinator.environments.pointers import SystemPointer
from coordinator.environments.store import EnvironmentsError, EnvironmentStore
from coordinator.wishes.model import WishedPaths, WishList

#: Rendered files in memory, and their bytes.
MAX_RENDERED: Final = 64
MAX_RENDERED_BYTES: Final = 64 * 1024 * 1024
#: `Retry-After` while the database does not answer, in seconds.
_RETRY_AFTER_S: Final = 5
_AGE_S: Final = 60

_log = logging.getLogger(__name__)

_Systems = dict[str, dict[str, Any]]
_Key = tuple[str, tuple[tuple[str, int, float], ...]]


class PointerFiles:
    """The files of all environments."""

    def __init__(self, store: EnvironmentStore) -> None:
        self._store = store
        #: (environment, where its pointers are and since when: a name may be that of another environment later) -> its
        #: files as JSON and as Nix, the one last used last.
        self._rendered: OrderedDict[_Key, tuple[bytes, bytes]] = OrderedDict()

    async def json(self, request: web.Request) -> web.Response:
        """Send `stable.json`."""
        return await self._answer(request, 0, "application/json")

    async def nix(self, request: web.Request) -> web.Response:
        """Send `stable.nix`."""
        return await self._answer(request, 1, "text/x-nix")

    async def _answer(self, request: web.Request, form: int, content_type: str) -> web.Response:
        name = request.match_info["environment"]
        try:
            files = await self._files(name)
        except EnvironmentsError as error:
            _log.warning("answered 404 because environments cannot be read: %s", error)
            headers = {"Cache-Control": "no-store", "Retry-After": str(_RETRY_AFTER_S)}
            return web.Response(status=404, text="not available just now\n", headers=headers)
        if files is None:
            text = "no environment of that name has been whole on any system yet\n"
            return web.Response(status=404, text=text, headers={"Cache-Control": "no-store"})
        body = files[form]
        tag = blake2b(body, digest_size=12).hexdigest()
        headers = {"Cache-Control": f"public, max-age={_AGE_S}", "ETag": f'"{tag}"'}
        if any(each.value in {tag, "*"} for each in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, content_type=content_type, headers=headers)

    async def _files(self, name: str) -> tuple[bytes, bytes] | None:
        if not NAME.fullmatch(name):
            return None
        pointers = {system: each for system, each in (await self._store.pointers(name)).items() if each.revision}
        if not pointers:
            return None
        key = (name, tuple((system, each.revision, each.moved_at) for system, each in pointers.items()))
        files = self._rendered.get(key)
        if files is None:
            numbers = {each.revision for each in pointers.values()}
            contents = await self._store.contents(name, numbers)
            marks = {each.number: each.mark for each in await self._store.revisions(name)}
            files = await asyncio.to_thread(_rendered, name, pointers, contents, marks)
            # Pointers may have moved and moved back meanwhile: what lacks a content is not kept.
            if contents.keys() == numbers:
                self._keep(key, files)
        else:
            self._rendered.move_to_end(key)
        return files

    def _keep(self, key: _Key, files: tuple[bytes, bytes]) -> None:
        for old in [each for each in self._rendered if each[0] == key[0]]:
            del self._rendered[old]
        self._rendered[key] = files
        while len(self._rendered) > MAX_RENDERED or (
            len(self._rendered) > 1
            and sum(sum(map(len, each)) for each in self._rendered.values()) > MAX_RENDERED_BYTES
        ):
            self._rendered.popitem(last=False)


def _rendered(
    name: str, pointers: Mapping[str, SystemPointer], contents: Mapping[int, WishList], marks: Mapping[int, str]
) -> tuple[bytes, bytes]:
    systems: _Systems = {}
    for system, pointer in sorted(pointers.items()):
        content = contents.get(pointer.revision)
        if content is None:
            continue
        systems[system] = {
            "revision": pointer.revision,
            "mark": marks.get(pointer.revision, ""),
            "moved_at": int(pointer.moved_at),
            "packages": {
                wish.name: {output.name: output.path for output in wish.target.outputs}
                for wish in content.wishes
                if wish.system == system and isinstance(wish.target, WishedPaths)
            },
        }
    as_json = orjson.dumps({"environment": name, "pointer": "stable", "systems": systems})
    return as_json + b"\n", nix_text({"environment": name, "pointer": "stable", "systems": systems}).encode()


def nix_text(value: Mapping[str, Any]) -> str:
    """Return a value of sets, texts and whole numbers as a Nix expression, with a line for each member."""
    return f"# Made by drover. Import it: nothing in it is evaluated or fetched.\n{_nix(value, '')}\n"


def _nix(value: object, indent: str) -> str:
    if isinstance(value, Mapping):
        below = f"{indent}  "
        members = [f"{below}{_nix_string(str(name))} = {_nix(each, below)};" for name, each in value.items()]
        return "\n".join(["{", *members, f"{indent}}}"])
    return str(value) if isinstance(value, int) else _nix_string(str(value))


def _nix_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${").replace("\n", "\\n")
    return f'"{escaped.replace(chr(13), chr(92) + "r")}"'
