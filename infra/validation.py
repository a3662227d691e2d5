"""The first fault of a pydantic validation, for a sentence to a person."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import ValidationError


class FieldFault(NamedTuple):
    """Fault of a value and its place (names and numbers with dots between, "" for the whole)."""

    place: str
    message: str


def first_fault(error: ValidationError) -> FieldFault:
    """Return the first fault. Nothing of the value is quoted, because it may be a secret."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return FieldFault(".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, "))
