"""Names as people give them to a cache: of pins, and of store paths."""

from __future__ import annotations

import re
from typing import Final

from coordinator.errors import BadRequestError
from infra.cache.cache import Cache
from infra.nix.errors import FormatError

#: A pin's name.
_PIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}")
#: Characters of a wrong path in an answer.
_SHOWN: Final = 200


def checked_pin(name: str) -> str:
    """Return the name of a pin. Raises `BadRequestError`."""
    if _PIN.fullmatch(name) is None:
        raise BadRequestError("a pin is called by letters, digits and ._+=- and at most 128 characters.")
    return name


def checked_path(cache: Cache, text: str) -> str:
    """Return the full store path that a full path or a base name stands for. Raises `BadRequestError`."""
    path = text if text.startswith("/") else cache.store_dir.full(text)
    try:
        cache.store_dir.parse(path)
    except FormatError as error:
        raise BadRequestError(f"{text[:_SHOWN]!r} is no store path: {error.message}.") from None
    return path
