"""The description of the API as OpenAPI 3.1, made of the route table and the models, and served.

Tests send what it allows and what it forbids (`tests/coordinator/test_openapi.py`), so that it is true.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Final

import orjson
from aiohttp import web
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from coordinator.api import (
    capacity_routes,
    environment_routes,
    evaluation_routes,
    mirror_routes,
    plan_routes,
    requests,
    routes,
    source_routes,
)
from coordinator.api.models import ErrorView
from coordinator.api.route import EVERY_ROUTE, NUMBER_DIGITS, Content, Query, Right, Route
from coordinator.http.routing import serve

#: Version of the specification. Source: OpenAPI Specification 3.1.1.
OPENAPI_VERSION: Final = "3.1.1"
#: Modules whose routes it describes, each under the name that it has there.
TABLES: Final = (
    routes,
    evaluation_routes,
    mirror_routes,
    plan_routes,
    source_routes,
    environment_routes,
    capacity_routes,
)
_REF: Final = "#/components/schemas/{model}"
_PART: Final = re.compile(r"\{(\w+)\}")
_INTRODUCTION: Final = """\
Times are Unix seconds. Every refusal is an `ErrorView`: a word for programs and a sentence for people with a way on.
Lists come in pages: where there is more, the header `Link` has the address of the next page as `rel="next"`.
A parameter of a query that is empty is as one that is left out.
A request that is repeated changes nothing more, but for submissions, each of which is a new one.
Requests show the API token as `Authorization: Bearer TOKEN`."""

_Json = dict[str, Any]


def add_openapi_route(app: web.Application) -> None:
    """Serve the description. Anyone may read it: it is the same for every farm of this version."""

    async def openapi(_request: web.Request) -> web.Response:
        # Half a second of work, which most farms are never asked for.
        return web.Response(body=await asyncio.to_thread(_body), content_type="application/json")

    serve(app, {routes.OPENAPI: openapi})


@cache
def _body() -> bytes:
    return orjson.dumps(description(version("drover")))


def description(release: str) -> _Json:
    """Return the description of all routes that are not below a cache's prefix."""
    members = [member for table in TABLES for member in vars(table).items()]
    names = {route: name.lower() for name, route in members if isinstance(route, Route)}
    models = list(_models(routes.ROUTES))
    keys: list[tuple[int, JsonSchemaMode, TypeAdapter[Any]]] = [
        (number, "validation" if _is_request(model) else "serialization", TypeAdapter(model))
        for number, model in enumerate(models)
    ]
    schemas, definitions = TypeAdapter.json_schemas(keys, ref_template=_REF)
    of_model = {models[number]: schema for (number, _), schema in schemas.items()}
    paths: dict[str, _Json] = {}
    for route in routes.ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, names[route], of_model)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "drover", "version": release, "description": _INTRODUCTION},
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _models(table: Iterable[Route[Any]]) -> dict[type[Any], None]:
    """Return the models of bodies and answers, each once."""
    found: dict[type[Any], None] = {ErrorView: None}
    for route in table:
        for model in (_body_model(route), route.answered):
            if isinstance(model, type):
                found[model] = None
    return found


def _body_model(route: Route[Any]) -> type[Any] | None:
    if isinstance(route.body, Content) or route.body is None:
        return None
    model: type[Any] = getattr(requests, route.body) if isinstance(route.body, str) else route.body
    return model


def _is_request(model: type[Any]) -> bool:
    return issubclass(model, BaseModel)


def _operation(route: Route[Any], name: str, schemas: Mapping[type[Any], _Json]) -> _Json:
    refusals = sorted({*EVERY_ROUTE, *route.errors})
    operation: _Json = {
        "operationId": name,
        "summary": route.summary,
        "parameters": [*_path_parts(route), *map(_parameter, route.queries), *_headers(route)],
        "responses": {
            str(route.status): _answer(route, schemas),
            **{str(status): _refusal(status, schemas) for status in refusals},
        },
        "security": [] if route.right is Right.NONE else [{"token": []}],
    }
    model = _body_model(route)
    if model is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schemas[model]}}}
    elif isinstance(route.body, Content):
        operation["requestBody"] = {"required": True, "content": {route.body.media_type: {"schema": {}}}}
    return operation


def _path_parts(route: Route[Any]) -> list[_Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PART.findall(route.path)
    ]


def _headers(route: Route[Any]) -> list[_Json]:
    """Return the header with which a stream of events goes on where it broke. Source: HTML standard, 9.2.4."""
    if route.answered is not Content.EVENTS:
        return []
    about = "The newest `id:` of a stream that broke; one that names nothing kept begins with a snapshot."
    return [{"name": "Last-Event-ID", "in": "header", "description": about, "schema": {"type": "string"}}]


def _parameter(query: Query) -> _Json:
    schema: _Json = {"type": query.type}
    if query.type == "integer":
        schema |= {"minimum": query.minimum, "maximum": 10**NUMBER_DIGITS - 1}
    if query.pattern:
        schema["pattern"] = query.pattern
    parameter: _Json = {"name": query.name, "in": "query", "description": query.summary, "schema": schema}
    if query.words:
        parameter |= {
            "schema": {"type": "array", "items": {"enum": list(query.words)}},
            "style": "form",
            "explode": False,
        }
    return parameter


def _answer(route: Route[Any], schemas: Mapping[type[Any], _Json]) -> _Json:
    answer: _Json = {"description": HTTPStatus(route.status).phrase}
    if isinstance(route.answered, Content):
        media, schema = route.answered.media_type, {} if route.answered.is_json else {"type": "string"}
        answer["content"] = {media: {"schema": schema}}
    elif route.answered is not None:
        schema = schemas[route.answered]
        answer["content"] = {
            "application/json": {"schema": {"type": "array", "items": schema} if route.many else schema}
        }
    if route.many:
        answer["headers"] = {
            "Link": {"description": "Address of the next page, where there is one.", "schema": {"type": "string"}}
        }
    return answer


def _refusal(status: int, schemas: Mapping[type[Any], _Json]) -> _Json:
    return {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": schemas[ErrorView]}},
    }
