"""`drover demand`: what people wait for."""

from __future__ import annotations

import time
from collections.abc import Sequence

from coordinator.api.demand_routes import DemandView
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.rendering import duration, one_line, table_lines
from coordinator.client.api_client import ApiClient


async def demand(client: ApiClient, most: int, *, as_json: bool) -> int:
    """Show the paths that clients asked for and did not get."""
    found = await client.demand(most)
    if as_json:
        print_json({"demand": found})
    elif found:
        print_lines(demand_lines(found, time.time()))
    else:
        print_lines(["nothing was asked for in vain lately"])
    return exit_status.OK


def demand_lines(found: Sequence[DemandView], now: float) -> list[str]:
    """Render a list, the most wanted first."""
    rows: list[tuple[str, ...]] = [("people", "path", "system", "last", "state")]
    for each in found:
        path = one_line(each.path.rpartition("/")[2]) or f"{each.hash_part}-?"
        last = f"{duration(max(0.0, now - each.last_at))} ago"
        rows.append((str(each.people), path, one_line(each.system), last, standing(each)))
    return table_lines(rows)


def standing(each: DemandView) -> str:
    """Say how it stands with a path."""
    if not each.known:
        return "no derivation here makes it"
    state = each.state or "not submitted"
    return f"{state}; {one_line(each.note)}" if each.note else state
