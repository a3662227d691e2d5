"""Dry runs: what Nix itself says that it would build and fetch, of an expression or of the paths in a lock."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from coordinator.doctor.facts import Plan
from coordinator.wishes.model import MAX_FILE_BYTES, WishedPaths, WishList, WishListError
from coordinator.wishes.reading import WishReading, read_wishes
from infra.nix.store_path import StoreDir
from infra.process import ProcessError, run

#: Seconds for a dry run, which evaluates.
PLAN_S: Final = 600.0
MAX_OUTPUT_BYTES: Final = 16 * 1024 * 1024
#: Locks that other programs keep, by where they lie. A flake's own is Nix's to read.
LOCKS: Final = (".flox/env/manifest.lock", "manifest.lock", "devbox.lock")
#: Paths of one dry run: they are arguments of a command.
MAX_PATHS: Final = 10_000
_BUILT: Final = re.compile(r"^(?:this derivation|these (\d+) derivations) will be built:", re.MULTILINE)
_FETCHED: Final = re.compile(
    r"^(?:this path|these (\d+) paths) will be fetched(?: \((.*?) download, (.*?) unpacked\))?:", re.MULTILINE
)
_NOWHERE: Final = re.compile(r"^don't know how to build these paths.*?:\n((?:  /.*\n?)+)", re.MULTILINE)


async def dry_run(target: str, command: Sequence[str], directory: Path, env: Mapping[str, str]) -> Plan:
    """Return what a command of Nix says that it would do for a file of a directory."""
    plan, _ = await _run(target, command, directory, env)
    return plan


async def lock_plans(directory: Path, system: str, env: Mapping[str, str]) -> list[Plan]:
    """Return what Nix would do for each lock of a directory on a system, by the substituters in force."""
    found = []
    for name in LOCKS:
        file = directory / name
        if await asyncio.to_thread(file.is_file):
            found.append(await _lock_plan(name, file, system, env))
    return found


async def _lock_plan(name: str, file: Path, system: str, env: Mapping[str, str]) -> Plan:
    try:
        wishes = await asyncio.to_thread(_read, name, file, system)
    except (WishListError, OSError) as error:
        return Plan(name, trouble=str(error))
    names = {
        path: wish.name for wish in wishes.wishes if isinstance(wish.target, WishedPaths) for path in wish.target.paths
    }
    if len(names) > MAX_PATHS:
        return Plan(name, trouble=f"it has more than {MAX_PATHS} paths for {system}")
    unlocked = [wish.name for wish in wishes.wishes if not isinstance(wish.target, WishedPaths)]
    if not names:
        return Plan(name, built=len(unlocked), lacking=tuple(unlocked))
    plan, text = await _run(name, ["nix-store", "--realise", "--dry-run", *names], file.parent, env)
    nowhere = [line.strip() for part in _NOWHERE.findall(text) for line in part.splitlines()]
    lacking = dict.fromkeys([names[path] for path in nowhere if path in names] + unlocked)
    return replace(plan, built=plan.built + len(lacking), lacking=tuple(lacking))


def _read(name: str, file: Path, system: str) -> WishList:
    with file.open("rb") as lock:
        data = lock.read(MAX_FILE_BYTES + 1)
    return read_wishes(name, data, WishReading(StoreDir("/nix/store"), system, (system,)))


async def _run(target: str, command: Sequence[str], directory: Path, env: Mapping[str, str]) -> tuple[Plan, str]:
    try:
        done = await run(command, env=env, cwd=directory, timeout_s=PLAN_S, max_output_bytes=MAX_OUTPUT_BYTES)
    except ProcessError as error:
        return Plan(target, trouble=str(error)), ""
    text = done.stderr.decode(errors="replace")
    if done.returncode != 0:
        return Plan(target, trouble=last_line(done.stderr)), text
    built, fetched = _BUILT.search(text), _FETCHED.search(text)
    plan = Plan(
        target,
        built=0 if built is None else int(built[1] or 1),
        fetched=0 if fetched is None else int(fetched[1] or 1),
        download=(fetched[2] or "") if fetched else "",
        unpacked=(fetched[3] or "") if fetched else "",
    )
    return plan, text


def last_line(output: bytes) -> str:
    """Return the last error that a program printed, else its last line."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lstrip().startswith("error:")]
    return (errors or lines or ["it gave no reason"])[-1].strip()[:500]
