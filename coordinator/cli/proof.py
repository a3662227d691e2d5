"""Proof that paths can be fetched: by a plain Nix client into an empty store, or by verification without Nix.

Either trusts the farm's public keys and nothing else of it. Nix fetches the whole closure into a store of its own
below a directory that is removed afterwards; what is for another system is fetched and verified and not run. Where no
Nix is installed, the closure is walked, signatures and NAR hashes are verified here, and no byte is kept.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from coordinator.api.models import FarmView
from infra.cache.pulls.upstream import Upstream, UpstreamError
from infra.nix.signing import PublicKey
from infra.nix.store_path import StoreDir
from infra.objects.errors import CacheError
from infra.process import ProcessError, run
from infra.records import record

#: Seconds for one `nix-store -r`, and paths that it is given.
FETCH_S: Final = 24 * 3600.0
FETCH_AT_ONCE: Final = 500
MAX_OUTPUT_BYTES: Final = 16 * 1024 * 1024
#: NARs that are verified here at one time, and paths of a closure.
VERIFYING: Final = 8
MAX_VERIFIED: Final = 100_000
_LINE: Final = 300


class ProofMeans(StrEnum):
    """Ways to prove."""

    #: Nix where it is installed, else `own`.
    AUTO = "auto"
    NIX = "nix"
    #: Signatures and NAR hashes, verified by this program.
    OWN = "own"
    NONE = "none"


@record(frozen=True, slots=True)
class ProofReport:
    """Result for some paths: which failed, and why; every other one is proven."""

    means: ProofMeans
    failed: Mapping[str, str]
    seconds: float = 0.0


def chosen(means: ProofMeans) -> ProofMeans:
    """Return the means that is used on this machine."""
    if means is ProofMeans.AUTO:
        return ProofMeans.NIX if shutil.which("nix-store") else ProofMeans.OWN
    return means


async def prove(farm: FarmView, token: str, paths: Sequence[str], means: ProofMeans, within: Path) -> ProofReport:
    """Prove that full store paths can be fetched with their closures from the farm's cache.

    Args:
        farm: Address and keys of the cache.
        token: For a cache that is not public; empty: none.
        paths: Of one system.
        means: Any but `AUTO`.
        within: An empty directory, which may be filled.
    """
    began = time.monotonic()
    if means is ProofMeans.NIX:
        failed = await _with_nix(farm, token, paths, within)
    elif means is ProofMeans.OWN:
        failed = await _by_hand(farm, token, paths)
    else:
        failed = {}
    return ProofReport(means, failed, time.monotonic() - began)


async def _with_nix(farm: FarmView, token: str, paths: Sequence[str], within: Path) -> dict[str, str]:
    netrc = within / "netrc"
    await asyncio.to_thread(_write_netrc, netrc, urlsplit(farm.cache_url).hostname or "", token)
    options = {
        "substituters": farm.cache_url,
        "trusted-public-keys": " ".join(farm.public_keys),
        "require-sigs": "true",
        "narinfo-cache-negative-ttl": "0",
        "max-jobs": "0",
        "fallback": "false",
        "build-users-group": "",
        "netrc-file": str(netrc),
    }
    words = [word for name, value in options.items() for word in ("--option", name, value)]
    store = ["--store", str(within / "store")]
    # Neither settings nor remembered narinfos of this machine count.
    env = {
        **os.environ,
        "HOME": str(within),
        "XDG_CACHE_HOME": str(within / "cache"),
        "NIX_CONFIG": "",
        "NIX_REMOTE": "",
    }
    failed: dict[str, str] = {}
    for start in range(0, len(paths), FETCH_AT_ONCE):
        part = list(paths[start : start + FETCH_AT_ONCE])
        try:
            fetched = await run(
                ["nix-store", "-r", "--keep-going", *part, *store, *words],
                env=env,
                timeout_s=FETCH_S,
                max_output_bytes=MAX_OUTPUT_BYTES,
            )
            if fetched.returncode == 0:
                continue
            asked = ["nix-store", "--check-validity", "--print-invalid", *part, *store, *words]
            checked = await run(asked, env=env, timeout_s=FETCH_S, max_output_bytes=MAX_OUTPUT_BYTES)
            invalid = set(checked.stdout.decode(errors="replace").split()) & set(part)
        except ProcessError as error:
            failed.update(dict.fromkeys(part, f"Nix could not be run: {error}"))
            continue
        said = _errors(fetched.stderr.decode(errors="replace"))
        # Nix says which one it could not have; where it does not, its first error stands for all.
        failed.update((path, next((line for line in said if path in line), said[0])) for path in invalid)
        if not invalid:
            failed.update(dict.fromkeys(part, said[0]))
    return failed


def _errors(text: str) -> list[str]:
    lines = [line.strip()[:_LINE] for line in text.splitlines() if line.startswith(("error", "warning", "       "))]
    return lines or [text.strip().splitlines()[-1][:_LINE] if text.strip() else "Nix ended without a word"]


def _write_netrc(file: Path, host: str, token: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as written:
        if token:
            written.write(f"machine {host} login drover password {token}\n")


async def _by_hand(farm: FarmView, token: str, paths: Sequence[str]) -> dict[str, str]:
    keys = [PublicKey.parse(text) for text in farm.public_keys]
    store_dir = StoreDir(farm.store_dir)
    async with Upstream(farm.cache_url, keys, store_dir, time.monotonic, token=token) as cache:
        faults: dict[str, str] = {}
        references: dict[str, tuple[str, ...]] = {}
        waiting = list(dict.fromkeys(paths))
        turns = asyncio.Semaphore(VERIFYING)

        async def verify(path: str) -> None:
            async with turns:
                inquiry = await cache.inquire(path)
                if inquiry.info is None:
                    faults[path] = inquiry.fault or f"{cache.url} does not have {path}"
                    return
                references[path] = inquiry.info.path.reference_paths
                try:
                    async with aclosing(cache.fetch(inquiry.info)) as pieces:
                        async for _ in pieces:
                            pass
                except (UpstreamError, CacheError) as error:
                    faults[path] = str(error)

        while waiting:
            if len(references) + len(faults) + len(waiting) > MAX_VERIFIED:
                return dict.fromkeys(paths, f"the closure has more than {MAX_VERIFIED} paths; prove it with Nix")
            async with asyncio.TaskGroup() as group:
                for path in waiting:
                    group.create_task(verify(path))
            level = {each for path in waiting for each in references.get(path, ())}
            waiting = [path for path in level if path not in references and path not in faults]
        return await asyncio.to_thread(_blamed, paths, references, faults)


def _blamed(paths: Sequence[str], references: Mapping[str, Sequence[str]], faults: Mapping[str, str]) -> dict[str, str]:
    """Return which of `paths` stand on a fault, and on which."""
    referrers: dict[str, list[str]] = {}
    for path, its in references.items():
        for reference in its:
            referrers.setdefault(reference, []).append(path)
    reached: dict[str, str] = {}
    stack = list(faults.items())
    while stack:
        path, fault = stack.pop()
        if path not in reached:
            reached[path] = fault
            stack += [(referrer, fault) for referrer in referrers.get(path, ())]
    return {path: reached[path] for path in paths if path in reached}


def empty_directory() -> tempfile.TemporaryDirectory[str]:
    """Return a directory for `prove`, which is removed after use: Nix makes what it fetches read-only."""
    return tempfile.TemporaryDirectory(prefix="drover-proof-", ignore_cleanup_errors=True)
