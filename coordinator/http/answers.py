"""JSON in and out of the API: bodies become models, models become answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ValidationError

from coordinator.errors import BadRequestError

#: Bodies above this size are parsed beside the event loop: half a million names take a second.
INLINE_BYTES = 256 * 1024

_Body = TypeVar("_Body", bound=BaseModel)


async def read_body(request: web.Request, model: type[_Body]) -> _Body:
    """Read and check a JSON body. Raises `BadRequestError` that names the field."""
    data = await request.read()
    try:
        if len(data) > INLINE_BYTES:
            return await asyncio.to_thread(model.model_validate_json, data)
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise BadRequestError(f"the request's {where} is wrong: {first['msg']}.") from None


def answer(model: BaseModel, status: int = 200) -> web.Response:
    """Return a model as JSON."""
    return web.Response(body=orjson.dumps(model.model_dump()), status=status, content_type="application/json")


def answer_list(models: Sequence[BaseModel]) -> web.Response:
    """Return models as a JSON array."""
    body = orjson.dumps([model.model_dump() for model in models])
    return web.Response(body=body, content_type="application/json")
