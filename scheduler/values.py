"""Values that the core makes by the hundred thousand.

A frozen dataclass sets each field through `object.__setattr__`, which makes it four times as dear as one that is not
frozen: 0.6 us instead of 0.15 us for four fields, of which a build takes some eight. So `quick` gives a frozen
dataclass the plain `__init__`. It stays frozen for the type checker, which sees all code; only what no type checker has
seen could change one.
"""

from __future__ import annotations

from dataclasses import MISSING, field, fields, make_dataclass
from typing import TypeVar

_T = TypeVar("_T")


def quick(cls: type[_T]) -> type[_T]:
    """Return the frozen dataclass with slots that is given, made without the checks against assignment.

    All else stays: equality, hash, order, `replace`, fields, slots. No field may have a factory.
    """
    plain = []
    for each in fields(cls):  # type: ignore[arg-type]  # mypy cannot say that the class is a dataclass
        if each.default_factory is not MISSING:
            raise TypeError(f"{cls.__name__}.{each.name} has a factory")
        plain.append((each.name, object, field(default=each.default)))
    twin = make_dataclass(cls.__name__, plain)
    for name in ("__setattr__", "__delattr__"):
        delattr(cls, name)
    setattr(cls, "__init__", vars(twin)["__init__"])  # noqa: B010  mypy forbids to assign it
    return cls
