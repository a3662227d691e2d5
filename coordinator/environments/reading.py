"""Reading of a source of an environment: bytes of a file or a git branch, and the wishes in them.

Nothing is evaluated here: a source that wants it is refused with the way that there is, a push (`evaluated` has the
other one).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from coordinator.environments.errors import EnvironmentSourceError
from coordinator.wishes.model import WishedAttribute, WishList
from coordinator.wishes.reading import WishReading, read_wishes
from infra.nix.store_path import StoreDir

#: Names that are looked for in a directory, in this order.
KNOWN_NAMES: Final = (
    ".flox/env/manifest.lock",
    "manifest.lock",
    "devbox.lock",
    "environment.paths",
    "flake.lock",
)


@dataclass(frozen=True, slots=True)
class SourceContent:
    """Content of a source when it was looked at."""

    #: Commit, or digest of the bytes.
    mark: str
    #: Name of the file, which says its form.
    name: str
    data: bytes


def mark_of(data: bytes) -> str:
    """Return the mark of bytes that have no commit."""
    return hashlib.sha256(data).hexdigest()


def must_be_pushed(name: str, off: str = "") -> EnvironmentSourceError:
    """Return the error of a source that says what to evaluate; `off` says why that is not done here."""
    return EnvironmentSourceError(
        f"{name} says what to evaluate and not which paths that gives; evaluate it in CI and send the "
        "result: `drover build … --detach`, then `drover environments push NAME --submission ID`."
        f"{f' Here {off}' if off else ''}"
    )


def wishes_of(content: SourceContent, store_dir: StoreDir, system: str, *, evaluates: bool = False) -> WishList:
    """Return what a source wishes for; slow for large ones. `evaluates`: also attributes that are to be evaluated.

    Raises:
        WishListError: It cannot be read.
        EnvironmentSourceError: It must be evaluated, or wishes for nothing.
    """
    found = read_wishes(content.name, content.data, WishReading(store_dir, system))
    if not evaluates and any(isinstance(wish.target, WishedAttribute) for wish in found.wishes):
        raise must_be_pushed(content.name)
    if not found.wishes:
        raise EnvironmentSourceError(f"{content.name} names no package, so the environment stays as it is.")
    return found
