"""Verification with a native part, where one was compiled (`./run compile`).

`infra/nix/verify_native.c` takes what Nix commonly writes and what is true; it says nothing of all else. That goes to
`Verifier`, which decides and has the words for what is wrong. So both give the same, and without a compiler nothing
changes but the time. Only processes that verify load it: it reads what strangers send.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Final, Protocol, cast

from infra.nix.derivation import DerivationKind
from infra.nix.store_path import StoreDir, base_name_of
from infra.nix.verify import KnownDerivation, VerifiedDerivation, Verifier

MODULE: Final = "infra.nix.verify_native"
#: Letters of kinds in a record.
_LETTERS: Final = {DerivationKind.FIXED: "f", DerivationKind.INPUT_ADDRESSED: "i"}
_KINDS: Final = {letter: kind for kind, letter in _LETTERS.items()}
_MODULO: Final = 64


class Native(Protocol):
    """The native module."""

    def verify(
        self, store_dir: str, base_name: str, data: bytes, records: dict[str, bytes]
    ) -> tuple[str, int, str, bytes, bytes, bytes] | None:
        """Return the fields of a `QuicklyVerified`, and add its record; None where `Verifier` must look."""


@dataclass(frozen=True, slots=True)
class QuicklyVerified:
    """A common derivation that is what it claims.

    Attributes:
        first_output: Base name of the first of its output paths.
        is_fixed: 1 if its output is fixed, 0 if it is input-addressed.
        content: `[r:]ALGO:HASH` of a fixed output, else "".
        modulo: The 32 bytes that represent it as an input.
        detail: JSON of its system (`builtin` where any will do), sorted features, outputs (name and path), base names
            of input derivations, and sources.
        inputs: JSON of the paths that must be present to build it, as in `VerifiedDerivation`.
    """

    first_output: str
    is_fixed: int
    content: str
    modulo: bytes
    detail: bytes
    inputs: bytes


def is_native() -> bool:
    """Return whether processes of this environment have the native part, without loading it."""
    return find_spec(MODULE) is not None


def load_native() -> Native | None:
    """Return the native part; None where none was compiled."""
    try:
        return cast("Native", import_module(MODULE))
    except ImportError:
        return None


class QuickVerifier(Verifier):
    """Verifier whose native part may look first."""

    def __init__(self, store_dir: StoreDir, native: Native | None) -> None:
        super().__init__(store_dir)
        self._native = native
        #: Base name of a .drv -> what the native part needs of it.
        self._records: dict[str, bytes] = {}

    def quickly(self, base_name: str, data: bytes) -> QuicklyVerified | None:
        """Verify and remember a common derivation, named by its base name; None where `add` must look."""
        if self._native is None:
            return None
        found = self._native.verify(self.store_dir.path, base_name, data, self._records)
        return None if found is None else QuicklyVerified(*found)

    def preload(self, drv_path: str, known: KnownDerivation) -> None:
        """Remember a derivation that was verified earlier, for both."""
        super().preload(drv_path, known)
        self._record(drv_path, known)

    def known(self, drv_path: str) -> KnownDerivation | None:
        """Return the kept digest of `drv_path`, also of one that the native part verified."""
        found = super().known(drv_path)
        if found is None and self.store_dir.contains(drv_path):
            record = self._records.get(base_name_of(drv_path))
            found = None if record is None else _of_record(record)
        return found

    def add(self, drv_path: str, data: bytes) -> VerifiedDerivation:
        """Verify and remember a derivation in Python, for both; raises as `Verifier.add`."""
        verified = super().add(drv_path, data)
        self._record(drv_path, verified.known)
        return verified

    def _record(self, drv_path: str, known: KnownDerivation) -> None:
        letter = _LETTERS.get(known.kind)
        if self._native is not None and letter is not None and not known.deferred:
            outputs = "".join([f"{name}\0{path}\0" for name, path in known.outputs.items()])
            self._records[base_name_of(drv_path)] = f"{known.hash_modulo}{letter}{outputs}".encode()


def _of_record(record: bytes) -> KnownDerivation:
    text = record.decode()
    fields = text[_MODULO + 1 :].split("\0")
    outputs = dict(zip(fields[:-1:2], fields[1::2], strict=True))
    return KnownDerivation(_KINDS[text[_MODULO]], text[:_MODULO], outputs, deferred=False)
