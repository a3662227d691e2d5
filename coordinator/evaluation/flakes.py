"""Flakes: which source of theirs is meant, and where their attributes stand."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import orjson

from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.messages import error_line
from coordinator.evaluation.model import join_attr, split_attr
from coordinator.evaluation.source import Asked, FlakeOrigin, NixValue, nix_text, store_root
from infra.decoding import decoder
from infra.process import ProcessError, ProcessNotFound, run
from infra.records import record

#: Outputs whose first names are systems.
PER_SYSTEM: Final = frozenset({"apps", "checks", "devShells", "legacyPackages", "packages"})
#: What is built of a flake where no output is named.
DEFAULT_OUTPUT: Final = "checks"
#: Seconds for what a flake fetches before it can be evaluated.
METADATA_S: Final = 600.0
MAX_METADATA_BYTES: Final = 16 * 1024 * 1024
#: What Nix prints of a git repository with changes.
_DIRTY: Final = re.compile(r"Git tree .* (?:is dirty|has uncommitted changes)")
#: What git says where it is the one that failed.
_FATAL: Final = re.compile(r"^fatal: (.+)$", re.MULTILINE)
_NIX: Final = ("nix", "--extra-experimental-features", "nix-command flakes")


@record(frozen=True, slots=True)
class _LockedInput:
    PASSES_OVER: ClassVar[bool] = True

    #: Name of an input -> its node, or the path to one.
    inputs: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    locked: dict[str, Any] = field(default_factory=dict)


@record(frozen=True, slots=True)
class _LockGraph:
    PASSES_OVER: ClassVar[bool] = True

    nodes: dict[str, _LockedInput] = field(default_factory=dict)
    root: str = "root"


@record(frozen=True, slots=True)
class _Metadata:
    PASSES_OVER: ClassVar[bool] = True

    url: str
    #: Store path of its files.
    path: str = ""
    resolved: dict[str, Any] = field(default_factory=dict)
    locks: _LockGraph = field(default_factory=_LockGraph)


async def flake_sources(
    text: str,
    systems: Sequence[str],
    *,
    flags: Sequence[str],
    env: Mapping[str, str],
    on_messages: Callable[[str], None],
) -> list[NixValue]:
    """Return what is to be evaluated of `REF#ATTR`: once for each system.

    An attribute without `#` or with nothing after it means `checks`. Others are looked for as `nix build` does: below
    the packages of the system, and then from the top.

    Raises:
        EvaluationError: The flake cannot be found or read.
    """
    reference, _, attr = text.partition("#")
    value = await flake_value(reference or ".", flags=flags, env=env, on_messages=on_messages)
    return [
        replace(value, name=text, asked=(_asked(attr, system, several=len(systems) > 1),), system=system)
        for system in systems
    ]


async def flake_value(
    reference: str, *, flags: Sequence[str], env: Mapping[str, str], on_messages: Callable[[str], None]
) -> NixValue:
    """Return a flake as a value of which nothing is asked yet.

    Raises:
        EvaluationError: The flake cannot be found or read.
    """
    metadata = await flake_metadata(reference, flags, env, on_messages)
    try:
        found: _Metadata = decoder(_Metadata)(orjson.loads(metadata))
    except (ValueError, TypeError, KeyError):
        raise EvaluationError(f"Nix says nothing of where the flake {reference} is") from None
    for directory in await asyncio.to_thread(_own_inputs, found, store_root(flags)):
        await _add_source(directory, flags, env)
    origin = FlakeOrigin(reference, metadata)
    return NixValue(reference, f"builtins.getFlake {nix_text(found.url)}", (), {}, "", tuple(flags), origin)


def _own_inputs(flake: _Metadata, root: str) -> list[Path]:
    """Return the directories of a flake that are locked inputs of it, as `path:./sub`.

    Nix before 2.26 fetches these where it locks them, and finds them in the store only after that.
    """
    files = Path(f"{root}{flake.path}").resolve()
    top = flake.locks.nodes.get(flake.locks.root, _LockedInput())
    nodes = [
        flake.locks.nodes.get(name, _LockedInput()).locked for name in top.inputs.values() if isinstance(name, str)
    ]
    found = []
    for locked in nodes:
        path = str(locked.get("path", ""))
        if locked.get("type") == "path" and "narHash" in locked and flake.path and not path.startswith("/"):
            directory = (files / str(flake.resolved.get("dir", "")) / path).resolve()
            if directory.is_relative_to(files) and directory.is_dir():
                found.append(directory)
    return found


async def _add_source(directory: Path, flags: Sequence[str], env: Mapping[str, str]) -> None:
    """Add a directory to the store under the name of all sources of flakes; Nix says it where that fails."""
    store = ("--store", flags[flags.index("--store") + 1]) if "--store" in flags else ()
    command = [*_NIX, "store", "add-path", "--name", "source", str(directory), *store]
    with suppress(ProcessError):
        await run(command, env=env, timeout_s=METADATA_S, max_output_bytes=MAX_METADATA_BYTES)


def _asked(attr: str, system: str, *, several: bool) -> Asked:
    names = split_attr(attr) or (DEFAULT_OUTPUT,)
    if names[0] not in PER_SYSTEM:
        label = f"{system}.{attr}" if several else attr
        return Asked(label, (("packages", system, *names), ("legacyPackages", system, *names), names))
    if len(names) > 1 and _is_system(names[1]):
        return Asked(attr, (names,))
    path = (names[0], system, *names[1:])
    return Asked(join_attr("", path), (path,))


def _is_system(name: str) -> bool:
    return name.rpartition("-")[2] in {"linux", "darwin", "freebsd"}


async def flake_metadata(
    reference: str, flags: Sequence[str], env: Mapping[str, str], on_messages: Callable[[str], None] = lambda _: None
) -> str:
    """Return what Nix says of a flake, as JSON: its URL and locks. A directory of a git repository is that repository.

    Raises:
        EvaluationError: The flake cannot be found or read.
    """
    command = [*_NIX, "flake", "metadata", "--json", "--no-write-lock-file", reference, *flags]
    try:
        done = await run(command, env=env, timeout_s=METADATA_S, max_output_bytes=MAX_METADATA_BYTES)
    except ProcessNotFound:
        raise EvaluationError("nix is not on PATH; install Nix on this machine to evaluate flakes") from None
    except ProcessError as error:
        raise EvaluationError(f"the flake {reference} could not be read: {error}") from None
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace")
        line = error_line(text) or f"Nix ended with status {done.returncode}"
        cause = _FATAL.search(text)
        raise EvaluationError(f"the flake {reference} could not be read: {line}" + (f" ({cause[1]})" if cause else ""))
    if _DIRTY.search(done.stderr.decode(errors="replace")):
        on_messages(
            f"the git tree of {reference} has changes that are not committed; they are built too, but no file that git "
            "does not know (git add)"
        )
    return done.stdout.decode(errors="replace").strip()
