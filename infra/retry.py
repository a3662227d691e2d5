"""Retries with exponential backoff, bounded by total time."""

from __future__ import annotations

import asyncio
from typing import Final

#: Pauses between attempts, in seconds: they double from the first to the longest.
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0


class Patience:
    """A series of attempts within `patience_s` seconds: `pause` waits before the next one, or says that it is over."""

    def __init__(self, patience_s: float) -> None:
        self._until = asyncio.get_running_loop().time() + patience_s
        self._pause_s = FIRST_PAUSE_S

    async def pause(self) -> bool:
        """Wait and return True, or False at once where the time is over."""
        left = self._until - asyncio.get_running_loop().time()
        if left <= 0:
            return False
        await asyncio.sleep(min(self._pause_s, left))
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        return True
