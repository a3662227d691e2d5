"""JSON answers: models, and the one shape of every error."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from aiohttp import web
from pydantic import BaseModel

from coordinator.api.models import ErrorBody, ErrorView


def answer(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a model as JSON."""
    return web.Response(
        body=orjson.dumps(model.model_dump(mode="json")),
        status=status,
        content_type="application/json",
        headers=headers,
    )


def error_answer(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return an `ErrorView`: a word for a program and a sentence for a person."""
    return answer(ErrorView(error=ErrorBody(code=code, message=message)), status, headers)
