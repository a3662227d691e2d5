"""JSON out of the API: models become answers."""

from __future__ import annotations

from collections.abc import Sequence

import orjson
from aiohttp import web
from pydantic import BaseModel


def answer(model: BaseModel, status: int = 200) -> web.Response:
    """Return a model as JSON."""
    return web.Response(body=orjson.dumps(model.model_dump()), status=status, content_type="application/json")


def answer_list(models: Sequence[BaseModel]) -> web.Response:
    """Return models as a JSON array."""
    body = orjson.dumps([model.model_dump() for model in models])
    return web.Response(body=body, content_type="application/json")
