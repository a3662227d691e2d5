"""Derivations as records: what planning and verification see of them, and what is written.

Child processes that verify (`coordinator.intake.verifier_child`) make them, so nothing of a database is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import orjson
import zstandard

from scheduler.model import StepKey
from scheduler.values import quick

#: Below this many bytes compression does not pay.
_COMPRESS_FROM: Final = 512
_LEVEL: Final = 1
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
#: Bytes at the beginning of a zstd frame that have its inflated size.
ZSTD_HEADER_BYTES: Final = 18


class Kind(IntEnum):
    """Ways in which the output paths of a derivation are known."""

    INPUT_ADDRESSED = 0
    FIXED = 1


#: By value: a table is looked up in a fifth of the time that the call takes.
_KINDS: Final = {int(kind): kind for kind in Kind}


@quick
@dataclass(frozen=True, slots=True)
class Node:
    """Derivation as planning sees it; .drv names are base names, output paths are full."""

    drv: str
    step: StepKey
    kind: Kind
    system: str
    #: Sorted, without repeats.
    features: tuple[str, ...]
    #: Name and path, sorted by name.
    outputs: tuple[tuple[str, str], ...]
    #: Base names of input derivations, sorted.
    needs: tuple[str, ...]
    #: Full paths of input sources, sorted.
    sources: tuple[str, ...] = ()


@quick
@dataclass(frozen=True, slots=True)
class NewDerivation:
    """A verified derivation on its way into the store."""

    node: Node
    #: The 32 bytes that stand for it where it is an input.
    modulo: bytes
    #: Full paths of sources and of the chosen outputs of input derivations, sorted.
    inputs: tuple[str, ...]
    aterm: bytes
    #: Content that a fixed output is to hold, as `FixedContent.of_output` takes it; "" of others.
    content: str = ""


@quick
@dataclass(frozen=True, slots=True)
class Known:
    """Input of a derivation as verification sees it."""

    #: The 32 bytes that stand for it where it is an input.
    modulo: bytes
    kind: Kind
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored derivation before it is read."""

    #: The 32 bytes that stand for it where it is an input.
    modulo: bytes
    #: Bytes of the .drv file.
    size: int


@quick
@dataclass(frozen=True, slots=True)
class PackedDerivation:
    """A verified derivation as it is written."""

    node: Node
    #: The 32 bytes that stand for it where it is an input.
    modulo: bytes
    #: JSON of `Node` and of `NewDerivation.inputs`.
    detail: bytes
    inputs: bytes
    #: The .drv's bytes, compressed where that pays.
    aterm: bytes
    #: As in `NewDerivation`; not written, because the .drv says it.
    content: str = ""

    @property
    def row(self) -> tuple[object, ...]:
        """Values in the order of the columns."""
        node = self.node
        return node.drv, node.step, int(node.kind), self.detail, self.inputs, self.modulo, self.aterm


def packed(batch: Iterable[NewDerivation]) -> list[PackedDerivation]:
    """Return verified derivations as they are written. For a thread: compressing takes as long as they are large."""
    compressor = AtermCompressor()
    return [pack(new, compressor) for new in batch]


class AtermCompressor:
    """Compresses the bytes of .drv files, one after the other."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)

    def compress(self, aterm: bytes) -> bytes:
        """Return the bytes as they are written: as they are where compression does not pay."""
        if len(aterm) < _COMPRESS_FROM:
            return aterm
        compressed = self._compressor.compress(aterm)
        return compressed if len(compressed) < len(aterm) else aterm


def pack(new: NewDerivation, compressor: AtermCompressor) -> PackedDerivation:
    """Return a verified derivation as it is written."""
    node = new.node
    detail = orjson.dumps((node.system, node.features, node.outputs, node.needs, node.sources))
    aterm = compressor.compress(new.aterm)
    return PackedDerivation(node, new.modulo, detail, orjson.dumps(new.inputs), aterm, new.content)


def node_of(drv: str, step: str, kind: int, detail: bytes) -> Node:
    """Return the node that is written so."""
    system, features, outputs, needs, sources = orjson.loads(detail)
    return Node(drv, StepKey(step), _KINDS[kind], system, tuple(features), pairs(outputs), tuple(needs), tuple(sources))


def pairs(outputs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return outputs as JSON has them as those of a `Node`."""
    return tuple([(name, path) for name, path in outputs])


def unpacked(aterm: bytes) -> bytes:
    """Return the .drv's bytes of those that are written."""
    return zstandard.decompress(aterm) if aterm.startswith(_ZSTD_MAGIC) else aterm


def inflated_size(header: bytes, stored: int) -> int:
    """Return the bytes that `unpacked` makes of `stored` bytes which begin with `header`."""
    return int(zstandard.frame_content_size(header)) if header.startswith(_ZSTD_MAGIC) else stored
