"""Wish lists of a command's arguments: files are found and read, attributes are evaluated."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from coordinator.cli.evaluation import EvaluationRequest, inputs_of
from coordinator.client.closure import LocalStore, local_store
from coordinator.evaluation.wished import described, evaluated
from coordinator.wishes.model import MAX_FILE_BYTES, MAX_SOURCES, WishList, WishListError, WishSource, joined
from coordinator.wishes.reading import NAMED, WishReading, flake_of, named_wishes, read_wishes, source_by_name
from infra.nix.store_path import StoreDir
from infra.records import record

STDIN: Final = "-"
#: Files of a directory that say what it needs, the first that is there.
OF_A_DIRECTORY: Final = (".flox/env/manifest.lock", "devbox.lock", "flake.lock", "flake.nix", "default.nix")
_MACHINES: Final = {"arm64": "aarch64", "amd64": "x86_64"}


@record(frozen=True, slots=True)
class WishRequest:
    """Arguments that name wish lists."""

    #: Files, directories, flakes' outputs, store paths, or `-`; none: this directory.
    sources: tuple[str, ...]
    #: `attrs`, `systems` and the flags are those of the wishes too.
    evaluation: EvaluationRequest
    #: Form of every source; None: found by name and content.
    kind: WishSource | None = None
    settings: tuple[str, ...] = ()
    store: str | None = None


def this_system() -> str:
    """Return the system of this machine, as Nix calls it."""
    machine = os.uname()
    return f"{_MACHINES.get(machine.machine, machine.machine)}-{machine.sysname.lower()}"


async def wishes_of(request: WishRequest, on_messages: Callable[[str], None]) -> WishList:
    """Read the lists, join them, and evaluate what is yet to be evaluated.

    Raises:
        WishListError: A source is not there or cannot be read as what it is, or two contradict each other.
        EvaluationError: What is to be evaluated is not there.
    """
    store = local_store(request.store)
    found = await asyncio.to_thread(read_lists, request, store)
    _, means = inputs_of(request.evaluation, request.settings, request.store, on_messages)
    flags = (*request.evaluation.flags, *request.settings, *store.flags)
    whole = await evaluated(found, means, flags=flags, read=store.read)
    return await asyncio.to_thread(described, whole, store.read)


def read_lists(request: WishRequest, store: LocalStore) -> WishList:
    """Read the lists and join them; what it raises is as for `wishes_of`."""
    evaluation = request.evaluation
    store_dir = StoreDir(store.store_dir)
    reading = WishReading(store_dir, this_system(), evaluation.systems, request.kind, evaluation.attrs)
    paths = [text for text in request.sources if text.startswith(f"{store.store_dir}/") and "#" not in text]
    files = [text for text in request.sources or (".",) if text not in paths]
    if len(files) > MAX_SOURCES:
        raise WishListError(files[MAX_SOURCES], f"there are more than {MAX_SOURCES} sources", "join some of them")
    lists = [_read(text, reading) for text in files]
    if paths:
        lists.append(read_wishes("the paths", "\n".join(paths).encode(), reading))
    return joined(lists)


def lock_of(directory: Path) -> Path | None:
    """Return the file of a directory that says what it needs, None where there is none."""
    return next((directory / name for name in OF_A_DIRECTORY if (directory / name).is_file()), None)


def _read(text: str, reading: WishReading) -> WishList:
    if text == STDIN:
        return read_wishes("standard input", sys.stdin.buffer.read(MAX_FILE_BYTES + 1), reading)
    path = Path(text)
    if path.is_dir():
        found = lock_of(path)
        if found is None:
            raise WishListError(text, f"it has none of {', '.join(OF_A_DIRECTORY)}", "name what you wish for")
        if found.name == "flake.nix":
            return named_wishes(f"{flake_of(path)}#", reading, source=WishSource.FLAKE)
        path = found
    source = reading.source or source_by_name(text if "#" in text else str(path))
    if source in NAMED and ("#" in text or path.exists()):
        return named_wishes(text if "#" in text else str(path), reading, source=source)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise WishListError(text, "it does not exist", "name a lock, a list, a Nix file or FLAKE#ATTR") from None
    except OSError as error:
        raise WishListError(text, f"it cannot be read ({error.strerror})", "name another file") from None
    return read_wishes(str(path), data, reading)


def present_paths(wishes: WishList, store: LocalStore) -> tuple[str, ...]:
    """Return those store paths of a list that are on this machine."""
    return tuple(path for path in wishes.paths if store.has(path))


def command_flags(args: Sequence[tuple[str, str]], argstrs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return `--arg` and `--argstr` words."""
    pairs = [("--arg", *each) for each in args] + [("--argstr", *each) for each in argstrs]
    return tuple(word for pair in pairs for word in pair)
