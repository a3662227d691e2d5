"""Wishes that are yet to be evaluated: outputs of flakes, attributes of files, configurations of machines and homes.

`REF#nixosConfigurations.HOST` and its like stand for what is activated: `config.system.build.toplevel` (NixOS),
`system` (nix-darwin), `activationPackage` (home-manager). An output without a system in its name is wished for on each
system; a configuration is for one, which evaluation says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field

from coordinator.wishes.checks import check_name, read_model
from coordinator.wishes.model import (
    MAX_INSTALLABLE,
    MAX_WISHES,
    SHOWN,
    Wish,
    WishedAttribute,
    WishList,
    WishListError,
    WishSource,
    is_known_system,
    unique,
)

#: Outputs of a flake whose second name is a system.
PER_SYSTEM: Final = frozenset({"packages", "legacyPackages", "devShells", "checks", "apps"})
#: Outputs that hold configurations, and what of one is activated.
ACTIVATED: Final = {
    "nixosConfigurations": "config.system.build.toplevel",
    "darwinConfigurations": "system",
    "homeConfigurations": "activationPackage",
}
#: Outputs of the flake beside a `flake.lock`, as far as it has them.
OF_A_LOCK: Final = ("packages", "devShells")
#: Versions of `flake.lock` that have the same nodes.
LOCK_VERSIONS: Final = frozenset({5, 6, 7})
#: Names of an attribute path; one in quotes may hold dots.
_NAMES: Final = re.compile(r'(?:"[^"]*"|[^."])+')
_RELOCK: Final = "lock it again with `nix flake lock`"


class _LockNode(BaseModel):
    inputs: dict[str, Any] = {}
    locked: dict[str, Any] | None = None


class _FlakeLock(BaseModel):
    version: int
    root: str
    nodes: Annotated[dict[str, _LockNode], Field(max_length=MAX_WISHES)]


def flake_wishes(text: str, systems: Sequence[str]) -> WishList:
    """Return the wishes of `REF#ATTR` for each system.

    Raises:
        WishListError: It is too long, or names an output of another system than those that are asked for.
    """
    reference, _, attribute = text.partition("#")
    check_name(text[:SHOWN], text)
    names = _NAMES.findall(attribute)
    if names and names[0] in ACTIVATED:
        if len(names) < 2:
            raise WishListError(text, f"it names no configuration of {names[0]}", f"add its name: {names[0]}.NAME")
        return _configuration(text, reference, names, systems)
    wishes, _ = unique(text, _outputs(text, reference or ".", names, systems))
    found = tuple(dict.fromkeys(wish.system for wish in wishes))
    return WishList(text, WishSource.FLAKE, wishes, found)


def _outputs(text: str, reference: str, names: Sequence[str], systems: Sequence[str]) -> Iterator[Wish]:
    attribute = ".".join(names)
    if len(names) > 1 and names[0] in PER_SYSTEM and is_known_system(names[1].strip('"')):
        system = names[1].strip('"')
        if systems and system not in systems:
            raise WishListError(text, f"it is for {system}, which is not among the systems", f"add {system} to them")
        yield Wish(".".join([names[0], *names[2:]]), system, WishedAttribute(reference, attribute))
        return
    for system in systems:
        if names and names[0] in PER_SYSTEM:
            path = ".".join([names[0], system, *names[1:]])
        else:
            path = f"packages.{system}.{attribute or 'default'}"
        yield Wish(attribute or "default", system, WishedAttribute(reference, path))


def _configuration(text: str, reference: str, names: Sequence[str], systems: Sequence[str]) -> WishList:
    path = ".".join(names)
    name = ".".join(names[:2])
    if path == name:
        path = f"{path}.{ACTIVATED[names[0]]}"
    elif path != f"{name}.{ACTIVATED[names[0]]}":
        # Another part of the configuration, such as its virtual machine.
        name = path
    kernel = "darwin" if names[0] == "darwinConfigurations" else "linux" if names[0] == "nixosConfigurations" else ""
    # One configuration is for one system; until evaluation says which, it is the first that could be.
    possible = [system for system in systems if system.endswith(kernel)]
    if not possible:
        raise WishListError(
            text, f"it is for {kernel}, and no such system is asked for", f"add a {kernel} to --systems"
        )
    wish = Wish(name, possible[0], WishedAttribute(reference or ".", path))
    return WishList(text, WishSource.CONFIGURATION, (wish,), (possible[0],))


def file_wishes(file: str, attributes: Sequence[str], systems: Sequence[str]) -> WishList:
    """Return the wishes of attributes of a Nix file (none: its whole value) for each system.

    Raises:
        WishListError: An attribute's name cannot be shown, or there are too many.
    """
    for attribute in attributes:
        check_name(file, attribute)
    asked = [
        Wish(attribute or file, system, WishedAttribute(file, attribute, is_flake=False))
        for attribute in attributes or [""]
        for system in systems
    ]
    wishes, notes = unique(file, asked)
    return WishList(file, WishSource.FILE, wishes, tuple(systems), notes=notes)


def flake_lock_wishes(place: str, data: bytes, directory: str, systems: Sequence[str]) -> WishList:
    """Return the wishes of a `flake.lock`: packages and shells of the flake in `directory`.

    Raises:
        WishListError: It is not whole, or of another version.
    """
    lock = read_model(_FlakeLock, place, data, _RELOCK)
    if lock.version not in LOCK_VERSIONS:
        raise WishListError(place, f"it has version {lock.version}, and {max(LOCK_VERSIONS)} is read", _RELOCK)
    if lock.root not in lock.nodes:
        raise WishListError(place, f"its root {lock.root[:SHOWN]!r} is not among its nodes", _RELOCK)
    unlocked = [name for name, node in lock.nodes.items() if name != lock.root and not node.locked]
    if unlocked:
        raise WishListError(place, f"its input {unlocked[0][:SHOWN]!r} is not locked", _RELOCK)
    if len(directory) > MAX_INSTALLABLE:
        raise WishListError(place, "its directory's name is too long", "move it")
    wishes = tuple(
        Wish(output, system, WishedAttribute(directory, f"{output}.{system}"))
        for output in OF_A_LOCK
        for system in systems
    )
    return WishList(place, WishSource.FLAKE_LOCK, wishes, tuple(systems), str(lock.version))
