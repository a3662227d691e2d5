"""Keys of evaluations that depend on nothing but what can be named: a locked flake, or the content of a directory.

Such an evaluation runs under `restrict-eval`: what lies outside of its source is an error of Nix, upon which it runs
again without, and is not kept. What Nix answers silently otherwise is looked for in the files (`source_tree`). The key
is the digest of the source, what is asked of it, Nix with its settings, and our own part of the evaluation.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import orjson

from coordinator.evaluation.cache import FORM
from coordinator.evaluation.source import TREE, FlakeOrigin, NixValue, TreeOrigin, store_root
from coordinator.evaluation.source_tree import NotWholeError, SourceTree, find_clock, read_tree, text_leak, tree_root
from infra.decoding import decoder
from infra.nix.errors import NixError
from infra.nix.hashing import parse_sha256
from infra.nix.store_path import StoreDir
from infra.process import ProcessError, run
from infra.records import record

#: What Nix prints where an evaluation needs what it may not have.
NEEDS_MORE: Final = re.compile(r"forbidden in restricted mode|was not found in the Nix search path")
_SETTINGS_S: Final = 60.0
_MAX_SETTINGS_BYTES: Final = 16 * 1024 * 1024
_NIX: Final = ("nix", "--extra-experimental-features", "nix-command flakes")
#: The name that every Nix takes, though newer ones say that it is old, and the one that Nix has had since 2.19.
_SHOW_SETTINGS: Final = (("show-config",), ("config", "show"))


@record(frozen=True, slots=True)
class _LockedNode:
    PASSES_OVER: ClassVar[bool] = True

    locked: dict[str, Any] = field(default_factory=dict)


@record(frozen=True, slots=True)
class _FlakeLocks:
    PASSES_OVER: ClassVar[bool] = True

    nodes: dict[str, _LockedNode]


@record(frozen=True, slots=True)
class _LockedFlake:
    PASSES_OVER: ClassVar[bool] = True

    path: str
    locks: _FlakeLocks


@record(frozen=True, slots=True)
class KeyedSource:
    """A source whose findings may be kept."""

    key: str
    #: The source as it is evaluated, with nothing else within its reach.
    source: NixValue
    tree: SourceTree | None = None


def restricted(source: NixValue, *paths: str) -> NixValue:
    """Return a source that may read `paths`, its flake and stores, and nothing else."""
    words = [word for number, path in enumerate(paths) for word in ("-I", f"drover-{number}={path}")]
    own = ("-I", f"drover-tree={TREE.parent}", "--option", "restrict-eval", "true")
    return replace(source, flags=(*source.flags, *words, *own))


async def keyed(source: NixValue, program: str, env: Mapping[str, str]) -> KeyedSource | None:
    """Return a source with its key; None where its findings depend on what has no name.

    Args:
        source: What is evaluated.
        program: Name of the program that evaluates.
        env: Whole environment of the evaluation.
    """
    if isinstance(source.origin, TreeOrigin) and _reaches_out(source):
        return None
    # Nix is asked while the files are read.
    asking = asyncio.create_task(_settings(source.all_flags, env), name="settings of Nix")
    try:
        match source.origin:
            case FlakeOrigin(_, metadata):
                known, tree = json.loads(metadata), None
                confined = restricted(source)
            case TreeOrigin(directory):
                tree = await asyncio.to_thread(_read, directory)
                if tree.leak:
                    return None
                known = {"root": str(tree.root), "directory": str(directory), "digest": tree.digest}
                top = [str(tree.root / name) for name in tree.top]
                confined = restricted(source, *(top if (tree.root / ".git").exists() else [str(tree.root)]))
            case _:
                return None
        settings, where = await asking, await asyncio.to_thread(_place_of, program, env)
    except NotWholeError:
        return None
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    if settings is None or where is None:
        return None
    parts = (
        FORM,
        json.dumps(known, sort_keys=True),
        repr((source.expression, source.asked, sorted(source.arguments.items()), source.system, source.flags)),
        settings,
        repr(sorted((name, value) for name, value in env.items() if name.startswith("NIX"))),
        where,
        TREE.read_text(encoding="utf-8"),
    )
    digest = hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
    return KeyedSource(digest, confined, tree)


async def may_be_kept(keyed_source: KeyedSource, env: Mapping[str, str]) -> bool:
    """Return whether nothing has changed while a source was evaluated, and none of its files asks for the time."""
    source = keyed_source.source
    try:
        match source.origin:
            case TreeOrigin(directory):
                return await asyncio.to_thread(_read, directory) == keyed_source.tree
            case FlakeOrigin(reference, metadata):
                from coordinator.evaluation.flakes import flake_metadata  # noqa: PLC0415 - few sources are flakes

                if await flake_metadata(reference, source.flags, env) != metadata:
                    return False
                return await asyncio.to_thread(_asks_no_clock, metadata, source.flags)
            case _:
                return False
    except (NotWholeError, NixError, ValueError, TypeError, KeyError):
        return False


def without_search_path(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for an evaluation within reach of nothing but its source."""
    return {name: value for name, value in env.items() if name != "NIX_PATH"}


