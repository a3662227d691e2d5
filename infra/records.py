"""Records that are quick to define: dataclasses whose methods are not written and compiled anew for each class.

`dataclass` compiles five or six methods a class, 0.3 ms in all, and a command of the client defines a hundred classes,
of which it makes thirty. Here equality, hash and text are the same functions for all classes; `__init__` is compiled
when the first record is made. A type checker sees plain dataclasses. To it alone frozen ones are frozen, and they are
made four times as fast for that (`scheduler.values` says why).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:
    from collections.abc import Callable
    from dataclasses import dataclass, field, fields, make_dataclass
    from functools import cache
    from operator import attrgetter
    from typing import Any

    def record(
        cls: type | None = None, /, *, frozen: bool = False, slots: bool = False, kw_only: bool = False
    ) -> type | Callable[[type], type]:
        """Return the class as a dataclass; with keywords alone, what does so."""

        def made(plain: type) -> type:
            its = dataclass(plain, init=False, repr=False, eq=False, slots=slots, kw_only=kw_only)
            hashed = _hash if frozen else None
            for name, method in (
                ("__init__", _late(its)),
                ("__eq__", _equal),
                ("__hash__", hashed),
                ("__repr__", _text),
            ):
                if name not in vars(plain):
                    setattr(its, name, method)
            return its

        return made if cls is None else made(cls)

    def _late(cls: type) -> Callable[..., None]:
        """Return an `__init__` that puts the real one into its place."""

        def __init__(self: Any, /, *values: Any, **named: Any) -> None:  # noqa: N807
            twins = [
                (
                    each.name,
                    object,
                    field(
                        default=each.default,
                        default_factory=each.default_factory,
                        init=each.init,
                        kw_only=each.kw_only,
                    ),
                )
                for each in fields(cls)
            ]
            after = {"__post_init__": cls.__post_init__} if hasattr(cls, "__post_init__") else {}
            twin = make_dataclass(cls.__name__, twins, namespace=after, repr=False, eq=False)
            cls.__init__ = twin.__init__
            cls.__init__(self, *values, **named)

        return __init__

    @cache
    def _values_of(cls: type) -> Callable[[Any], Any]:
        """Return what gives the values of a record that count for its equality, in one call."""
        names = [each.name for each in fields(cls) if each.compare]
        return attrgetter(*names) if names else bool

    def _equal(self: Any, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        values = _values_of(self.__class__)
        return values(self) == values(other)

    def _hash(self: Any) -> int:
        return hash(_values_of(self.__class__)(self))

    def _text(self: Any) -> str:
        values = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.repr)
        return f"{self.__class__.__qualname__}({values})"
