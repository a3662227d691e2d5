"""Verification of derivations: their own paths, their output paths, their inputs.

A `Verifier` takes the derivations of one graph, inputs first, as (path, bytes), and recomputes everything that a
path promises. What it needs to know of a derivation to verify those above it is a `KnownDerivation`, small enough to
be stored and preloaded, so that a graph that shares most of its members with earlier ones costs only what is new.

Only canonical files are taken: sorted, unique, escaped as Nix escapes. Nix hashes its own rendering of what it read,
so for any other file the hash modulo of the bytes would differ from Nix's, and no Nix writes such files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from infra.nix import aterm, modulo
from infra.nix.canonical import CanonicalDrv, of_scan, read_canonical
from infra.nix.derivation import DerivationKind, DerivationOptions, classify, options_from_env
from infra.nix.errors import (
    DerivationPathError,
    FormatError,
    NotCanonicalError,
    OutputPathError,
    UnknownInputError,
    UnknownOutputError,
    UnsupportedDerivationError,
    VerificationError,
)
from infra.nix.hashing import DIGEST_SIZES
from infra.nix.store_path import StoreDir, is_valid_name, output_path_name

_DRV_SUFFIX: Final = ".drv"
_BASE16: Final = re.compile(r"[0-9a-f]+\Z")
#: Kinds whose output paths are known before they are built.
_PATHS_KNOWN: Final = frozenset((DerivationKind.INPUT_ADDRESSED, DerivationKind.FIXED))


@dataclass(frozen=True, slots=True)
class KnownDerivation:
    """Digest of a verified derivation that a verifier keeps.

    Attributes:
        kind: How its paths come about.
        hash_modulo: Base16 hash that represents it as an input.
        outputs: Output name -> full path, "" where it is not known before the build.
        deferred: Whether outputs of those above it can have no known path either.
    """

    kind: DerivationKind
    hash_modulo: str
    outputs: Mapping[str, str]
    deferred: bool


@dataclass(frozen=True, slots=True)
class VerifiedDerivation:
    """A derivation that is what it claims.

    Attributes:
        drv_path: Full path of the .drv file.
        name: Name of the derivation, without `.drv`.
        derivation: Its content, of the environment what verification reads.
        known: What the derivations above it need: kind, hash modulo, output paths.
        masked_hash: Base16 hash that its output paths derive from (input-addressed), or that stands for them until
        they are
            known (floating, deferred); "" for fixed and impure ones.
        options: What decides where it is built.
        inputs: Full store paths that must be present to build it: sources and the outputs used of input derivations,
            sorted, without those of unknown path.
    """

    drv_path: str
    name: str
    derivation: CanonicalDrv
    known: KnownDerivation
    masked_hash: str
    options: DerivationOptions
    inputs: tuple[str, ...]

    @property
    def kind(self) -> DerivationKind:
        """Origin of the output paths."""
        return self.known.kind

    @property
    def outputs(self) -> Mapping[str, str]:
        """Output name -> full path, "" where it is not known before the build."""
        return self.known.outputs

    @property
    def hash_modulo(self) -> str:
        """Base16 hash that represents the derivation as an input."""
        return self.known.hash_modulo


class Verifier:
    """Verifies the derivations of one store directory, inputs first.

    It remembers every derivation it verified; who feeds it bounds the graph.
    """

    def __init__(self, store_dir: StoreDir) -> None:
        #: The directory that every path must lie in.
        self.store_dir = store_dir
        #: Full .drv path -> what those above it need; grows with each derivation that passes.
        self._known: dict[str, KnownDerivation] = {}

    def preload(self, drv_path: str, known: KnownDerivation) -> None:
        """Remember a derivation that was verified earlier, in this or another verifier."""
        self._known[drv_path] = known

    def known(self, drv_path: str) -> KnownDerivation | None:
        """Return the kept digest of `drv_path`."""
        return self._known.get(drv_path)

    def add(self, drv_path: str, data: bytes) -> VerifiedDerivation:
        """Verify the derivation whose file at `drv_path` has the content `data`, and remember it.

        Raises:
            FormatError: If `data` is no derivation, `drv_path` no store path, or an option has the wrong shape;
            `subject` names the member.
            DerivationPathError: If the path is not made from the bytes.
            NotCanonicalError: If Nix would have written other bytes.
            UnknownInputError: If an input derivation was not added or preloaded before.
            UnknownOutputError: If an input has no output of the requested name.
            OutputPathError: If a claimed output path is not the one that follows from the content.
            UnsupportedDerivationError: If the outputs have no kind whose paths can be verified.
        """
        try:
            name = self._name(drv_path)
            drv, in_order = _read(data)
            options = options_from_env(drv.env)
        except FormatError as error:
            subject = f"derivation {drv_path}"
            raise FormatError(error.message, offset=error.offset, subject=subject) from error
        self._check_path(drv_path, name, drv, data)
        if not in_order:
            raise NotCanonicalError(drv_path, "it is not written in Nix's order and escaping")
        kind = self._check_outputs(drv_path, name, drv)
        entries, inputs, below_deferred = self._resolve(drv_path, drv)
        hasher = _Hasher(self.store_dir, drv_path, name, drv, data)
        known, masked = hasher.known(kind, entries, deferred=below_deferred)
        self._known[drv_path] = known
        return VerifiedDerivation(drv_path, name, drv, known, masked, options, inputs)

    def _name(self, drv_path: str) -> str:
        name = self.store_dir.parse(drv_path).name
        if not name.endswith(_DRV_SUFFIX):
            raise FormatError("the path does not end with .drv", offset=len(drv_path))
        return name[: -len(_DRV_SUFFIX)]

    def _check_path(self, drv_path: str, name: str, drv: CanonicalDrv, data: bytes) -> None:
        for source in drv.input_srcs:
            if not self.store_dir.contains(source):
                raise VerificationError(drv_path, f"input source {source!r} is not a path in {self.store_dir.path}")
        # A .drv that the builder reads as a file (`drvPath`) stands among both.
        refs = [path for path, _ in drv.input_drvs]
        refs += drv.input_srcs
        expected = self.store_dir.make_text_path(f"{name}{_DRV_SUFFIX}", sha256(data).hexdigest(), refs)
        if expected != drv_path:
            raise DerivationPathError(drv_path, f"the content belongs at {expected}")

    def _check_outputs(self, drv_path: str, name: str, drv: CanonicalDrv) -> DerivationKind:
        """The kind, after checks of names and of the environment's copies of the paths."""
        try:
            kind = classify(drv.outputs)
        except FormatError as error:
            raise UnsupportedDerivationError(drv_path, error.message) from error
        for output in drv.outputs:
            if not is_valid_name(output.name) or not is_valid_name(output_path_name(name, output.name)):
                raise UnsupportedDerivationError(drv_path, f"output {output.name!r} gives no valid path name")
            claimed = drv.env.get(output.name.encode())
            if kind in _PATHS_KNOWN and claimed != output.path.encode():
                raise OutputPathError(
                    drv_path, f"the environment does not have the path of output {output.name}, {output.path!r}"
                )
        return kind

    def _resolve(
        self, drv_path: str, drv: CanonicalDrv
    ) -> tuple[list[tuple[str, tuple[str, ...]]], tuple[str, ...], bool]:
        """Inputs by hash modulo, the store paths they and the sources are, and whether one has no known path."""
        entries: list[tuple[str, tuple[str, ...]]] = []
        paths = list(drv.input_srcs)
        deferred = False
        known_of = self.known
        for input_path, names in drv.input_drvs:
            known = known_of(input_path)
            if known is None:
                raise UnknownInputError(drv_path, f"its input {input_path} is not known")
            if not names:
                raise NotCanonicalError(drv_path, f"it names no output of its input {input_path}")
            outputs = known.outputs
            for name in names:
                path = outputs.get(name)
                if path is None:
                    raise UnknownOutputError(drv_path, f"its input {input_path} has no output {name!r}")
                if path:
                    paths.append(path)
            deferred = deferred or known.deferred
            entries.append((known.hash_modulo, names))
        # A source may be what an input builds, where an evaluation named it by its path.
        return entries, tuple(sorted(set(paths))), deferred


