"""Words of wish lists.

A *wish* is one package on one system, as its user calls it. Its target is known as store paths (of a lock), as a
derivation, or as an attribute that is yet to be evaluated. A *wish list* is what one source says, or several together:
at most one wish for each name and system.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import ClassVar, Final, TypeAlias

from coordinator.errors import CoordinatorError

#: Bytes of one source: locks of a thousand packages have some two million.
MAX_FILE_BYTES: Final = 50_000_000
#: Wishes, systems and sources of one list; outputs of one wish; characters of a name, of a path, of an installable.
MAX_WISHES: Final = 100_000
MAX_SYSTEMS: Final = 16
MAX_SOURCES: Final = 64
MAX_OUTPUTS: Final = 64
MAX_NAME: Final = 512
MAX_PATH: Final = 512
MAX_INSTALLABLE: Final = 4096
#: Sentences about what was merged or left out.
MAX_NOTES: Final = 100
#: Characters of a value that a sentence shows.
SHOWN: Final = 80
#: Systems that Nix knows of: a processor and one of these kernels.
_SYSTEM: Final = re.compile(
    r"[a-z0-9_]{1,32}-(linux|darwin|freebsd|netbsd|openbsd|cygwin|windows|solaris|redox|wasi|none|genode|mmixware)"
)


class WishListError(CoordinatorError):
    """A source of wishes cannot be read as one: a sentence with the place, and a way on."""

    code: ClassVar[str] = "wish_list"
    status: ClassVar[int] = 422

    def __init__(self, place: str, problem: str, way: str) -> None:
        """`place` is the source's name and, where known, the place in it; it may be of a stranger."""
        self.place = place
        super().__init__(f"{place}: {problem}; {way}")


class WishSource(StrEnum):
    """Forms of sources."""

    FLOX = "flox"
    DEVBOX = "devbox"
    FLAKE = "flake"
    FLAKE_LOCK = "flake-lock"
    PATHS = "paths"
    EVAL_JOBS = "nix-eval-jobs"
    FILE = "file"
    CONFIGURATION = "configuration"
    #: Several sources that were joined.
    SEVERAL = "several"


class WishMark(StrEnum):
    """Properties for which Nix refuses a package, as the lock or `meta` has them."""

    UNFREE = "unfree"
    INSECURE = "insecure"
    BROKEN = "broken"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class WishedOutput:
    """One output of a package; `path` is a full store path."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class WishedPaths:
    """Store paths that are wanted as they stand: what is published must be these."""

    #: Those that are to be installed, without repeats, in the source's order. Of a bare path: one, called `out`.
    outputs: tuple[WishedOutput, ...]
    #: Full path of the .drv, where the source has it. It need not be in any store.
    derivation: str | None = None
    #: Flake's attribute that gives these paths when evaluated, as `nix build` takes it; "" for a path that can only be
    #: copied.
    installable: str = ""
    #: Further outputs, which are not to be installed.
    others: tuple[WishedOutput, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The store paths that are to be installed."""
        return tuple(output.path for output in self.outputs)


@dataclass(frozen=True, slots=True)
class WishedDerivation:
    """A derivation that is wanted: full path of the .drv, and names of outputs (none: all)."""

    path: str
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WishedAttribute:
    """An attribute that is yet to be evaluated, of a flake or of a Nix file."""

    #: The flake's reference, or the file.
    source: str
    attribute: str
    is_flake: bool = True

    @property
    def installable(self) -> str:
        """The attribute as people write it: `REF#ATTR`, or `FILE -A ATTR`."""
        if self.is_flake:
            return f"{self.source}#{self.attribute}"
        return f"{self.source} -A {self.attribute}" if self.attribute else self.source


WishTarget: TypeAlias = WishedPaths | WishedDerivation | WishedAttribute


