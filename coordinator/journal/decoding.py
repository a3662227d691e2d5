"""Strict decoders of dataclasses: JSON in, one dataclass out, as msgspec reads it from the annotations.

Whatever does not fit is a `CodecError`. A missing field takes its default, because records of before the field was
added stay readable. msgspec passes over fields that it does not know; they are found because what was decoded, encoded
again, lacks them. Equal keys of steps become one string, and equal requirements one object.
"""

from __future__ import annotations

import base64
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec
import orjson

from coordinator.journal.errors import CodecError
from scheduler.model import Requirements, StepKey

#: Different requirements that are remembered to be shared.
_SHARED_VALUES = 10_000

T = TypeVar("T")
_Change = Callable[[Any], Any]


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


class RecordDecoder(Generic[T]):
    """Decoder of one dataclass; all methods raise `CodecError`."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)
        self._share = _sharing(kind) or _same

    def decode(self, data: bytes) -> T:
        """Return the record that JSON text holds."""
        try:
            made = self._decoder.decode(data)
            again = orjson.dumps(made, default=plain)
            if again != data and not _has_all(orjson.loads(again), orjson.loads(data)):
                raise self._mismatch("it has a field that this version of drover does not know")
        except msgspec.ValidationError as error:
            raise self._mismatch(str(error)) from None
        except (msgspec.DecodeError, ValueError, orjson.JSONEncodeError) as error:
            raise CodecError(f"a record of the journal is damaged: {error}.") from None
        return typing.cast("T", self._share(made))

    def convert(self, value: Any) -> T:
        """Return the record that a JSON value stands for."""
        return self.decode(orjson.dumps(value))

    def _mismatch(self, why: str) -> CodecError:
        return CodecError(f"the journal has something else where a {self._kind.__name__} belongs: {why}.")


def _has_all(made: Any, given: Any) -> bool:
    """Return whether every field of `given`, a JSON value, is in `made` too."""
    if isinstance(given, dict):
        return given.keys() <= made.keys() and all(_has_all(made[name], each) for name, each in given.items())
    if isinstance(given, list):
        return all(map(_has_all, made, given))
    return True


def _same(value: Any) -> Any:
    return value


def _sharing(kind: Any) -> _Change | None:
    """Return what gives a fresh value of a type its shared parts; None where it has none. Done once, at import."""
    if kind is StepKey:
        # A step's key stands in its spec, in the needs of others and in every later fact: one string serves them all.
        return sys.intern
    if kind is Requirements:
        return _shared_requirements
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        [some] = [choice for choice in typing.get_args(kind) if choice is not types.NoneType]
        change = _sharing(some)
        return change and (lambda value: None if value is None else change(value))
    if typing.get_origin(kind) in (tuple, Sequence):
        return _sharing_tuple(typing.get_origin(kind), *typing.get_args(kind))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _sharing_record(kind)
    return None


def _sharing_tuple(origin: Any, first: Any, *others: Any) -> _Change | None:
    change = _sharing(first)
    if origin is Sequence:
        # msgspec makes a list of it.
        return lambda value: tuple(map(change or _same, value))
    if others != (...,):
        changes = [change, *map(_sharing, others)]
        if not any(changes):
            return None
        return lambda value: tuple([(each or _same)(part) for each, part in zip(changes, value, strict=True)])
    return change and (lambda value: tuple(map(change, value)))


def _sharing_record(kind: type) -> _Change | None:
    hints = typing.get_type_hints(kind)
    fields = ((field.name, _sharing(hints[field.name])) for field in dataclasses.fields(kind))
    changes = tuple((name, change) for name, change in fields if change is not None)
    if not changes:
        return None

    def change_all(record: Any) -> Any:
        # The record is fresh: shared parts take the place of its own before a caller gets it.
        for name, change in changes:
            object.__setattr__(record, name, change(getattr(record, name)))
        return record

    return change_all


_requirements: dict[Requirements, Requirements] = {}


def _shared_requirements(value: Requirements) -> Requirements:
    """Return one value for equal ones: a farm knows a handful of requirements and a hundred thousand steps."""
    if len(_requirements) < _SHARED_VALUES:
        return _requirements.setdefault(value, value)
    return _requirements.get(value, value)