def _read(data: bytes) -> tuple[CanonicalDrv, bool]:
    """Return the derivation in `data`, and whether Nix would have written these bytes. Raises `FormatError`."""
    drv = read_canonical(data)
    if drv is not None:
        return drv, True
    scan = aterm.scan(data)
    return of_scan(scan), scan.in_order()


def _inputs_text(entries: list[tuple[str, tuple[str, ...]]]) -> bytes:
    """The input derivations with hashes for paths; those of equal hash are one, with the names of all."""
    merged = dict(entries)
    if len(merged) != len(entries):
        return aterm.render_inputs(entries)
    # Hashes and checked output names need no escapes.
    return ",".join(['("' + digest + '",["' + '","'.join(merged[digest]) + '"])' for digest in sorted(merged)]).encode()


class _Hasher:
    """The hashes of one derivation and the output paths they give."""

    __slots__ = ("data", "drv", "drv_path", "name", "store_dir")

    def __init__(self, store_dir: StoreDir, drv_path: str, name: str, drv: CanonicalDrv, data: bytes) -> None:
        self.store_dir = store_dir
        self.drv_path = drv_path
        self.name = name
        self.drv = drv
        self.data = data

    def known(
        self, kind: DerivationKind, entries: list[tuple[str, tuple[str, ...]]], *, deferred: bool
    ) -> tuple[KnownDerivation, str]:
        """Return the digest of this derivation that others need, and its masked hash."""
        outputs = self.drv.outputs
        paths = {output.name: output.path for output in outputs}
        if kind is DerivationKind.FIXED:
            self._check_fixed()
            return KnownDerivation(kind, modulo.fixed_output_hash(outputs[0]), paths, deferred=False), ""
        if kind is DerivationKind.IMPURE:
            return KnownDerivation(kind, modulo.IMPURE_HASH, paths, deferred=True), ""
        text = _inputs_text(entries)
        unmasked = modulo.unmasked_hash(self.data, self.drv, text)
        masked = modulo.masked_hash(self.data, self.drv, text, list(paths))
        if kind is DerivationKind.FLOATING:
            return KnownDerivation(kind, unmasked, paths, deferred=True), masked
        if deferred is (kind is DerivationKind.INPUT_ADDRESSED):
            state = "those of an input are unknown" if deferred else "those of all inputs are known"
            raise OutputPathError(self.drv_path, f"its output paths are {kind.value}, but {state}")
        if kind is DerivationKind.INPUT_ADDRESSED:
            for output in outputs:
                expected = self.store_dir.make_output_path(masked, output.name, self.name)
                self._check_path(output.name, output.path, expected)
        return KnownDerivation(kind, unmasked, paths, deferred=deferred), masked

    def _check_path(self, output_name: str, claimed: str, expected: str) -> None:
        if claimed != expected:
            raise OutputPathError(self.drv_path, f"output {output_name} is {expected}, not {claimed!r}")

    def _check_fixed(self) -> None:
        output = self.drv.outputs[0]
        method, algo = ("r:", output.hash_algo[2:]) if output.hash_algo.startswith("r:") else ("", output.hash_algo)
        size = DIGEST_SIZES.get(algo)
        if size is None:
            raise UnsupportedDerivationError(self.drv_path, f"fixed by unknown method {output.hash_algo!r}")
        if len(output.hash) != size * 2 or not _BASE16.match(output.hash):
            raise UnsupportedDerivationError(self.drv_path, f"its fixed hash is no base16 {algo} hash")
        expected = self.store_dir.make_fixed_output_path(self.name, method, algo, output.hash)
        self._check_path("out", output.path, expected)
