"""One stream of derivations on its way into the store: read, verified and written at the same time.

The stream is cut into pieces. While one is verified, the next is read and the one before is written; so at most three
are in memory, and pieces are written in order, each whole and in one transaction. A large derivation goes alone, once
all before it is written, and is written before anything else is read, because its room is given back then.

The cycle collector rests while a piece is verified or written, because it would walk the thousands of records that a
piece leaves, and not while the next one is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from coordinator.api.streams import LARGE_BYTES
from coordinator.intake.verification import StreamVerifier
from coordinator.intake.verifier_pool import VerifierPool
from coordinator.stores.derivation_records import PackedDerivation
from coordinator.stores.derivations import DerivationStore
from infra.collector import collector_paused
from infra.nix.store_path import StoreDir

#: Inflated bytes and derivations of one piece.
PIECE_BYTES: Final = 2 * LARGE_BYTES
PIECE_DERIVATIONS: Final = 5_000

_T = TypeVar("_T")


class DerivationTaker:
    """Takes the batches of one stream; an asynchronous context manager, after which nothing of it goes on."""

    def __init__(
        self,
        derivations: DerivationStore,
        store_dir: StoreDir,
        pool: VerifierPool | None,
        on_written: Callable[[Sequence[PackedDerivation]], None],
    ) -> None:
        """`on_written` gets each piece once it is stored."""
        self._derivations = derivations
        self._on_written = on_written
        self._verifier = StreamVerifier(derivations, store_dir, pool)
        self._pool = pool
        self._piece: list[tuple[str, bytes]] = []
        self._size = 0
        self._verifying: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        #: Derivations that are written.
        self.count = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Never cancelled: a transaction that is would keep the database locked.
        await settled((self._verifying,))
        # It may have begun to write meanwhile.
        await settled((self._writing,))

    async def take(self, batch: Sequence[tuple[str, bytes]]) -> None:
        """Take (base name, bytes) in the order of the stream. Raises `IntakeError`, also for those before."""
        if len(batch) == 1 and len(batch[0][1]) > LARGE_BYTES:
            await self.finish()
            await self._take_piece(list(batch))
            await self._written()
            return
        for start in range(0, len(batch), PIECE_DERIVATIONS):
            part = batch[start : start + PIECE_DERIVATIONS]
            self._piece += part
            self._size += sum(len(data) for _, data in part)
            if self._size >= PIECE_BYTES or len(self._piece) >= PIECE_DERIVATIONS:
                await self._begin_piece()

    async def finish(self) -> None:
        """Wait until all that was taken is written. Raises `IntakeError`."""
        if self._piece:
            await self._begin_piece()
        await self._verified()
        await self._written()

    async def _begin_piece(self) -> None:
        piece, self._piece, self._size = self._piece, [], 0
        if self._pool is not None and self._verifying is not None:
            # A second piece: this is a long stream.
            self._pool.start()
        await self._verified()
        self._verifying = asyncio.create_task(self._take_piece(piece))

    async def _take_piece(self, piece: list[tuple[str, bytes]]) -> None:
        with collector_paused():
            verified = await self._verifier.verify(piece)
            piece.clear()
            await self._written()
        self._writing = asyncio.create_task(self._write(verified))

    async def _write(self, verified: Sequence[PackedDerivation]) -> None:
        with collector_paused():
            await self._derivations.add_packed(verified)
            self.count += len(verified)
            self._on_written(verified)

    async def _verified(self) -> None:
        if self._verifying is not None:
            await ended(self._verifying)

    async def _written(self) -> None:
        if self._writing is not None:
            await ended(self._writing)


async def ended(task: asyncio.Task[_T]) -> _T:
    """Return what a task returns, which goes on where the one that waits is cancelled. Raises what it raised."""
    await asyncio.wait((task,))
    return task.result()


async def settled(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Wait until tasks have ended, however they did; what they raised is known elsewhere or of no further interest."""
    for task in tasks:
        if task is not None:
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()
