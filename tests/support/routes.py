"""Addresses of every route of the tables, for things that are not there."""

from __future__ import annotations

from typing import Any, Final

from coordinator.api.cache_routes import CACHE_ROUTES
from coordinator.api.route import Route
from coordinator.api.routes import ROUTES
from coordinator.api.web_routes import WEB_ROUTES
from coordinator.config import DEFAULT_CACHE

#: What stands for the dynamic parts of addresses: texts that the routes take.
PARTS: Final = {
    "cache": DEFAULT_CACHE,
    "pin": "p",
    "id": "0" * 32,
    "key": "0" * 32 + "-x.drv",
    "name": "nobody",
    "path": "0" * 32 + "-x",
    "hash_part": "0" * 32,
    "file": "0" * 52 + ".nar",
    "derivation": "0" * 32 + "-x.drv",
    "output": "out",
    "build_id": "0" * 40,
    "anything": "nothing",
    "tree": "0" * 64,
    "environment": "nothing",
    "algorithm": "sha256",
    "hash": "0" * 64,
}


def addresses(*prefixes: str) -> list[tuple[Route[Any], str, str]]:
    """Every route with an address of it and the prefix of its cache, "" for those of the farm."""
    farm = [(route, route.address(**PARTS), "") for route in (*ROUTES, *WEB_ROUTES)]
    return farm + [(route, route.address(prefix, **PARTS), prefix) for prefix in prefixes for route in CACHE_ROUTES]
