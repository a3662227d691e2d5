"""The client takes every answer that the coordinator can give, and no other."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import EnumType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.models import CountsChanged, Ended, Snapshot, StepChanged, TransfersChanged
from coordinator.api.route import Route
from coordinator.api.routes import FARM, ROUTES
from coordinator.client.decoding import decode, decode_event, decode_list
from coordinator.client.errors import ClientError

URL = "http://farm.example"
ANSWERS = [route for route in ROUTES if is_dataclass(route.answered)]
SIMPLE: Mapping[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=4),
    int: st.integers(0, 2**53),
    bool: st.booleans(),
    float: st.floats(0, 1e12),
    Any: st.integers(0, 9) | st.lists(st.text(max_size=4), max_size=2),
}


def values(kind: Any) -> st.SearchStrategy[Any]:  # noqa: PLR0911  one way for each type
    """Every value of a type that the records have."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in SIMPLE:
        return SIMPLE[kind]
    if origin is Literal:
        return st.sampled_from(arguments)
    if isinstance(kind, EnumType):
        return st.sampled_from(list(kind))
    if origin is types.UnionType:
        return st.none() | values(arguments[0])
    if origin is tuple:
        each = st.lists(values(arguments[0]), max_size=2).map(tuple)
        return each if arguments[1:] == (...,) else st.tuples(*map(values, arguments))
    if origin in {dict, Mapping}:
        return st.dictionaries(st.text(max_size=4), values(arguments[1]), max_size=2)
    return st.builds(kind, **{name: values(hint) for name, hint in get_type_hints(kind).items()})


def of_another_type(value: Any) -> Any:
    return "text" if isinstance(value, (int, float, dict, list)) or value is None else 1


@pytest.mark.parametrize("route", ANSWERS, ids=lambda route: f"{route.method} {route.path}")
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_the_coordinator_writes_is_what_the_client_reads(route: Route[Any], data: st.DataObject) -> None:
    record = data.draw(values(route.answered))
    if route.many:
        assert decode_list(route, orjson.dumps([record, record]), URL) == [record, record]
    else:
        assert decode(route, orjson.dumps(record), URL) == record


@settings(max_examples=40, deadline=None)
@given(event=st.one_of([values(kind) for kind in (Snapshot, StepChanged, TransfersChanged, CountsChanged, Ended)]))
def test_each_event_of_a_stream_is_read_as_what_it_is(event: Any) -> None:
    assert decode_event(orjson.dumps(event), URL) == event


@pytest.mark.parametrize("route", ANSWERS, ids=lambda route: f"{route.method} {route.path}")
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_field_too_many_too_few_or_of_another_type_is_not_understood(route: Route[Any], data: st.DataObject) -> None:
    plain = orjson.loads(orjson.dumps(data.draw(values(route.answered))))
    assert is_dataclass(route.answered)
    needed = [each.name for each in fields(route.answered) if each.default is each.default_factory is MISSING]
    wrong = [{**plain, "no_such_field": 1}, *({**plain, name: of_another_type(plain[name])} for name in plain)]
    wrong += [{name: value for name, value in plain.items() if name != absent} for absent in needed]
    for body in wrong:
        with pytest.raises(ClientError, match="should be of one version"):
            (decode_list if route.many else decode)(route, orjson.dumps([body] if route.many else body), URL)


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", b"[]", b"null", b'"text"', b"{}", b'{"type": "other"}', b'{"type": []}']
)
def test_bytes_that_are_no_answer_are_not_understood(raw: bytes) -> None:
    with pytest.raises(ClientError):
        decode(FARM, raw, URL)
    with pytest.raises(ClientError):
        decode_event(raw, URL)
