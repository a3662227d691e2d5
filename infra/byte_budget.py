"""Budget of bytes that all clients share, given out fairly: clients take turns, each in the order of its requests.

A task acquires the bytes of a large object before it reads it into memory and releases them after. Requests do not
overtake: where the one whose turn it is does not fit yet, all wait, so many small ones cannot keep a large one out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator


class ByteBudget:
    """`capacity` bytes; used from one event loop. A holder must not acquire again before it has released."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        #: The most that was ever held at one time.
        self.peak = 0
        #: Those who wait, by client; the client whose turn it is comes first.
        self._waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def acquire(self, client: str, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes, at most the whole capacity, for as long as the block runs; waits for its turn."""
        size = min(size, self.capacity)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((size, granted))
        try:
            self._grant()
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():
                self.held -= size
            else:
                self._leave(client, size, granted)
            self._grant()

    def _leave(self, client: str, size: int, granted: asyncio.Future[None]) -> None:
        queue = self._waiting.get(client, deque())
        # A release meanwhile may have removed it from the queue.
        with contextlib.suppress(ValueError):
            queue.remove((size, granted))
            if not queue:
                del self._waiting[client]

    def _grant(self) -> None:
        while self._waiting:
            client, queue = next(iter(self._waiting.items()))
            size, granted = queue[0]
            if self.held + size > self.capacity and not granted.cancelled():
                return
            queue.popleft()
            if queue:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            if granted.cancelled():
                continue
            self.held += size
            self.peak = max(self.peak, self.held)
            granted.set_result(None)
