"""Findings of earlier evaluations, by the digest of all that went into them.

Rules:

1. One file an entry, in a directory that only its user can enter. An entry begins with the digest of the rest: one
   that is cut, or otherwise not as it was written, is absent.
2. Entries are written beside their place and renamed, so that any number of programs use the directory at once.
3. Errors are not kept: an entry names the places that failed, and these are evaluated anew.
4. Entries that were not used for `MAX_AGE_S` go, and the longest unused while all have more than `MAX_BYTES`.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Final, TypeAlias

import orjson

from coordinator.api.root_limits import RootLimits
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, LeftOut
from infra.decoding import decoder
from infra.records import record

MAX_BYTES: Final = 256 * 1024 * 1024
#: Of one entry, as it is in memory: a hundred thousand attributes have some 20 MB.
MAX_ENTRY_BYTES: Final = 256 * 1024 * 1024
MAX_AGE_S: Final = 30 * 24 * 3600.0
_DIGEST_BYTES: Final = 32
#: Part of every key: entries of another form are not found.
FORM: Final = "2"


@record(frozen=True, slots=True)
class KeptFindings:
    """All findings of one source."""

    found: tuple[tuple[AttrPlace, EvaluatedRoot | LeftOut], ...]
    #: Places whose evaluation failed.
    failed: tuple[AttrPlace, ...] = ()


#: Fields of records, in their order.
_PlaceRow: TypeAlias = tuple[int, int, tuple[str, ...], bool]
_RootRow: TypeAlias = tuple[str, str, tuple[str, ...], RootLimits | None, tuple[str, ...]]
_LeftRow: TypeAlias = tuple[str, bool]


@record(frozen=True, slots=True)
class _KeptRows:
    """`KeptFindings` as they lie in a file: a place is a row of its fields, and so is what was found there."""

    roots: tuple[tuple[_PlaceRow, _RootRow], ...]
    left: tuple[tuple[_PlaceRow, _LeftRow], ...]
    failed: tuple[_PlaceRow, ...]


def _packed(findings: KeptFindings) -> bytes:
    roots = [(_row(place), _row(found)) for place, found in findings.found if isinstance(found, EvaluatedRoot)]
    left = [(_row(place), _row(found)) for place, found in findings.found if isinstance(found, LeftOut)]
    entry = {"roots": roots, "left": left, "failed": [_row(place) for place in findings.failed]}
    return zlib.compress(orjson.dumps(entry), 1)


def _row(record: AttrPlace | EvaluatedRoot | LeftOut) -> list[object]:
    return [getattr(record, field.name) for field in fields(record)]


def _unpacked(packed: bytes) -> KeptFindings:
    """Read an entry. Raises `ValueError`, `TypeError`, `KeyError` or `zlib.error` where it is none."""
    data = zlib.decompressobj().decompress(packed, MAX_ENTRY_BYTES)
    entry: _KeptRows = decoder(_KeptRows)(orjson.loads(data))
    roots = [(AttrPlace(*place), EvaluatedRoot(*found)) for place, found in entry.roots]
    left = [(AttrPlace(*place), LeftOut(*found)) for place, found in entry.left]
    return KeptFindings((*roots, *left), tuple(AttrPlace(*place) for place in entry.failed))


class EvaluationCache:
    """A directory of entries. Whatever is wrong with it, it only keeps nothing."""

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES) -> None:
        self._directory = directory
        self._max_bytes = max_bytes

    @classmethod
    def of_user(cls, env: Mapping[str, str]) -> EvaluationCache:
        """Return the cache of this user."""
        base = env.get("XDG_CACHE_HOME") or f"{env.get('HOME') or '~'}/.cache"
        return cls(Path(base).expanduser() / "drover" / "evaluations")

    def get(self, key: str) -> KeptFindings | None:
        """Return what is kept under a key; None where nothing is, or it is damaged."""
        path = self._directory / key
        try:
            if not self._is_private():
                return None
            data = path.read_bytes()
            digest, packed = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
            if hashlib.sha256(packed).digest() != digest:
                raise ValueError(key)  # noqa: TRY301 - as every other damage
            entry = _unpacked(packed)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, zlib.error):
            with suppress(OSError):
                path.unlink()
            return None
        return entry

    def put(self, key: str, findings: KeptFindings) -> None:
        """Keep findings, and remove what is old or too much."""
        packed = _packed(findings)
        with suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_private():
                return
            beside = self._directory / f"{key}.{os.urandom(8).hex()}.new"
            try:
                beside.write_bytes(hashlib.sha256(packed).digest() + packed)
                beside.replace(self._directory / key)
            finally:
                beside.unlink(missing_ok=True)
            self._prune(time.time())

    def _is_private(self) -> bool:
        found = self._directory.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077

    def _prune(self, now: float) -> None:
        entries: list[tuple[float, int, Path]] = []
        for path in self._directory.iterdir():
            with suppress(OSError):
                found = path.lstat()
                entries.append((found.st_mtime, found.st_size, path))
        kept_bytes = 0
        for used, size, path in sorted(entries, reverse=True):
            kept_bytes += size
            if kept_bytes > self._max_bytes or now - used > MAX_AGE_S:
                with suppress(OSError):
                    path.unlink()
