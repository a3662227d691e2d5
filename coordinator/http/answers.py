"""JSON answers: models, and the one shape of every error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web
from pydantic import BaseModel

from coordinator.api.models import ErrorBody, ErrorView


def answer(record: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a dataclass of `coordinator.api.models`, or a pydantic model, as JSON."""
    return web.Response(body=json_of(record), status=status, content_type="application/json", headers=headers)


def json_of(record: object) -> bytes:
    """Return the JSON of a dataclass or a pydantic model."""
    return orjson.dumps(record, default=_dumped)


def _dumped(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(type(value).__name__)


def error_answer(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return an `ErrorView`: a word for a program and a sentence for a person."""
    return answer(ErrorView(error=ErrorBody(code=code, message=message)), status, headers)