@dataclass(frozen=True, slots=True)
class Wish:
    """One package on one system."""

    #: The name that its user knows: the install id of a lock, an attribute.
    name: str
    system: str
    target: WishTarget
    #: Packages that are locked and upgraded together; "" where the source knows no groups.
    group: str = ""
    marks: frozenset[WishMark] = frozenset()
    version: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Name and system, of which a list has one wish."""
        return self.name, self.system


@dataclass(frozen=True, slots=True)
class WishList:
    """Wishes of one source, or of several that were joined."""

    #: The source as its user named it.
    place: str
    source: WishSource
    wishes: tuple[Wish, ...]
    #: Systems that were asked for, or that the source is for. A package need not have a wish on each.
    systems: tuple[str, ...]
    #: Version of the source's format; "" where it has none.
    version: str = ""
    #: Sentences about what was merged or left out.
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of what is wished for, in base 16: the same for files that say the same in another form."""
        content = [self.systems, *sorted(_content(wish) for wish in self.wishes)]
        return sha256(json.dumps(content, separators=(",", ":")).encode("ascii")).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of packages, in the source's order."""
        return tuple(dict.fromkeys(wish.name for wish in self.wishes))

    @property
    def paths(self) -> tuple[str, ...]:
        """Full store paths that are to be installed, of wishes whose paths are known."""
        found = [path for wish in self.wishes if isinstance(wish.target, WishedPaths) for path in wish.target.paths]
        return tuple(dict.fromkeys(found))


def _content(wish: Wish) -> list[object]:
    target = wish.target
    content: list[object]
    if isinstance(target, WishedPaths):
        pairs = [[[each.name, each.path] for each in group] for group in (target.outputs, target.others)]
        content = ["paths", *pairs, target.derivation or "", target.installable]
    elif isinstance(target, WishedDerivation):
        content = ["derivation", target.path, *target.outputs]
    else:
        content = ["attribute", target.source, target.attribute, target.is_flake]
    return [wish.name, wish.system, wish.group, sorted(wish.marks), wish.version, content]


def is_known_system(system: str) -> bool:
    """Return whether a name is one of a system: a processor, a dash and a kernel that Nix knows."""
    return _SYSTEM.fullmatch(system) is not None


def unique(place: str, wishes: Iterable[Wish]) -> tuple[tuple[Wish, ...], tuple[str, ...]]:
    """Return wishes without repeats, and notes about those.

    Raises:
        WishListError: Two wishes of one name and system differ, or there are too many.
    """
    found: dict[tuple[str, str], Wish] = {}
    notes: list[str] = []
    for wish in wishes:
        before = found.setdefault(wish.key, wish)
        if before is wish:
            if len(found) > MAX_WISHES:
                raise WishListError(place, f"it has more than {MAX_WISHES} packages", "divide it into several lists")
        elif before != wish:
            raise WishListError(
                place, f"{wish.name} is there twice for {wish.system}, and differently", "lock it again"
            )
        elif len(notes) < MAX_NOTES:
            notes.append(f"{wish.name} is there twice for {wish.system}; it counts once")
    return tuple(found.values()), tuple(notes)


def narrowed(wishes: WishList, systems: Sequence[str]) -> WishList:
    """Return a list for the systems that are asked for; without any, the list itself."""
    if not systems:
        return wishes
    wanted = frozenset(systems)
    return replace(
        wishes, wishes=tuple(wish for wish in wishes.wishes if wish.system in wanted), systems=tuple(systems)
    )


def joined(lists: Sequence[WishList]) -> WishList:
    """Return several lists as one.

    Raises:
        WishListError: Two of them want different things under one name on one system.
    """
    if len(lists) == 1:
        return lists[0]
    found: dict[tuple[str, str], tuple[Wish, str]] = {}
    notes = [note for each in lists for note in each.notes]
    for each in lists:
        for wish in each.wishes:
            before, place = found.setdefault(wish.key, (wish, each.place))
            if before.target != wish.target:
                raise WishListError(
                    each.place,
                    f"it and {place} disagree about {wish.name} on {wish.system}: "
                    f"{shown(before.target)} there, {shown(wish.target)} here",
                    "plan them one at a time, or lock them together",
                )
    places = ", ".join(each.place for each in lists)
    systems = dict.fromkeys(system for each in lists for system in each.systems)
    wishes = tuple(wish for wish, _ in found.values())
    if len(wishes) > MAX_WISHES:
        raise WishListError(places, f"they have more than {MAX_WISHES} packages together", "give fewer at once")
    return WishList(places, WishSource.SEVERAL, wishes, tuple(systems), notes=tuple(notes[:MAX_NOTES]))


def shown(target: WishTarget) -> str:
    """Return a target as a sentence names it."""
    match target:
        case WishedPaths(outputs=(first, *_)):
            return first.path
        case WishedPaths():
            return "no path"
        case WishedDerivation(path):
            return path
        case WishedAttribute():
            return target.installable
