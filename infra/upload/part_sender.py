"""One object in parts, straight to the object store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import md5
from typing import Final, Protocol

from infra.upload.errors import UploadFailedError
from infra.upload.protocol import Parts, PathClaim

#: Parts of one object under way.
PARTS_IN_FLIGHT: Final = 2


class PartCalls(Protocol):
    """Requests that parts need."""

    async def parts(self, upload: str, path: str, first: int) -> Parts:
        """Ask for the addresses of the parts from `first` on."""

    async def put(self, path: str, address: Callable[[], Awaitable[str]], data: bytes) -> str:
        """PUT bytes to a presigned address; returns the ETag."""


class PartSender:
    """Sends the parts of one object, PARTS_IN_FLIGHT at a time, requesting addresses as they are needed."""

    def __init__(self, client: PartCalls, upload: str, claim: PathClaim) -> None:
        self._client = client
        self._upload = upload
        self._claim = claim
        self._room = asyncio.Semaphore(PARTS_IN_FLIGHT)
        self._asking = asyncio.Lock()
        self._urls: dict[int, str] = {}
        self._have: dict[int, tuple[int, str]] = {}
        self.etags: dict[int, str] = {}

    async def submit(self, tasks: asyncio.TaskGroup, number: int, data: bytes) -> None:
        """Take a part over once there is room for it."""
        await self._room.acquire()
        tasks.create_task(self._send(number, data))

    async def _send(self, number: int, data: bytes) -> None:
        try:
            await self._address(number)
            size, etag = self._have.get(number, (0, ""))
            if size == len(data):
                digest = await asyncio.to_thread(lambda: md5(data, usedforsecurity=False).hexdigest())
                if digest == etag:
                    self.etags[number] = etag
                    return

            async def address() -> str:
                return await self._address(number)

            self.etags[number] = await self._client.put(self._claim.path, address, data)
            self._urls.pop(number, None)
        finally:
            self._room.release()

    async def _address(self, number: int) -> str:
        async with self._asking:
            if number not in self._urls:
                answer = await self._client.parts(self._upload, self._claim.path, number)
                self._urls = {int(each): url for each, url in answer.urls.items()}
                self._have = {part.number: (part.size, part.etag) for part in answer.have}
            url = self._urls.get(number)
        if url is None:
            raise UploadFailedError(f"{self._claim.path} is larger than its NAR can become")
        return url
