"""Verification of a stream of derivations: each is what its path says, and stands behind its inputs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from coordinator.errors import IntakeError, MissingMemberError
from coordinator.intake.errors import DerivationRefusedError
from coordinator.stores.derivations import DerivationStore, Kind, Known, NewDerivation, Node
from infra.nix import aterm
from infra.nix.derivation import DerivationKind
from infra.nix.errors import FormatError, NixError, UnknownInputError
from infra.nix.store_path import StoreDir, base_name_of
from infra.nix.verify import KnownDerivation, VerifiedDerivation, Verifier
from scheduler.model import ANY_SYSTEM, StepKey

_KINDS = {DerivationKind.INPUT_ADDRESSED: Kind.INPUT_ADDRESSED, DerivationKind.FIXED: Kind.FIXED}
_BACK = {kind: nix for nix, kind in _KINDS.items()}


class StreamVerifier:
    """Verifies the derivations of one stream, with inputs from earlier streams where these are stored."""

    def __init__(self, derivations: DerivationStore, store_dir: StoreDir) -> None:
        self._derivations = derivations
        self._store_dir = store_dir
        self._verifier = Verifier(store_dir)

    async def verify(self, batch: Sequence[tuple[str, bytes]]) -> list[NewDerivation]:
        """Return what (base name, bytes) are as verified derivations, in order.

        Raises `IntakeError`; the sentence names the member that is at fault.
        """
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
            for name, known in (await self._derivations.known(wanted)).items():
                self._verifier.preload(self._store_dir.full(name), _to_verifier(known))
            looked_up = True
        return done


def _verify_members(
    verifier: Verifier, members: Iterable[tuple[str, bytes]]
) -> tuple[list[NewDerivation], Exception | None]:
    """Verify until the first that cannot be; returns it as an error, for what is before it stays verified."""
    done: list[NewDerivation] = []
    for path, data in members:
        try:
            done.append(_accepted(verifier.add(path, data), data))
        except (NixError, DerivationRefusedError) as error:
            return done, error
    return done, None


def _accepted(verified: VerifiedDerivation, data: bytes) -> NewDerivation:
    kind = _KINDS.get(verified.kind)
    if kind is None:
        raise DerivationRefusedError(
            f"{verified.drv_path} is {verified.kind.value}: its output paths are not known before it is built, and "
            "this farm builds only input-addressed and fixed-output derivations"
        )
    drv = verified.derivation
    system = ANY_SYSTEM if drv.builder.startswith("builtin:") else drv.system
    outputs = tuple(sorted(verified.outputs.items()))
    prefix = len(verified.drv_path.rpartition("/")[0]) + 1
    node = Node(
        drv=verified.drv_path[prefix:],
        step=StepKey(min(path for _, path in outputs)[prefix:]),
        kind=kind,
        system=system,
        features=tuple(sorted(set(verified.options.required_system_features))),
        outputs=outputs,
        needs=tuple(path[prefix:] for path, _ in drv.input_drvs),
        sources=drv.input_srcs,
    )
    return NewDerivation(node, bytes.fromhex(verified.hash_modulo), verified.inputs, data)


def _to_verifier(known: Known) -> KnownDerivation:
    return KnownDerivation(_BACK[known.kind], known.modulo.hex(), dict(known.outputs), deferred=False)


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
