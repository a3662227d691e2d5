"""Words of what is learned: builds that were timed, kinds of derivations, and whence an expectation comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from workers.wire.messages import NETWORK_FEATURE

#: Ends of names of what is fetched, and of what is written or changed rather than built.
FETCH_ENDINGS: Final = (
    *(".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.lz", ".tar.zst", ".tgz", ".zip", ".crate", ".gem", ".whl"),
    *(".jar", ".deb", ".rpm", "source"),
)
TRIVIAL_ENDINGS: Final = (".patch", ".diff", ".sh", ".txt", ".conf", ".json", ".nix", "-hook")


class WorkKind(StrEnum):
    """Kinds of derivations with works of their own, by what can be seen before anything is built."""

    FETCH = "fetch"
    TRIVIAL = "trivial"
    BUILD = "build"


class WorkSource(StrEnum):
    """Origins of an expectation, the best first."""

    DERIVATION = "derivation"
    PACKAGE = "package"
    OTHER_SYSTEM = "other_system"
    FEATURES = "features"
    KIND = "kind"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class TimedBuild:
    """A build that ended well. What was not measured of it is None."""

    package: str
    system: str
    worker: str
    seconds: float
    kind: WorkKind = WorkKind.BUILD
    #: Its most memory; 0: not measured.
    memory_bytes: int = 0
    #: Seconds that it waited for inputs, and bytes of those that it fetched; seconds of packing and sending outputs.
    fetch_s: float | None = None
    fetched_bytes: int | None = None
    upload_s: float | None = None
    #: Seconds of processors, and bytes of its outputs, unpacked.
    cpu_s: float | None = None
    output_bytes: int | None = None
    #: Key of its step, which the same derivation has again; "": not known.
    step: str = ""
    #: That its recipe asks for.
    features: tuple[str, ...] = ()


#: Package, system and kind: what is fetched may have the name of what is built of it.
Key = tuple[str, str, WorkKind]


def kind_of(name: str, *, fixed_output: bool = False) -> WorkKind:
    """Return the kind of a derivation by its name, and by whether its output is known to be fixed."""
    if fixed_output or name.endswith(FETCH_ENDINGS):
        return WorkKind.FETCH
    return WorkKind.TRIVIAL if name.endswith(TRIVIAL_ENDINGS) else WorkKind.BUILD


#: Kind of a package with its features, and those that tell it from others of its kind.
WorkClass = tuple[WorkKind, tuple[str, ...]]


def class_of(kind: WorkKind, features: Sequence[str]) -> WorkClass:
    """Return the class that a package is taken for where nothing is known of it: what needs the network is fetched."""
    if NETWORK_FEATURE in features:
        return WorkKind.FETCH, tuple([each for each in features if each != NETWORK_FEATURE])
    return kind, tuple(features)
