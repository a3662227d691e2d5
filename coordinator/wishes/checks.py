"""Checks that all readers of wish lists share: sizes, systems, store paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from coordinator.wishes.model import (
    MAX_FILE_BYTES,
    MAX_INSTALLABLE,
    MAX_NAME,
    SHOWN,
    Wish,
    WishedAttribute,
    WishedDerivation,
    WishedOutput,
    WishedPaths,
    WishListError,
    WishTarget,
    is_known_system,
)
from infra.nix.errors import FormatError
from infra.nix.store_path import StoreDir
from infra.validation import first_fault

_Model = TypeVar("_Model", bound=BaseModel)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def read_model(model: type[_Model], place: str, data: bytes, way: str) -> _Model:
    """Return a JSON text as `model`.

    Raises:
        WishListError: It is too large, no JSON, or does not fit; `way` says what to do then.
    """
    check_size(place, data)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        fault = first_fault(error)
        if not fault.place:
            raise WishListError(place, f"it is not whole or no JSON ({fault.message[:SHOWN]})", way) from None
        raise WishListError(f"{place} at {fault.place[:SHOWN]}", fault.message[:SHOWN], way) from None


def check_size(place: str, data: bytes) -> None:
    """Raise `WishListError` for a source that is too large."""
    if len(data) > MAX_FILE_BYTES:
        limit = MAX_FILE_BYTES // 1_000_000
        raise WishListError(place, f"it has more than {limit} MB, the limit", "divide it into several lists")


def check_name(place: str, name: str) -> None:
    """Raise `WishListError` for a name that cannot be shown."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise WishListError(
            place, f"{name[:SHOWN]!r} is no name of a package", f"use printable names of up to {MAX_NAME} characters"
        )


def check_words(place: str, wishes: Iterable[Wish]) -> None:
    """Raise `WishListError` for words that are too long or cannot be shown, as no farm takes them."""
    for wish in wishes:
        for word, limit in _words(wish):
            if len(word) > limit or _CONTROL.search(word):
                way = f"use up to {limit} characters and none that controls a terminal"
                raise WishListError(place, f"{wish.name[:SHOWN]} has {word[:SHOWN]!r}", way)


def _words(wish: Wish) -> Iterator[tuple[str, int]]:
    yield from ((word, MAX_NAME) for word in (wish.name, wish.group, wish.version))
    match wish.target:
        case WishedPaths(outputs=outputs, others=others, installable=installable):
            yield from ((output.name, MAX_NAME) for output in (*outputs, *others))
            yield installable, MAX_INSTALLABLE
        case WishedDerivation(outputs=names):
            yield from ((name, MAX_NAME) for name in names)
        case WishedAttribute(source=source, attribute=attribute):
            yield from ((word, MAX_INSTALLABLE) for word in (source, attribute))


def check_system(place: str, name: str, system: str) -> None:
    """Raise `WishListError` for a system that Nix does not know."""
    if not is_known_system(system):
        raise WishListError(
            place, f"{name} is for {system[:SHOWN]!r}, which is no system", "correct it to such as aarch64-darwin"
        )


def check_path(place: str, name: str, path: str, store_dir: StoreDir) -> None:
    """Raise `WishListError` for a path that is none of this store directory."""
    try:
        store_dir.parse(path)
    except FormatError as error:
        way = f"this farm has paths of {store_dir.path} alone"
        if path.startswith(f"{store_dir.path}/"):
            way = "make the list again"
        raise WishListError(place, f"{name} has {path[:SHOWN]!r}: {error.message}", way) from None


def check_target(place: str, name: str, target: WishTarget, store_dir: StoreDir) -> None:
    """Raise `WishListError` for a target with a path that is none of this store directory."""
    drv: str | None = None
    if isinstance(target, WishedPaths):
        drv = target.derivation
        for output in (*target.outputs, *target.others):
            check_path(place, name, output.path, store_dir)
    elif isinstance(target, WishedDerivation):
        drv = target.path
    if drv is not None:
        check_path(place, name, drv, store_dir)
        if not drv.endswith(".drv"):
            raise WishListError(place, f"{name} has the derivation {drv[:SHOWN]!r}, which is no .drv", "make it again")


def chosen_outputs(
    place: str, name: str, outputs: Mapping[str, str], installed: Iterable[str] | None
) -> tuple[tuple[WishedOutput, ...], tuple[WishedOutput, ...]]:
    """Return outputs that are to be installed, without repeats, and the others; None or none: all are.

    Raises:
        WishListError: One that is to be installed is not there.
    """
    wanted = tuple(dict.fromkeys(installed or outputs))
    for each in wanted:
        if each not in outputs:
            raise WishListError(
                place, f"{name} has no output {each[:SHOWN]!r} that is to be installed", "lock it again"
            )
    return (
        tuple(WishedOutput(each, outputs[each]) for each in wanted),
        tuple(WishedOutput(each, path) for each, path in outputs.items() if each not in frozenset(wanted)),
    )
