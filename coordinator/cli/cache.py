"""Commands of `drover cache …`: one question to the coordinator, one answer printed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from coordinator.api.cache_models import CacheRootView, CollectView, VerifyView
from coordinator.api.requests import PinRequest
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines, size
from coordinator.cli.rendering import duration, table_lines
from coordinator.client.api_client import ApiClient

DAY_S: Final = 86400.0
#: Roots, keepers and faults listed; `--json` has all that the coordinator returns.
LISTED: Final = 50


async def info(client: ApiClient, cache: str, *, as_json: bool) -> int:
    """Show what a cache holds."""
    view = await client.cache(cache)
    if as_json:
        print_json(view)
        return exit_status.OK
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(view.roots.items())) or "none"
    print_lines(
        [
            f"paths         {view.paths:,}, of {size(view.nar_bytes)} unpacked",
            f"stored        {size(view.file_bytes)}; deduplication saves {size(view.saved_bytes)}",
            f"roots         {kinds}",
            f"leases        {view.leases:,}",
            f"tombstoned    {view.tombstoned:,} paths that wait for deletion",
            f"realisations  {view.realisations:,}",
            f"conflicts     {view.conflicts:,} paths were also offered with other bits",
            *(f"public key    {key}" for key in view.public_keys),
        ]
    )
    return exit_status.OK


async def roots(client: ApiClient, cache: str, *, as_json: bool) -> int:
    """List the roots of a cache."""
    found = await client.cache_roots(cache)
    if as_json:
        print_json({"roots": found})
    elif found:
        print_lines(table_lines(_root_rows(found[:LISTED], time.time())))
        if len(found) > LISTED:
            print_lines([f"and {len(found) - LISTED} more; --json lists all"])
    else:
        print_lines(["nothing is kept; pin something with `drover cache pin NAME PATH`"])
    return exit_status.OK


def _root_rows(found: Sequence[CacheRootView], now: float) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("kind", "name", "paths", "used", "expires")]
    for root in found:
        used = f"{duration(max(0.0, now - root.used_at))} ago" if root.used_at else "never"
        expires = f"in {duration(max(0.0, root.expires_at - now))}" if root.expires_at else "never"
        rows.append((root.kind, root.name, str(root.paths), used, expires))
    return rows


async def why(client: ApiClient, cache: str, path: str, *, as_json: bool) -> int:
    """Show what keeps a path."""
    view = await client.cache_why(cache, path)
    if as_json:
        print_json(view)
        return exit_status.OK
    lines = [] if view.published else [f"{view.path} is not published in this cache"]
    for keeper in view.keepers[:LISTED]:
        until = f", until {time.strftime('%Y-%m-%d %H:%M', time.localtime(keeper.expires_at))}" * bool(
            keeper.expires_at
        )
        lines.append(f"{keeper.kind} {keeper.name}{until}")
        lines += [f"  {'  ' * depth}{step}" for depth, step in enumerate(keeper.chain)]
    if not view.keepers:
        lines.append("no root keeps it: a collection may take it")
    print_lines(lines)
    return exit_status.OK


async def pin(
    client: ApiClient, cache: str, name: str, paths: Sequence[str], *, days: float | None, as_json: bool
) -> int:
    """Keep paths under a name."""
    expires_at = time.time() + days * DAY_S if days is not None else 0.0
    await client.pin(cache, name, PinRequest(paths=tuple(paths), expires_at=expires_at))
    if as_json:
        print_json({"pin": name, "paths": list(paths), "expires_at": expires_at})
    else:
        count = f"{len(paths)} path" + "s" * (len(paths) != 1)
        print_lines([f"pinned {count} as {name}; end it with `drover cache unpin {name}`"])
    return exit_status.OK


async def unpin(client: ApiClient, cache: str, name: str, *, as_json: bool) -> int:
    """Forget a pin."""
    await client.unpin(cache, name)
    if as_json:
        print_json({"unpinned": name})
    else:
        print_lines([f"unpinned {name}"])
    return exit_status.OK


async def gc(client: ApiClient, cache: str, *, dry_run: bool, as_json: bool) -> int:
    """Collect garbage."""
    view = await client.collect(cache, dry_run=dry_run)
    if as_json:
        print_json(view)
    else:
        print_lines(_collect_lines(view))
    return exit_status.OK


def _collect_lines(view: CollectView) -> list[str]:
    would = "would be " if view.dry_run else ""
    lines = [
        f"kept          {view.reachable:,} paths that a root, a lease or a running build needs",
        f"tombstoned    {view.tombstoned:,} paths {would}made invisible; deleted after the grace",
        f"deleted       {view.deleted_paths:,} paths, {view.deleted_objects:,} objects {would}deleted, "
        + size(view.deleted_bytes),
        f"orphans       {view.orphans:,} objects that no path names {would}swept",
    ]
    if view.expired_roots:
        lines.append(f"expired       {', '.join(view.expired_roots[:LISTED])}")
    return lines


async def verify(client: ApiClient, cache: str, *, full: bool, repair: bool, as_json: bool) -> int:
    """Check a cache; the status is 1 where something stays broken and visible."""
    view = await client.verify(cache, full=full, repair=repair)
    if as_json:
        print_json(view)
    else:
        print_lines(_verify_lines(view))
    return exit_status.OK if view.broken == view.repaired + view.hidden else exit_status.BUILD_FAILED


def _verify_lines(view: VerifyView) -> list[str]:
    lines = [f"checked {view.checked:,} paths in {duration(view.seconds)}: {view.broken:,} broken"]
    if view.broken:
        lines[0] += f", of which {view.repaired:,} repaired and {view.hidden:,} hidden from clients"
    lines += [f"{fault.path}: {fault.fault}; {fault.outcome}" for fault in view.faults[:LISTED]]
    if view.broken > view.repaired + view.hidden:
        lines.append("mend them with `drover cache verify --full --repair`")
    return lines


async def resign(client: ApiClient, cache: str, *, as_json: bool) -> int:
    """Sign everything anew."""
    view = await client.resign(cache)
    if as_json:
        print_json(view)
    else:
        keys = ", ".join(key.partition(":")[0] for key in view.public_keys)
        print_lines(
            [
                f"all is signed by {keys} and by nobody else",
                f"{view.narinfos:,} narinfos and {view.realisations:,} realisations had other signatures before",
            ]
        )
    return exit_status.OK
