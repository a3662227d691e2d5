"""Difference of two derivations: the fields of their own that differ, and the inputs that do.

Inputs are matched by the name of their package, so that `stdenv` is compared with `stdenv`. A store path that stands
in a text differs as soon as what it names differs; such a difference follows from an input, a source or the output
itself, and is no change of the text (`path_changes`). What is left are the derivation's own changes.

Rules:
1. Order and repeats that Nix does not keep are no differences. Two derivations that Nix writes alike have none.
2. The difference in the other direction is the same with its sides exchanged.
3. Texts are shortened around the place where they differ and hold printable characters alone, whatever a derivation
   holds. There are at most MAX_CHANGES of them and MAX_INPUTS inputs; the counts say how many there are.
4. No step holds the interpreter for long, also with tens of megabytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest
from typing import Final

from infra.nix.base32 import DIGIT_PATTERN
from infra.nix.derivation import STRUCTURED_ATTRS_KEY, Derivation, DerivationOutput
from infra.nix.store_path import (
    HASH_PART_LENGTH,
    HASH_PART_PATTERN,
    MAX_NAME_LENGTH,
    base_name_of,
    drv_name_of,
    output_path_name,
    package_of,
)

#: Changes, and inputs that differ, which are named.
MAX_CHANGES: Final = 32
MAX_INPUTS: Final = 4_000
#: Bytes of a value that are shown, and of them those before the place where it differs.
SHOWN_BYTES: Final = 160
CONTEXT_BYTES: Final = 40
#: Bytes of the name of a variable that are shown.
NAME_BYTES: Final = 80
#: Structured attributes up to so many bytes are compared one by one, larger ones as one text.
JSON_BYTES: Final = 256 * 1024
#: Bytes that are compared, and searched for store paths, at once.
_PIECE: Final = 1024 * 1024
_MASKED_AT_ONCE: Final = 128 * 1024
_CUT: Final = "\u2026"
_HASH: Final = re.compile(rf"(?<!{DIGIT_PATTERN}){HASH_PART_PATTERN}(?=-)".encode())
_ZEROS: Final = bytes(HASH_PART_LENGTH)
_MARK: Final = _ZEROS + b"-"
_PATH_NAME: Final = re.compile(rb"[0-9A-Za-z+\-._?=]{1,211}")
#: Variables that repeat what other fields say.
_FIXED_KEYS: Final = (b"outputHash", b"outputHashAlgo", b"outputHashMode")
_FEATURES_KEY: Final = b"requiredSystemFeatures"


class Field(StrEnum):
    """Parts of a derivation."""

    SYSTEM = "system"
    BUILDER = "builder"
    ARGUMENT = "argument"
    ENVIRONMENT = "environment"
    FEATURE = "feature"
    OUTPUT = "output"
    SOURCE = "source"
    INPUT = "input"


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs; None on the side that lacks it."""

    field: Field
    #: Variable, feature, output, name of the source or input, place of the argument; "" where a field is one thing.
    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class ChangedInput:
    """An input derivation and the one that stands in its place, by full path."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two derivations; empty where Nix would write both alike."""

    #: Own changes: the first MAX_CHANGES of `change_count`.
    changes: tuple[Change, ...] = ()
    change_count: int = 0
    #: Texts that differ in store paths alone: the first MAX_CHANGES of `path_change_count`.
    path_changes: tuple[Change, ...] = ()
    path_change_count: int = 0
    #: The first MAX_INPUTS of `input_count`.
    inputs: tuple[ChangedInput, ...] = ()
    input_count: int = 0

    def __bool__(self) -> bool:
        """Return whether anything differs."""
        return bool(self.change_count or self.path_change_count or self.input_count)


def compare(before: Derivation, after: Derivation) -> Difference:
    """The difference between two derivations."""
    found = _Collected()
    _compare_inputs(before, after, found)
    _compare_sources(before, after, found)
    _compare_outputs(before, after, found)
    _compare_texts(before, after, found)
    changes = sorted(found.changes, key=_place)
    paths = sorted(found.path_changes, key=_place)
    inputs = sorted(found.inputs, key=_place_of_input)
    return Difference(
        tuple(changes[:MAX_CHANGES]),
        len(changes),
        tuple(paths[:MAX_CHANGES]),
        len(paths),
        tuple(inputs[:MAX_INPUTS]),
        len(inputs),
    )


