"""Strict decoders of dataclasses, built from their annotations: JSON values in, one dataclass out.

Each type is compiled once, at import, to a function that checks and converts; whatever does not fit is a `CodecError`.
A missing field takes its default, because records of before the field was added stay readable.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Callable
from operator import itemgetter
from typing import Any, cast

import orjson

from coordinator.journal.errors import CodecError
from scheduler.model import Requirements, StepKey

#: Records with fewer plain fields are decoded field by field.
_QUICK_FIELDS = 3
#: Different requirements that are remembered to be shared.
_SHARED_VALUES = 10_000

Decoder = Callable[[Any], Any]


def plain(value: object) -> object:
    """Turn what JSON lacks into what it has."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(type(value).__name__)


def need(value: Any, kind: type) -> Any:
    """Return `value`, which must be exactly of this type. Raises `CodecError`."""
    # bool is an int to Python, not to a journal.
    if type(value) is not kind:
        raise CodecError(f"the journal has {type(value).__name__} where {kind.__name__} belongs.")
    return value


def _float(value: Any) -> float:
    if type(value) is int:
        return float(value)
    return cast("float", need(value, float))


def _bytes(value: Any) -> bytes:
    try:
        return base64.b64decode(need(value, str), validate=True)
    except (binascii.Error, ValueError):
        raise CodecError("the journal has text that is not base64 where bytes belong.") from None


def _str(value: Any) -> str:
    if type(value) is not str:
        raise CodecError(f"the journal has {type(value).__name__} where text belongs.")
    return value


def _int(value: Any) -> int:
    if type(value) is not int:
        raise CodecError(f"the journal has {type(value).__name__} where a whole number belongs.")
    return value


def _bool(value: Any) -> bool:
    return cast("bool", need(value, bool))


_LEAVES: dict[Any, Decoder] = {str: _str, int: _int, float: _float, bytes: _bytes, bool: _bool}


def _key(value: Any) -> str:
    # A step's key stands in its spec, in the needs of others and in every later fact: one string serves them all.
    try:
        return sys.intern(value)
    except TypeError:
        return _str(value)


def _keys(value: Any) -> tuple[str, ...]:
    try:
        return tuple(map(sys.intern, need(value, list)))
    except TypeError:
        return tuple(map(_str, value))


def _decoder(kind: Any) -> Decoder:  # noqa: PLR0911  one way for each form of type
    """Build the decoder of a type from its annotations; done once, at import."""
    if kind is StepKey:
        return _key
    if kind == tuple[StepKey, ...]:
        return _keys
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    if kind in _LEAVES:
        return _LEAVES[kind]
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        [some] = [choice for choice in typing.get_args(kind) if choice is not types.NoneType]
        return _optional(_decoder(some))
    if origin in (tuple, frozenset):
        arguments = typing.get_args(kind)
        if origin is tuple and arguments[1] is not Ellipsis:
            return _pair(_decoder(arguments[0]), _decoder(arguments[1]))
        return _many(origin, _decoder(arguments[0]))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _choice(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return record_decoder(kind)
    raise TypeError(f"facts may not hold {kind!r}")


def _optional(some: Decoder) -> Decoder:
    return lambda value: None if value is None else some(value)


def _pair(first: Decoder, second: Decoder) -> Decoder:
    def decode(value: Any) -> Any:
        pair = need(value, list)
        if len(pair) != 2:
            raise CodecError("the journal has something else where a pair belongs.")
        return (first(pair[0]), second(pair[1]))

    return decode


def _many(container: type, item: Decoder) -> Decoder:
    def decode(value: Any) -> Any:
        return container(map(item, need(value, list)))

    return decode


def _choice(kind: type[enum.Enum]) -> Decoder:
    values = {member.value: member for member in kind}

    def decode(value: Any) -> enum.Enum:
        if not isinstance(value, str) or value not in values:
            raise CodecError(f"the journal has an unknown {kind.__name__}.")
        return values[value]

    return decode


def record_decoder(kind: type) -> Decoder:
    """Build the decoder of a dataclass."""
    hints = typing.get_type_hints(kind)
    names = tuple(field.name for field in dataclasses.fields(kind))
    items = tuple(_decoder(hints[name]) for name in names)
    # Most fields hold what they must: one comparison of all their types is worth a call for each.
    exact = {_str: str, _int: int, _float: float, _bool: bool}
    leaves = tuple(name for name, item in zip(names, items, strict=True) if item in exact)
    types_of_leaves = tuple(exact[item] for item in items if item in exact)
    quick_items = tuple(None if item in exact else item for item in items)
    if len(names) < _QUICK_FIELDS or len(leaves) < _QUICK_FIELDS:
        return _small_record(kind, names, items)
    pick, pick_leaves = itemgetter(*names), itemgetter(*leaves)

    def decode(value: Any) -> Any:
        if type(value) is not dict or len(value) != len(names):
            value = _completed(kind, value)
        try:
            raw = pick(value)
        except KeyError:
            raise _mismatch(kind) from None
        if tuple(map(type, pick_leaves(value))) != types_of_leaves:
            return kind(*[item(each) for item, each in zip(items, raw, strict=True)])
        return kind(*[each if item is None else item(each) for item, each in zip(quick_items, raw, strict=True)])

    return decode


def _small_record(kind: type, names: tuple[str, ...], items: tuple[Decoder, ...]) -> Decoder:
    fields = tuple(zip(names, items, strict=True))
    known = frozenset(names)

    def decode(value: Any) -> Any:
        if type(value) is not dict or value.keys() != known:
            value = _completed(kind, value)
        return kind(*[item(value[name]) for name, item in fields])

    return _shared(decode) if kind is Requirements else decode


def _completed(kind: type, value: Any) -> dict[str, Any]:
    """Give a record of before a field was added what the field is by default. Raises `CodecError`."""
    fields = dataclasses.fields(kind)
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    made = orjson.loads(orjson.dumps(defaults, default=plain)) | (value if type(value) is dict else {})
    if made.keys() != {field.name for field in fields}:
        raise _mismatch(kind)
    return cast("dict[str, Any]", made)


def _mismatch(kind: type) -> CodecError:
    return CodecError(f"the journal has a {kind.__name__} with missing or unknown fields.")


def _shared(decode: Decoder) -> Decoder:
    """Give one value for equal ones: a farm knows a handful of requirements and a hundred thousand steps."""
    known: dict[Any, Any] = {}

    def decode_shared(value: Any) -> Any:
        try:
            fields = (value["system"], *need(value["features"], list)) if len(value) == 2 else ()
            made = known.get(fields)
        except (TypeError, KeyError):
            return decode(value)
        if made is None:
            made = decode(value)
            if len(known) < _SHARED_VALUES:
                known[fields] = made
        return made

    return decode_shared
