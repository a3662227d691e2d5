"""JSON out of the API: models become answers."""

from __future__ import annotations

import orjson
from aiohttp import web
from pydantic import BaseModel


def answer(model: BaseModel, status: int = 200) -> web.Response:
    """Return a model as JSON."""
    return web.Response(body=orjson.dumps(model.model_dump()), status=status, content_type="application/json")