def printable(data: bytes) -> str:
    """The text of any bytes, with what is no printable character written as an escape."""
    text = data.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join([char if char.isprintable() else char.encode("unicode_escape").decode() for char in text])


class _Collected:
    """Collector of changes, and of the names of store paths that stand for each other on the two sides."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.path_changes: list[Change] = []
        self.inputs: list[ChangedInput] = []
        self.renamed: set[tuple[bytes, bytes]] = set()

    def rename(self, before: str, after: str) -> None:
        """Let a path of one name stand for one of another."""
        if before != after:
            self.renamed.add((before.encode(), after.encode()))

    def add_text(self, field: Field, name: str, before: bytes | None, after: bytes | None) -> None:
        """Compare a text, which one side may lack."""
        if before == after:
            return
        if before is None or after is None:
            shown = tuple(None if each is None else _excerpt(each, 0, len(each)) for each in (before, after))
            self.changes.append(Change(field, name, *shown))
            return
        places = _first_own_difference(before, after, self.renamed)
        change = Change(field, name, *_excerpts(before, after, places or _first_difference(before, after)))
        (self.path_changes if places is None else self.changes).append(change)


_FIELDS: Final = tuple(Field)


def _place_of_input(pair: ChangedInput) -> tuple[str, list[str]]:
    return package_of(drv_name_of(pair.before)), sorted((pair.before, pair.after))


def _place(change: Change) -> tuple[int, str, list[str]]:
    """Return the place of a change, the same for both directions."""
    values = sorted(value for value in (change.before, change.after) if value is not None)
    return _FIELDS.index(change.field), change.name, values


# Inputs, sources, outputs.


def _compare_inputs(before: Derivation, after: Derivation, found: _Collected) -> None:
    old, new = _merged(before.input_drvs), _merged(after.input_drvs)
    for path in old.keys() & new.keys():
        if old[path] != new[path]:
            _add_output_names(path, old[path], new[path], found)
    for left, right in _matched(old.keys() - new.keys(), new.keys() - old.keys()):
        if left is None or right is None:
            path = left or right or ""
            found.changes.append(Change(Field.INPUT, drv_name_of(path), left, right))
            continue
        found.inputs.append(ChangedInput(left, right))
        found.rename(f"{drv_name_of(left)}.drv", f"{drv_name_of(right)}.drv")
        for output in old[left] | new[right]:
            found.rename(output_path_name(drv_name_of(left), output), output_path_name(drv_name_of(right), output))
        if old[left] != new[right]:
            _add_output_names(right, old[left], new[right], found)


def _add_output_names(path: str, before: set[str], after: set[str], found: _Collected) -> None:
    shown = [" ".join(sorted(names)) for names in (before, after)]
    found.changes.append(Change(Field.INPUT, package_of(drv_name_of(path)), *shown))


def _merged(inputs: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, set[str]]:
    merged: dict[str, set[str]] = {}
    for path, names in inputs:
        merged.setdefault(path, set()).update(names)
    return merged


def _matched(before: Iterable[str], after: Iterable[str]) -> list[tuple[str | None, str | None]]:
    """Match paths of derivations: those of the same name first, then those of the same package, in order."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for side, paths in enumerate((before, after)):
        for path in sorted(paths):
            groups.setdefault(package_of(drv_name_of(path)), ([], []))[side].append(path)
    matched: list[tuple[str | None, str | None]] = []
    for old, new in groups.values():
        left, right = _match_names(old, new, matched)
        matched += zip_longest(left, right)
    return matched


def _match_names(
    old: Sequence[str], new: Sequence[str], matched: list[tuple[str | None, str | None]]
) -> tuple[list[str], list[str]]:
    """Match those of the same name, in order; return the others, by name."""
    by_name: dict[str, tuple[list[str], list[str]]] = {}
    for side, paths in enumerate((old, new)):
        for path in paths:
            by_name.setdefault(_name_of(path), ([], []))[side].append(path)
    left: list[str] = []
    right: list[str] = []
    for name in sorted(by_name):
        both = by_name[name]
        count = min(map(len, both))
        matched += zip(both[0][:count], both[1][:count], strict=True)
        left += both[0][count:]
        right += both[1][count:]
    return left, right


def _compare_sources(before: Derivation, after: Derivation, found: _Collected) -> None:
    old, new = set(before.input_srcs), set(after.input_srcs)
    for left, right in _matched(old - new, new - old):
        name = _name_of(left or right or "")
        if left is not None and right is not None:
            name = package_of(name)
            found.rename(_name_of(left), _name_of(right))
        found.changes.append(Change(Field.SOURCE, name, left, right))


