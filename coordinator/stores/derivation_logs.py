"""Logs by derivation, as `nix log` asks for them: the newest attempt of the step that a .drv is a recipe of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from coordinator.stores.derivations import DerivationStore
from coordinator.stores.logs import LogStore
from scheduler.model import StepKey


class DerivationLogs:
    """Finds logs; `attempts` returns how many leases of a step were granted."""

    def __init__(self, derivations: DerivationStore, logs: LogStore, attempts: Callable[[StepKey], int]) -> None:
        self._derivations = derivations
        self._logs = logs
        self._attempts = attempts

    async def read(self, drv: str) -> AsyncIterator[bytes] | None:
        """Return the newest log of a .drv (base name) in pieces, None where there is none."""
        node = (await self._derivations.nodes([drv])).get(drv)
        if node is None:
            return None
        attempt = self._attempts(node.step)
        return self._logs.read(node.step, attempt) if await self._logs.file(node.step, attempt) else None
