"""Static files of the pages: read once, served under names that change with their content."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from aiohttp import web

from coordinator.errors import NotFoundError

#: All files of the folder `static`.
_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FOLDER: Final = Path(__file__).parent / "static"
#: Characters of a digest in a name.
_DIGEST: Final = 12


@dataclass(frozen=True, slots=True)
class Asset:
    """One file as it is sent."""

    body: bytes
    content_type: str


class Assets:
    """The files by the names under which pages ask for them, `STEM.DIGEST.SUFFIX`."""

    def __init__(self) -> None:
        self._assets: dict[str, Asset] = {}
        self._addresses: dict[str, str] = {}
        for path in sorted(_FOLDER.iterdir()):
            body = path.read_bytes()
            name = f"{path.stem}.{sha256(body).hexdigest()[:_DIGEST]}{path.suffix}"
            self._assets[name] = Asset(body, _TYPES[path.suffix])
            self._addresses[path.name] = f"/static/{name}"

    def address(self, file: str) -> str:
        """Return the address of a file by its own name. Raises `KeyError`."""
        return self._addresses[file]

    async def serve(self, request: web.Request) -> web.Response:
        """Send a file; a browser need not ask for it again."""
        asset = self._assets.get(request.match_info["file"])
        if asset is None:
            raise NotFoundError("there is no such file; reload the page.")
        headers = {"Cache-Control": "public, max-age=31536000, immutable"}
        return web.Response(body=asset.body, content_type=asset.content_type, charset="utf-8", headers=headers)
