"""`devbox.lock`, version 1: packages by `NAME@VERSION`, each with what it is on each system.

A package that has not been resolved for a system has the flake's attribute alone, which is yet to be evaluated. An
entry whose `resolved` names no attribute is an input of the others and no package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field

from coordinator.wishes.checks import check_name, check_system, check_target, chosen_outputs, read_model
from coordinator.wishes.model import (
    MAX_INSTALLABLE,
    MAX_NAME,
    MAX_OUTPUTS,
    MAX_PATH,
    MAX_SYSTEMS,
    MAX_WISHES,
    SHOWN,
    Wish,
    WishedAttribute,
    WishedPaths,
    WishList,
    WishListError,
    WishSource,
    unique,
)
from infra.nix.store_path import StoreDir

VERSION: Final = "1"
_RELOCK: Final = "lock it again with `devbox update`"
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_Text = Annotated[str, Field(max_length=MAX_INSTALLABLE)]


class _Output(BaseModel):
    name: _Name
    path: Annotated[str, Field(max_length=MAX_PATH)]
    default: bool = False


class _Locked(BaseModel):
    """A package on one system; before outputs were kept it had a path alone."""

    outputs: Annotated[tuple[_Output, ...], Field(max_length=MAX_OUTPUTS)] = ()
    store_path: Annotated[str, Field(max_length=MAX_PATH)] = ""


class _DevboxPackage(BaseModel):
    resolved: _Text = ""
    version: _Text = ""
    systems: Annotated[dict[_Name, _Locked], Field(max_length=MAX_SYSTEMS)] = {}


class _DevboxLock(BaseModel):
    packages: Annotated[dict[_Name, _DevboxPackage], Field(max_length=MAX_WISHES)] = {}


class _DevboxVersion(BaseModel):
    lockfile_version: Any = None


def read_devbox_lock(place: str, data: bytes, store_dir: StoreDir, systems: Sequence[str] = ()) -> WishList:
    """Return the wishes of a `devbox.lock`, which `place` names; packages of `systems` that it lacks are attributes.

    Raises:
        WishListError: It is not whole, of another version, or names what is no package, system or path.
    """
    version = read_model(_DevboxVersion, place, data, _RELOCK).lockfile_version
    if str(version) != VERSION:
        said = "no lockfile_version" if version is None else f"lockfile_version {str(version)[:SHOWN]!r}"
        raise WishListError(place, f"it has {said}, and version {VERSION} is read", _RELOCK)
    lock = read_model(_DevboxLock, place, data, _RELOCK)
    found, notes = unique(place, _wishes(place, lock, store_dir, systems))
    known = dict.fromkeys([*systems, *(wish.system for wish in found)])
    if len(known) > MAX_SYSTEMS:
        raise WishListError(place, f"it is for more than {MAX_SYSTEMS} systems", "ask for some with --systems")
    return WishList(place, WishSource.DEVBOX, found, tuple(known), VERSION, notes)


def _wishes(place: str, lock: _DevboxLock, store_dir: StoreDir, systems: Sequence[str]) -> Iterator[Wish]:
    for name, package in lock.packages.items():
        reference, found, attribute = package.resolved.partition("#")
        if not found and not package.systems:
            continue
        here = f"{place} at packages.{name[:SHOWN]}"
        check_name(here, name)
        for system, locked in package.systems.items():
            check_system(here, name, system)
            wish = _locked(here, name, system, package, locked)
            check_target(here, name, wish.target, store_dir)
            yield wish
        for system in systems:
            if found and system not in package.systems:
                asked = WishedAttribute(reference, f"legacyPackages.{system}.{attribute}")
                yield Wish(name, system, asked, version=package.version)


def _locked(place: str, name: str, system: str, package: _DevboxPackage, locked: _Locked) -> Wish:
    paths = {output.name: output.path for output in locked.outputs}
    if len(paths) < len(locked.outputs):
        raise WishListError(place, f"{name} has an output twice for {system}", _RELOCK)
    if not paths:
        paths = {"out": locked.store_path}
    defaults = [output.name for output in locked.outputs if output.default]
    outputs, others = chosen_outputs(place, name, paths, defaults)
    reference, found, attribute = package.resolved.partition("#")
    installable = f"{reference}#legacyPackages.{system}.{attribute}" if found else ""
    return Wish(name, system, WishedPaths(outputs, None, installable, others), version=package.version)
