"""Wishes of any source: its form is found by its name, else by how its content begins, and read by its reader."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

from coordinator.wishes.checks import check_size, check_words
from coordinator.wishes.devbox import read_devbox_lock
from coordinator.wishes.flox import read_flox_lock
from coordinator.wishes.installables import ACTIVATED, file_wishes, flake_lock_wishes, flake_wishes
from coordinator.wishes.lines import read_lines
from coordinator.wishes.model import SHOWN, WishList, WishListError, WishSource, narrowed
from infra.nix.store_path import StoreDir

#: Names of files that say what they are.
_NAMES: Final = {
    "manifest.lock": WishSource.FLOX,
    "devbox.lock": WishSource.DEVBOX,
    "flake.lock": WishSource.FLAKE_LOCK,
}
#: Bytes at which a form shows: locks have their version near the beginning, or near the end.
_LOOKED_AT: Final = 4096
_FORMS: Final = (
    (re.compile(rb'"lockfile-version"'), WishSource.FLOX),
    (re.compile(rb'"lockfile_version"'), WishSource.DEVBOX),
    (re.compile(rb'"drvPath"|"attr"\s*:'), WishSource.EVAL_JOBS),
    (re.compile(rb'"nodes"\s*:'), WishSource.FLAKE_LOCK),
)
#: Forms that are names of what is evaluated; the content of the others is read.
NAMED: Final = frozenset({WishSource.FILE, WishSource.FLAKE, WishSource.CONFIGURATION})


@dataclass(frozen=True, slots=True)
class WishReading:
    """Ways in which sources are read."""

    store_dir: StoreDir
    #: System of this machine: that of paths which do not say theirs.
    system: str
    #: Systems that are asked for; none: those of the source, or this machine's.
    systems: tuple[str, ...] = ()
    #: The source's form; None: found by name and content.
    source: WishSource | None = None
    #: Attributes of a Nix file.
    attributes: tuple[str, ...] = ()


def source_by_name(name: str) -> WishSource | None:
    """Return the form of a source as its name says it; None where its content must."""
    if "#" in name:
        return WishSource.CONFIGURATION if name.partition("#")[2].split(".")[0] in ACTIVATED else WishSource.FLAKE
    path = PurePath(name)
    return WishSource.FILE if path.suffix == ".nix" else _NAMES.get(path.name)


def source_by_content(place: str, data: bytes) -> WishSource:
    """Return the form of a source as its content says it.

    Raises:
        WishListError: It is in no form that is known.
    """
    start = data[:_LOOKED_AT].lstrip()
    if start.startswith(b"{"):
        looked_at = start + b"\n" + data[-_LOOKED_AT:]
        for pattern, source in _FORMS:
            if pattern.search(looked_at):
                return source
    elif start.startswith((b"/", b"#")) or not start:
        return WishSource.PATHS
    raise WishListError(
        place, f"its form is not known; it begins with {start[:20].decode(errors='replace')!r}", "say it with --kind"
    )


def flake_of(directory: PurePath) -> str:
    """Return the reference of a flake in a directory, which a bare name is not."""
    text = str(directory)
    return text if text.startswith(("/", ".")) else f"./{text}"


def named_wishes(name: str, reading: WishReading, *, source: WishSource) -> WishList:
    """Return the wishes of a flake's output, a configuration or a Nix file, by its name alone.

    Raises:
        WishListError: The name is none of these.
    """
    systems = reading.systems or (reading.system,)
    if source is WishSource.FILE:
        return file_wishes(name, reading.attributes, systems)
    return flake_wishes(name if "#" in name else f"{name}#", systems)


def read_wishes(place: str, data: bytes, reading: WishReading) -> WishList:
    """Return the wishes of a source's content, which `place` names; only those for the systems that are asked for.

    Raises:
        WishListError: It cannot be read as what it is.
    """
    check_size(place, data)
    source = reading.source or source_by_name(place) or source_by_content(place, data)
    match source:
        case WishSource.FLOX:
            found = read_flox_lock(place, data, reading.store_dir)
        case WishSource.DEVBOX:
            found = read_devbox_lock(place, data, reading.store_dir, reading.systems)
        case WishSource.FLAKE_LOCK:
            systems = reading.systems or (reading.system,)
            found = flake_lock_wishes(place, data, flake_of(PurePath(place).parent), systems)
        case WishSource.PATHS | WishSource.EVAL_JOBS:
            systems = reading.systems or (reading.system,)
            found = read_lines(place, data, reading.store_dir, systems[0])
            if found.source is WishSource.PATHS and len(systems) > 1:
                raise WishListError(place, "its paths do not say which system they are for", "ask for one system")
        case _:
            raise WishListError(place[:SHOWN], f"it is evaluated, not read as {source}", "name a file with the wishes")
    check_words(place, found.wishes)
    return narrowed(found, reading.systems)
