"""Verification of a stream of derivations: each is what its path says, and stands behind its inputs.

Long batches are verified side by side by child processes, where there are some. Whatever these do not take is verified
one by one in a thread, which finds the words for what is wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from coordinator.errors import IntakeError, MissingMemberError
from coordinator.intake.acceptance import accepted, to_verifier
from coordinator.intake.errors import DerivationRefusedError
from coordinator.intake.verifier_pool import VerifierPool
from coordinator.intake.verifier_waves import WaveMember, jobs_of, waves_of, whole
from coordinator.stores.derivation_records import Known, NewDerivation, PackedDerivation, packed
from coordinator.stores.derivations import DerivationStore
from infra.nix import aterm
from infra.nix.errors import FormatError, NixError, UnknownInputError
from infra.nix.store_path import StoreDir, base_name_of
from infra.nix.verify import Verifier

#: Derivations that one turn of a worker thread verifies; some 20 ms.
VERIFY_AT_ONCE: Final = 256
#: Shortest batch that is verified side by side.
SIDE_BY_SIDE_FROM: Final = 128


class StreamVerifier:
    """Verifies the derivations of one stream, with inputs from earlier streams where these are stored."""

    def __init__(self, derivations: DerivationStore, store_dir: StoreDir, pool: VerifierPool | None = None) -> None:
        self._derivations = derivations
        self._store_dir = store_dir
        self._pool = pool
        self._verifier = Verifier(store_dir)
        #: Name of the stream for the processes.
        self._stream = object()
        #: By base name: what was verified of this stream, and what was stored of its inputs.
        self._known: dict[str, Known] = {}

    async def verify(self, batch: Sequence[tuple[str, bytes]]) -> list[PackedDerivation]:
        """Return what (base name, bytes) are as verified derivations, in order.

        Raises `IntakeError`; the sentence names the member that is at fault.
        """
        done: list[PackedDerivation] = []
        if self._pool is not None and self._pool.size and len(batch) >= SIDE_BY_SIDE_FROM:
            done = await self._side_by_side(self._pool, batch)
        if not done:
            for start in range(0, len(batch), VERIFY_AT_ONCE):
                part = await self._one_by_one(batch[start : start + VERIFY_AT_ONCE])
                done += await asyncio.to_thread(packed, part)
                # The next part stands on this one.
                self._learn(done[start:])
        return done

    async def _side_by_side(self, pool: VerifierPool, batch: Sequence[tuple[str, bytes]]) -> list[PackedDerivation]:
        """Return the same as child processes verify it; nothing where they do not."""
        waves, outside = await asyncio.to_thread(self._waves, batch, is_whole=pool.is_native)
        await self._look_up(outside)
        done: dict[str, PackedDerivation] = {}
        for wave in waves:
            jobs = [wave] if pool.is_native else jobs_of(wave, pool.size)
            answers = await asyncio.gather(*(pool.verify(job, self._known, self._stream) for job in jobs))
            if not all(answers):
                return []
            for answer in answers:
                self._learn(answer)
                done.update((each.node.drv, each) for each in answer)
        return [done[name] for name, _ in batch] if waves else []

    def _waves(
        self, batch: Sequence[tuple[str, bytes]], *, is_whole: bool
    ) -> tuple[list[Sequence[WaveMember]], set[str]]:
        """Return a batch in waves, and those of its inputs that are neither in it nor known yet. For a thread."""
        waves: list[Sequence[WaveMember]] = [*filter(None, (whole(batch),))] if is_whole else [*waves_of(batch)]
        needs = {need for wave in waves for member in wave for need in member.inputs}
        return waves, needs.difference(self._known, [name for name, _ in batch])

    def _learn(self, verified: Iterable[PackedDerivation]) -> None:
        for each in verified:
            self._known[each.node.drv] = Known(each.modulo, each.node.kind, each.node.outputs)

    async def _look_up(self, names: Iterable[str]) -> None:
        """Learn what is stored of derivations that are not known yet."""
        wanted = [name for name in dict.fromkeys(names) if name not in self._known]
        if wanted:
            self._known |= await self._derivations.known(wanted)

    async def _one_by_one(self, batch: Sequence[tuple[str, bytes]]) -> list[NewDerivation]:
        members = [(self._store_dir.full(name), data) for name, data in batch]
        done: list[NewDerivation] = []
        looked_up = False
        while len(done) < len(members):
            rest = members[len(done) :]
            fresh, error = await asyncio.to_thread(_verify_members, self._verifier, rest)
            done += fresh
            if error is None:
                continue
            if looked_up or not isinstance(error, UnknownInputError):
                raise _refusal(error, dict(members[len(done) :]))
            # The inputs may be known from earlier streams: ask once for all that this batch lacks.
            wanted = await asyncio.to_thread(_unknown_inputs, self._verifier, members[len(done) :])
            await self._look_up(wanted)
            for name in wanted:
                if name in self._known:
                    self._verifier.preload(self._store_dir.full(name), to_verifier(self._known[name]))
            looked_up = True
        return done


def _verify_members(
    verifier: Verifier, members: Iterable[tuple[str, bytes]]
) -> tuple[list[NewDerivation], Exception | None]:
    """Verify until the first that cannot be; returns it as an error, for what is before it stays verified."""
    done: list[NewDerivation] = []
    for path, data in members:
        try:
            done.append(accepted(verifier.add(path, data), data))
        except (NixError, DerivationRefusedError) as error:
            return done, error
    return done, None


def _unknown_inputs(verifier: Verifier, members: Sequence[tuple[str, bytes]]) -> list[str]:
    """Base names of inputs that are neither remembered nor among `members`; malformed members are passed over."""
    here = {path for path, _ in members}
    names: dict[str, None] = {}
    for _, data in members:
        try:
            derivation = aterm.parse(data)
        except FormatError:
            continue
        for path, _ in derivation.input_drvs:
            if path not in here and verifier.known(path) is None:
                names[base_name_of(path)] = None
    return list(names)


def _refusal(error: Exception, rest: Mapping[str, bytes]) -> IntakeError:
    """Turn the verifier's error into the one that the client receives; `rest` is the unverified part of the batch."""
    if isinstance(error, IntakeError):
        return error
    if isinstance(error, UnknownInputError):
        why = f"{error}; every derivation must be sent after its inputs"
        return MissingMemberError(f"{why}, and they form a cycle" if _in_cycle(error.member, rest) else why)
    return DerivationRefusedError(f"{error}; the derivation was not written by Nix or was changed since")


def _in_cycle(start: str, rest: Mapping[str, bytes]) -> bool:
    """Return whether `start` needs itself by way of members that were sent with it."""
    seen: set[str] = set()
    stack = [start]
    while stack:
        path = stack.pop()
        if path in seen or path not in rest:
            continue
        seen.add(path)
        try:
            needed = [needed for needed, _ in aterm.parse(rest[path]).input_drvs]
        except FormatError:
            continue
        if start in needed:
            return True
        stack += needed
    return False
