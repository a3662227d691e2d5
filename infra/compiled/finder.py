"""Import of compiled modules in place of their sources, and of the native one, as long as these are what was compiled.

`./run compile` has each start of the environment's interpreter install the finder (`install`), which costs nothing
until a module is imported that may be compiled. Then the manifest of the build is read once, and the sources are
compared with it: by size and time of change, and by their hashes where these differ, as after a checkout to and fro. If
one differs, the whole build is stale and everything runs from source. Nothing large is imported here.

    drover compiled 2
    python 3.11.2 (main, …) [GCC 12.2.0]
    top /home/me/drover
    directory 0f3c…
    library 2051ca35633c938b6e67__mypyc
    suffix .cpython-311-x86_64-linux-gnu.so
    source 17012 1764500000000000000 9b74… scheduler/state.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Final

from infra.compiled.modules import MODULES, NATIVE

FORMAT: Final = "drover compiled 2"
MANIFEST: Final = "current"
#: Environment variable that has everything run from source where it is "no".
SWITCH: Final = "DROVER_COMPILED"
AGAIN: Final = "run ./run compile again"


class Manifest:
    """Record of all that a build was made of, as its file has it."""

    def __init__(self, text: str) -> None:
        """Read the file's text. Raises `ValueError` for what is no manifest of this format."""
        lines = text.splitlines()
        if not lines or lines[0] != FORMAT:
            raise ValueError("not a manifest of this format")
        pairs = [line.partition(" ") for line in lines[1:]]
        values = {key: value for key, _, value in pairs if key != "source"}
        self.python = values.get("python", "")
        self.top = values.get("top", "")
        self.directory = values.get("directory", "")
        self.library = values.get("library", "")
        self.suffix = values.get("suffix", "")
        #: Size, time of change in nanoseconds, SHA-256 and name of each source.
        self.sources: list[tuple[int, int, str, str]] = []
        for key, _, value in pairs:
            if key == "source":
                size, changed, digest, name = value.split(" ", 3)
                self.sources.append((int(size), int(changed), digest, name))

    def fault(self) -> str:
        """Return what is no longer as it was when the build was made; "" if everything is."""
        if self.python != sys.version:
            return "the interpreter is another one"
        for size, changed, digest, name in self.sources:
            path = f"{self.top}/{name}"
            try:
                found = os.stat(path)  # noqa: PTH116  pathlib is a third of what this costs at a start
            except OSError:
                return f"{name} is gone"
            if (found.st_size, found.st_mtime_ns) != (size, changed) and digest_of(path) != digest:
                return f"{name} has changed"
        return ""


class CompiledFinder:
    """Finder of the modules of one build, first in `sys.meta_path`."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._manifest: Manifest | None = None
        self._has_looked = False
        #: Why the build is not used; "" where it is, or where there is none.
        self.fault = ""

    def find_spec(self, name: str, path: Sequence[str] | None = None, _: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a module of the build is; None for all others, and where the build is not used."""
        if name not in _NAMES:
            # The library is imported by the modules alone, when it is known.
            if self._manifest is None or name != self._manifest.library:
                return None
            return self._spec(self._manifest, name)
        if not self._has_looked:
            self._has_looked = True
            self._look()
        found = self._manifest
        # Another checkout may stand first in `sys.path`.
        if found is None or path is None or f"{found.top}/{name.rpartition('.')[0].replace('.', '/')}" not in path:
            return None
        return self._spec(found, name)

    @property
    def is_used(self) -> bool:
        """True if modules of the build are imported, or would be."""
        if not self._has_looked:
            self._has_looked = True
            self._look()
        return self._manifest is not None

    def _look(self) -> None:
        if os.environ.get(SWITCH) == "no":
            return
        try:
            with open(f"{self._place}/{MANIFEST}", encoding="utf-8") as file:  # noqa: PTH123  as in `fault`
                found = Manifest(file.read())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self.fault = f"the manifest of the compiled build cannot be read ({error})"
            return
        self.fault = found.fault()
        if not self.fault:
            self._manifest = found

    def _spec(self, found: Manifest, name: str) -> ModuleSpec | None:
        file = f"{self._place}/{found.directory}/{name.replace('.', '/')}{found.suffix}"
        if not os.path.exists(file):  # noqa: PTH110  as in `fault`
            # An older build that a newer one has taken the place of; what was not imported of it comes from source.
            return None
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))


_NAMES: Final = frozenset((*MODULES, NATIVE))
#: The finder of this process; empty where the environment has no compiled build.
_installed: Final[list[CompiledFinder]] = []


def install(place: str) -> None:
    """Have this process import compiled modules from a directory, the last one that is named, if they are fresh."""
    while _installed:
        sys.meta_path.remove(_installed.pop())
    _installed.append(CompiledFinder(place))
    sys.meta_path.insert(0, _installed[0])


def is_compiled() -> bool:
    """Return whether this process runs compiled modules, or would, once they are imported."""
    return any(finder.is_used for finder in _installed)


def fault() -> str:
    """Return in one sentence why a build that there is does not run; "" if it does, or if there is none."""
    faults = [finder.fault for finder in _installed if not finder.is_used and finder.fault]
    return f"everything runs from source, because {faults[0]} since it was compiled: {AGAIN}" if faults else ""


def digest_of(path: str) -> str:
    """Return the SHA-256 of a file."""
    from hashlib import sha256  # noqa: PLC0415  needed only where a time of change differs

    with open(path, "rb") as file:  # noqa: PTH123  as in `fault`
        return sha256(file.read()).hexdigest()