def _compare_outputs(before: Derivation, after: Derivation, found: _Collected) -> None:
    old, new = ({output.name: output for output in drv.outputs} for drv in (before, after))
    for name in old.keys() | new.keys():
        left, right = old.get(name), new.get(name)
        if left is None or right is None or (left.hash_algo, left.hash) != (right.hash_algo, right.hash):
            found.changes.append(Change(Field.OUTPUT, name, _shown_output(left), _shown_output(right)))
        elif left.path != right.path:
            found.path_changes.append(Change(Field.OUTPUT, name, left.path, right.path))
        if left is not None and right is not None:
            found.rename(_name_of(left.path), _name_of(right.path))


def _name_of(path: str) -> str:
    return base_name_of(path)[HASH_PART_LENGTH + 1 :]


def _shown_output(output: DerivationOutput | None) -> str | None:
    if output is None:
        return None
    return f"{output.hash_algo}:{output.hash}" if output.hash_algo or output.hash else output.path


# Texts.


def _compare_texts(before: Derivation, after: Derivation, found: _Collected) -> None:
    found.add_text(Field.SYSTEM, "", before.system.encode(), after.system.encode())
    found.add_text(Field.BUILDER, "", before.builder.encode(), after.builder.encode())
    _compare_arguments(before.args, after.args, found)
    small = all(len(dict(drv.env).get(STRUCTURED_ATTRS_KEY, b"")) <= JSON_BYTES for drv in (before, after))
    old, new = (_environment(drv) if small else dict(drv.env) for drv in (before, after))
    explained = _explained(before, after, old, new, found)
    differs = False
    for key in old.keys() | new.keys():
        if old.get(key) != new.get(key):
            differs = True
            if key not in explained:
                found.add_text(Field.ENVIRONMENT, _name(key), old.get(key), new.get(key))
    raw = [dict(drv.env).get(STRUCTURED_ATTRS_KEY) for drv in (before, after)]
    if not differs and raw[0] != raw[1]:
        # Attributes that are alike and written differently.
        found.add_text(Field.ENVIRONMENT, STRUCTURED_ATTRS_KEY.decode(), *raw)


def _compare_arguments(before: Sequence[bytes], after: Sequence[bytes], found: _Collected) -> None:
    """Compare those that are left without a common beginning and a common end."""
    shorter = min(len(before), len(after))
    start = next((at for at in range(shorter) if before[at] != after[at]), shorter)
    room = shorter - start
    end = next((at for at in range(room) if before[-1 - at] != after[-1 - at]), room)
    left, right = before[start : len(before) - end], after[start : len(after) - end]
    for number, (old, new) in enumerate(zip_longest(left, right), start):
        found.add_text(Field.ARGUMENT, f"{number:d}", old, new)


def _environment(drv: Derivation) -> dict[bytes, bytes]:
    """Return the variables, with structured attributes as if they were some."""
    env = dict(drv.env)
    text = env.get(STRUCTURED_ATTRS_KEY)
    if text is None:
        return env
    try:
        attributes = json.loads(text)
        if not isinstance(attributes, dict):
            return env
        values = {key.encode(): _json_text(value) for key, value in attributes.items()}
    except (ValueError, RecursionError):
        # Also text that no UTF-8 has, as a lone surrogate.
        return env
    del env[STRUCTURED_ATTRS_KEY]
    return {**env, **values}


def _json_text(value: object) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text.encode()


def _explained(
    before: Derivation, after: Derivation, old: Mapping[bytes, bytes], new: Mapping[bytes, bytes], found: _Collected
) -> set[bytes]:
    """Return the variables whose change another field says; features are said here."""
    explained = set()
    for key, left, right in ((b"builder", before.builder, after.builder), (b"system", before.system, after.system)):
        if (old.get(key), new.get(key)) == (left.encode(), right.encode()):
            explained.add(key)
    changed = {change.name for change in found.changes if change.field is Field.OUTPUT}
    if changed:
        explained.update(_FIXED_KEYS)
    if {output.name for output in before.outputs} != {output.name for output in after.outputs}:
        explained.add(b"outputs")
    lists = [set(_features(env.get(_FEATURES_KEY, b""))) for env in (old, new)]
    for feature in sorted(lists[0] ^ lists[1]):
        explained.add(_FEATURES_KEY)
        name = printable(feature[:NAME_BYTES])
        found.changes.append(
            Change(Field.FEATURE, name, *(name if feature in features else None for features in lists))
        )
    return explained


