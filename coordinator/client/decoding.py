"""Strict decoder of answers: JSON becomes the records of `coordinator.api.models`, or an error of one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import orjson

from coordinator.api.models import CountsChanged, Ended, Snapshot, StepChanged, TransfersChanged, WatchEvent
from coordinator.api.route import Content, Route
from coordinator.client.errors import ClientError
from infra.decoding import a_list, decoder

_Answer = TypeVar("_Answer")

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
        answer: _Answer = decoder(_record(route))(orjson.loads(raw))
    except (ValueError, TypeError, KeyError):
        raise _not_understood(url) from None
    return answer


def decode_list(route: Route[_Answer], raw: bytes, url: str) -> list[_Answer]:
    """Return the records of one page of a list. Raises `ClientError`."""
    one = decoder(_record(route))
    try:
        return [one(item) for item in a_list(orjson.loads(raw))]
    except (ValueError, TypeError, KeyError):
        raise _not_understood(url) from None


def decode_event(raw: bytes, url: str) -> WatchEvent:
    """Return one event of a watch. Raises `ClientError`."""
    try:
        value = orjson.loads(raw)
        event: WatchEvent = decoder(_EVENTS[value["type"]])(value)
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
