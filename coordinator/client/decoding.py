"""Strict decoder of answers: JSON becomes the records of `coordinator.api.models`, or an error of one sentence.

It knows the types that those records have: texts, numbers, enumerations and literals, tuples, mappings, options, and
records in each other. A field that is missing, unknown or of another type is an error. A decoder is made for a type the
first time that it is needed, so a command pays for the answers that it reads.
"""

from __future__ import annotations

import builtins
import collections.abc
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import EnumType
from functools import cache
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

import orjson

from coordinator.api.models import CountsChanged, Ended, Snapshot, StepChanged, TransfersChanged, WatchEvent
from coordinator.api.route import Content, Route
from coordinator.client.errors import ClientError

_Answer = TypeVar("_Answer")
_Decoder = Callable[[Any], Any]

_EVENTS: Final[Mapping[str, type]] = {
    "snapshot": Snapshot,
    "step": StepChanged,
    "transfers": TransfersChanged,
    "counts": CountsChanged,
    "end": Ended,
}


def decode(route: Route[_Answer], raw: bytes, url: str) -> _Answer:
    """Return the record that a route answered with. Raises `ClientError`, which names the coordinator's `url`."""
    try:
        answer: _Answer = _decoder(_record(route))(orjson.loads(raw))
    except (ValueError, TypeError, KeyError):
        raise _not_understood(url) from None
    return answer


def decode_list(route: Route[_Answer], raw: bytes, url: str) -> list[_Answer]:
    """Return the records of one page of a list. Raises `ClientError`."""
    one = _decoder(_record(route))
    try:
        return [one(item) for item in _a_list(orjson.loads(raw))]
    except (ValueError, TypeError, KeyError):
        raise _not_understood(url) from None


def decode_event(raw: bytes, url: str) -> WatchEvent:
    """Return one event of a watch. Raises `ClientError`."""
    try:
        value = orjson.loads(raw)
        event: WatchEvent = _decoder(_EVENTS[value["type"]])(value)
    except (ValueError, TypeError, KeyError):
        raise _not_understood(url) from None
    return event


def _not_understood(url: str) -> ClientError:
    return ClientError(f"the answer of {url} was not understood; client and coordinator should be of one version")


def _record(route: Route[Any]) -> Any:
    record = route.answered
    if record is None or isinstance(record, Content):
        raise AssertionError(f"{route.method} {route.path} answers with no record")
    return record


@cache
def _decoder(kind: Any) -> _Decoder:
    """Return what makes a value of type `kind` from parsed JSON, or raises `ValueError`, `TypeError` or `KeyError`."""
    origin, arguments = get_origin(kind), get_args(kind)
    match origin:
        case _ if kind in _SIMPLE:
            decoder = _SIMPLE[kind]
        case typing.Literal:
            decoder = _one_of(arguments)
        case types.UnionType:
            decoder = _option(arguments)
        case builtins.tuple:
            decoder = _sequence(arguments[0]) if arguments[1:] == (...,) else _row(arguments)
        case builtins.dict | collections.abc.Mapping:
            decoder = _mapping(arguments[1])
        case _ if isinstance(kind, EnumType):
            decoder = kind
        case _:
            decoder = _fields(kind)
    return decoder


def _exactly(kind: type) -> _Decoder:
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


_SIMPLE: Final[Mapping[Any, _Decoder]] = {
    str: _exactly(str),
    int: _exactly(int),
    bool: _exactly(bool),
    float: _number,
    Any: _anything,
}


def _one_of(values: tuple[Any, ...]) -> _Decoder:
    def decoded(value: Any) -> Any:
        if value not in values:
            raise ValueError(value)
        return value

    return decoded


def _option(kinds: tuple[Any, ...]) -> _Decoder:
    [kind] = [each for each in kinds if each is not types.NoneType]
    one = _decoder(kind)
    return lambda value: None if value is None else one(value)


def _sequence(kind: Any) -> _Decoder:
    one = _decoder(kind)
    return lambda value: tuple(map(one, _a_list(value)))


def _row(kinds: tuple[Any, ...]) -> _Decoder:
    decoders = tuple(map(_decoder, kinds))
    return lambda value: tuple(one(item) for one, item in zip(decoders, _a_list(value), strict=True))


def _mapping(kind: Any) -> _Decoder:
    one = _decoder(kind)

    def decoded(value: Any) -> Any:
        if type(value) is not dict:
            raise TypeError(value)
        return {key: one(item) for key, item in value.items()}

    return decoded


def _fields(kind: Any) -> _Decoder:
    """Decoder of a dataclass: `KeyError` for an unknown field, `TypeError` from the class for a missing one."""
    hints = get_type_hints(kind)
    each = {field.name: _decoder(hints[field.name]) for field in fields(kind)}

    def decoded(value: Any) -> Any:
        if type(value) is not dict:
            raise TypeError(value)
        return kind(**{name: each[name](item) for name, item in value.items()})

    return decoded


def _a_list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(value)
    return value