def _features(text: bytes) -> list[bytes]:
    if text.startswith(b"["):
        try:
            return [str(each).encode() for each in json.loads(text)]
        except (ValueError, RecursionError):
            return text.split()
    return text.split()


def _name(key: bytes) -> str:
    return printable(key[:NAME_BYTES]) + (_CUT if len(key) > NAME_BYTES else "")


def _first_own_difference(before: bytes, after: bytes, renamed: set[tuple[bytes, bytes]]) -> tuple[int, int] | None:
    """Return where two texts first differ in more than a store path, None where they nowhere do."""
    old, new = _masked(before), _masked(after)
    left = right = 0
    while True:
        same = _common_length(old, left, new, right)
        if left + same == len(old) and right + same == len(new):
            return None
        ends = _name_ends(old, left, new, right, same, renamed)
        if ends is None:
            return left + same, right + same
        left, right = ends


def _masked(text: bytes) -> bytes:
    """Return a text with zeros for the hash parts of store paths."""
    masked = bytearray(text)
    for start in range(0, len(text), _MASKED_AT_ONCE):
        upto = start + _MASKED_AT_ONCE
        for found in _HASH.finditer(text, start, upto + HASH_PART_LENGTH + 1):
            if found.start() < upto:
                masked[found.start() : found.end()] = _ZEROS
    return bytes(masked)


def _name_ends(  # noqa: PLR0917 - two texts with a place in each
    before: bytes, left: int, after: bytes, right: int, same: int, renamed: set[tuple[bytes, bytes]]
) -> tuple[int, int] | None:
    """Return where the names end that begin in what is alike of both and differ; None where that is no explained name.

    The masked texts are alike for `same` bytes from `left` and `right` on.
    """
    since = max(left, left + same - MAX_NAME_LENGTH - len(_MARK))
    mark = before.rfind(_MARK, since, left + same)
    if mark < 0:
        return None
    begin = mark + len(_MARK)
    names = _PATH_NAME.match(before, begin), _PATH_NAME.match(after, right + begin - left)
    if names[0] is None or names[1] is None or (names[0][0], names[1][0]) not in renamed:
        return None
    return names[0].end(), names[1].end()


def _common_length(before: bytes, left: int, after: bytes, right: int) -> int:
    """Return how many bytes are alike from the two places on."""
    room = min(len(before) - left, len(after) - right)
    same, size = 0, 64
    while same < room:
        end = min(same + size, room)
        if before[left + same : left + end] == after[right + same : right + end]:
            same, size = end, min(2 * size, _PIECE)
        elif end - same == 1:
            return same
        else:
            size = (end - same) // 2
    return same


def _first_difference(before: bytes, after: bytes) -> tuple[int, int]:
    same = _common_length(before, 0, after, 0)
    return same, same


def _excerpts(before: bytes, after: bytes, places: tuple[int, int]) -> tuple[str, str]:
    """Return both texts around the place where they differ."""
    if max(len(before), len(after)) <= SHOWN_BYTES:
        return printable(before), printable(after)
    ends = [text[max(at, len(text) - SHOWN_BYTES) :] for text, at in zip((before, after), places, strict=True)]
    shorter = min(map(len, ends))
    ending = next((count for count in range(shorter) if ends[0][-1 - count] != ends[1][-1 - count]), shorter)
    return (
        _excerpt(before, places[0] - CONTEXT_BYTES, len(before) - ending + CONTEXT_BYTES),
        _excerpt(after, places[1] - CONTEXT_BYTES, len(after) - ending + CONTEXT_BYTES),
    )


def _excerpt(text: bytes, start: int, end: int) -> str:
    """Return what stands between two places, at most SHOWN_BYTES of it, and marks where something is left out."""
    start = max(0, start)
    end = min(len(text), end, start + SHOWN_BYTES)
    # Not within a character of UTF-8, which has at most four bytes.
    for _ in range(3):
        if 0 < start < len(text) and text[start] & 0xC0 == 0x80:
            start -= 1
        if start < end < len(text) and text[end] & 0xC0 == 0x80:
            end -= 1
    return (_CUT if start else "") + printable(text[start:end]) + (_CUT if end < len(text) else "")