def _read(directory: Path) -> SourceTree:
    return read_tree(tree_root(directory.resolve()))


def program_of(name: str, env: Mapping[str, str]) -> str | None:
    """Return where a program lies on the PATH of an environment; None: nowhere."""
    for directory in env.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory, name)  # noqa: PTH118 - some thirty questions, no object of a path for each
        if os.access(path, os.X_OK) and not os.path.isdir(path):  # noqa: PTH112
            return path
    return None


def _place_of(program: str, env: Mapping[str, str]) -> str | None:
    found = program_of(program, env)
    return found and str(Path(found).resolve())


def _reaches_out(source: NixValue) -> bool:
    texts = (source.expression, *source.arguments.values())
    return "-I" in source.flags or any(text_leak(text) for text in texts)


def _asks_no_clock(metadata: str, flags: Sequence[str]) -> bool:
    """Return whether no file of a flake and of all its inputs asks for the time, as far as the store has them all."""
    flake: _LockedFlake = decoder(_LockedFlake)(orjson.loads(metadata))
    root = store_root(flags)
    store = StoreDir(flake.path.rpartition("/")[0])
    paths = [flake.path]
    for node in flake.locks.nodes.values():
        if node.locked:
            digest = parse_sha256(str(node.locked.get("narHash", "")))
            paths.append(store.make_fixed_output_path("source", "r:", "sha256", digest.hex()))
    for path in paths:
        place = Path(f"{root}{path}")
        if not place.exists() or find_clock(place):
            return False
    return True


async def _settings(flags: Sequence[str], env: Mapping[str, str]) -> str | None:
    """Return Nix's version and the values of all its settings; None where it does not say them."""
    options = [word for at, word in enumerate(flags) if word == "--option" for word in flags[at : at + 3]]
    shows = [[*_NIX, *words, "--json", *options] for words in _SHOW_SETTINGS]
    # Both at one time: most of what each takes is its start.
    version, settings = await asyncio.gather(_said([*_NIX, "--version"], env), _said(shows[0], env))
    for command in shows[1:]:
        settings = settings or await _said(command, env)
    try:
        values = {name: each.get("value") for name, each in orjson.loads(settings or b"").items()}
    except (ValueError, AttributeError):
        return None
    return version.decode() + json.dumps(values, sort_keys=True) if version else None


async def _said(command: Sequence[str], env: Mapping[str, str]) -> bytes:
    """Return what a command prints; nothing where it fails."""
    try:
        done = await run(command, env=env, timeout_s=_SETTINGS_S, max_output_bytes=_MAX_SETTINGS_BYTES)
    except ProcessError:
        return b""
    return done.stdout if done.returncode == 0 else b""
