"""Details of each step that people want to read, stored compactly: a farm knows hundreds of thousands of steps.

Paths in a store repeat the same parts: an output is `STORE/HASH-NAME` or `STORE/HASH-NAME-OUTPUT`, a
.drv `STORE/HASH-NAME.drv`, and a step's key is one of its outputs. So what is kept of a step is its class (system,
features, store, names of outputs; a farm has a few hundred) and the hashes, as bytes. Whatever does not look so, or
would not come back exactly, is kept as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from coordinator.stores.derivations import StepInfo
from scheduler.model import StepKey

#: Characters of a hash in a store path.
_HASH = 32
#: Bytes that number a class, and so the most classes; steps of others are kept as they are.
_CLASS = 2
_CLASSES = 256**_CLASS
#: What stands between store, hash, name and suffix of a path.
_SEPARATORS = re.compile("[-/.]")


class Details:
    """Step key -> `StepInfo`; what is known first stays."""

    __slots__ = ("_class_of", "_classes", "_kept")

    def __init__(self) -> None:
        self._kept: dict[StepKey, bytes | StepInfo] = {}
        #: (store, system, features, names of outputs).
        self._classes: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = []
        self._class_of: dict[tuple[str, str, tuple[str, ...], tuple[str, ...]], bytes] = {}

    def __contains__(self, key: StepKey) -> bool:
        return key in self._kept

    def learn(self, key: StepKey, info: StepInfo) -> None:
        """Keep the details of the step `key`, unless some are kept already."""
        if key not in self._kept:
            self._kept[key] = self._packed(info) or info

    def get(self, key: StepKey) -> StepInfo | None:
        """Return what is known of a step."""
        kept = self._kept.get(key)
        return self._unpacked(key, kept) if isinstance(kept, bytes) else kept

    def name(self, key: StepKey) -> str:
        """Return the name of a step, "" where it is not known; much cheaper than `get`."""
        kept = self._kept.get(key)
        if not isinstance(kept, bytes):
            return "" if kept is None else kept.name
        names = self._classes[int.from_bytes(kept[:_CLASS], "big")][3]
        if names == ("out",):
            return key[_HASH + 1 :]
        return _name_of(key, names, _hashes_of(key, names, kept[_CLASS:].decode()))

    def forget(self, key: StepKey) -> None:
        """Know nothing of a step any more."""
        self._kept.pop(key, None)

    def find(self, text: str) -> Iterator[StepKey]:
        """Yield the steps whose .drv or one of whose outputs (full store paths) contains `text`."""
        # Making every path anew takes a second of a large farm: first look whether a piece that must be there is.
        piece = max(_SEPARATORS.split(text), key=len)
        hashed = piece.encode("utf-8", "replace")
        anywhere = any(piece in f"{store}.drv" for store, *_ in self._classes)
        for key, kept in self._kept.items():
            if anywhere or not isinstance(kept, bytes) or piece in key or hashed in kept:
                info = self.get(key)
                if info is not None and (text in info.drv or any(text in path for _, path in info.outputs)):
                    yield key

    def _packed(self, info: StepInfo) -> bytes | None:
        """Return the bytes that `_unpacked` makes `info` of, None where there are none."""
        store = info.drv[: -(len(info.name) + len(".drv") + _HASH + 2)]
        names = tuple([name for name, _ in info.outputs])
        start = len(store) + 1
        hashes = "".join([path[start : start + _HASH] for path in (info.drv, *(path for _, path in info.outputs))])
        if not names or len(hashes) != _HASH * (1 + len(names)):
            return None
        kind = (store, info.system, info.features, names)
        number = self._class_of.get(kind)
        if number is None:
            if len(self._classes) == _CLASSES:
                return None
            number = self._class_of[kind] = len(self._classes).to_bytes(_CLASS, "big")
            self._classes.append(kind)
        # A hash that is the key's need not be kept twice.
        packed = number + (hashes if len(names) > 1 else hashes[:_HASH]).encode()
        return packed if self._unpacked(info.key, packed) == info else None

    def _unpacked(self, key: StepKey, packed: bytes) -> StepInfo:
        store, system, features, names = self._classes[int.from_bytes(packed[:_CLASS], "big")]
        packed_hashes = packed[_CLASS:].decode()
        hashes = _hashes_of(key, names, packed_hashes)
        name = _name_of(key, names, hashes)
        stem = f"-{name}"
        outputs = tuple(
            [
                (output, f"{store}/{digest}{stem}" if output == "out" else f"{store}/{digest}{stem}-{output}")
                for output, digest in zip(names, hashes, strict=True)
            ]
        )
        return StepInfo(key, name, system, features, f"{store}/{packed_hashes[:_HASH]}{stem}.drv", outputs)


def _hashes_of(key: StepKey, names: tuple[str, ...], packed: str) -> list[str]:
    """Return the hashes of the outputs, in the order of their names."""
    return [packed[at : at + _HASH] for at in range(_HASH, len(packed), _HASH)] if len(names) > 1 else [key[:_HASH]]


def _name_of(key: StepKey, names: tuple[str, ...], hashes: list[str]) -> str:
    """Return the step's name: the key's, without that of the output which the key is."""
    for output, digest in zip(names, hashes, strict=True):
        if digest == key[:_HASH] and output != "out":
            return key[_HASH + 1 :].removesuffix(f"-{output}")
    return key[_HASH + 1 :]
