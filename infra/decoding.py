"""Strict decoder of parsed JSON: it becomes a record that is told by its type, or an error.

It knows the types that the API's records and those of evaluations have: texts, numbers, enumerations and literals,
tuples, mappings, options, and records in each other. A field that is missing, unknown or of another type is an error. A
decoder is made for a type the first time that it is needed, so a command pays for what it reads, and none for pydantic,
which takes longer to import than most commands run.
"""

from __future__ import annotations

import builtins
import collections.abc
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from enum import EnumType
from functools import cache
from typing import Any, Final, get_args, get_origin, get_type_hints

Decoder = Callable[[Any], Any]


@cache
def decoder(kind: Any) -> Decoder:
    """Return what makes a value of type `kind` from parsed JSON, or raises `ValueError`, `TypeError` or `KeyError`."""
    origin, arguments = get_origin(kind), get_args(kind)
    match origin:
        case _ if kind in _SIMPLE:
            found = _SIMPLE[kind]
        case typing.Literal:
            found = _one_of(arguments)
        case types.UnionType:
            found = _option(arguments)
        case builtins.tuple:
            found = _sequence(arguments[0]) if arguments[1:] == (...,) else _row(arguments)
        case builtins.dict | collections.abc.Mapping:
            found = _mapping(arguments[1])
        case _ if isinstance(kind, EnumType):
            found = kind
        case _:
            found = _fields(kind)
    return found


def _exactly(kind: type) -> Decoder:
    def decoded(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(value)
        return value

    return decoded


def _number(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise TypeError(value)
    return float(value)


def _anything(value: Any) -> Any:
    return value


_SIMPLE: Final[Mapping[Any, Decoder]] = {
    str: _exactly(str),
    int: _exactly(int),
    bool: _exactly(bool),
    float: _number,
    Any: _anything,
}


def _one_of(values: tuple[Any, ...]) -> Decoder:
    def decoded(value: Any) -> Any:
        if value not in values:
            raise ValueError(value)
        return value

    return decoded


def _option(kinds: tuple[Any, ...]) -> Decoder:
    others = [decoder(kind) for kind in kinds if kind is not types.NoneType]
    one = others[0] if len(others) == 1 else _either(others)
    return (lambda value: None if value is None else one(value)) if types.NoneType in kinds else one


def _either(decoders: Sequence[Decoder]) -> Decoder:
    def decoded(value: Any) -> Any:
        for one in decoders:
            with suppress(ValueError, TypeError, KeyError):
                return one(value)
        raise TypeError(value)

    return decoded


def _sequence(kind: Any) -> Decoder:
    one = decoder(kind)
    return lambda value: tuple(map(one, a_list(value)))


def _row(kinds: tuple[Any, ...]) -> Decoder:
    decoders = tuple(map(decoder, kinds))
    return lambda value: tuple(one(item) for one, item in zip(decoders, a_list(value), strict=True))


def _mapping(kind: Any) -> Decoder:
    one = decoder(kind)

    def decoded(value: Any) -> Any:
        if type(value) is not dict:
            raise TypeError(value)
        return {key: one(item) for key, item in value.items()}

    return decoded


def _fields(kind: Any) -> Decoder:
    """Decoder of a dataclass: `KeyError` for an unknown field, `TypeError` from the class for a missing one.

    Of a dataclass that has `PASSES_OVER`, unknown fields are passed over.
    """
    hints = get_type_hints(kind)
    each = {field.name: decoder(hints[field.name]) for field in fields(kind)}

    def decoded(value: Any) -> Any:
        if type(value) is not dict:
            raise TypeError(value)
        return kind(**{name: each[name](item) for name, item in value.items()})

    def decoded_in_part(value: Any) -> Any:
        if type(value) is not dict:
            raise TypeError(value)
        return kind(**{name: one(value[name]) for name, one in each.items() if name in value})

    return decoded_in_part if getattr(kind, "PASSES_OVER", False) else decoded


def a_list(value: Any) -> list[Any]:
    """Return a value that is a list. Raises `TypeError` for another."""
    if type(value) is not list:
        raise TypeError(value)
    return value
