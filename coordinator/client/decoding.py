"""Decoder of answers: JSON becomes the model that the route table names, or an error of one sentence."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from coordinator.api.models import WatchEvent
from coordinator.api.routes import Route
from coordinator.client.errors import ClientError

_Answer = TypeVar("_Answer")


def decode(route: Route[_Answer], raw: bytes, url: str) -> _Answer:
    """Return the model that a route answered with. Raises `ClientError`, which names the coordinator's `url`."""
    answer: _Answer = _decoded(route.answer, raw, url)
    return answer


def decode_list(route: Route[_Answer], raw: bytes, url: str) -> list[_Answer]:
    """Return the models of one page of a list. Raises `ClientError`."""
    page: list[_Answer] = _decoded(list[route.answer], raw, url)  # type: ignore[name-defined]
    return page


def decode_event(raw: bytes, url: str) -> WatchEvent:
    """Return one event of a watch. Raises `ClientError`."""
    event: WatchEvent = _decoded(WatchEvent, raw, url)
    return event


def _decoded(kind: Any, raw: bytes, url: str) -> Any:
    try:
        return _adapter(kind).validate_json(raw)
    except ValidationError:
        raise ClientError(
            f"the answer of {url} was not understood; client and coordinator should be of one version"
        ) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
