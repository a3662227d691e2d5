"""`drover sources`: fixed outputs that the farm could not do without."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.api.source_routes import SourceView
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.rendering import one_line
from coordinator.client.api_client import ApiClient

#: Sources that are shown in full.
LISTED = 50


async def sources(client: ApiClient, troubles: Sequence[str], *, as_json: bool) -> int:
    """Show the sources that are not here, and why."""
    found = await client.sources(troubles)
    if as_json:
        print_json({"sources": found})
    elif found:
        print_lines([line for each in found[:LISTED] for line in source_lines(each)])
        if len(found) > LISTED:
            print_lines([f"and {len(found) - LISTED} more; --json lists all"])
    else:
        print_lines(["every source that was wanted lately is here"])
    return exit_status.OK


def source_lines(each: SourceView) -> list[str]:
    """Render a source: what is wrong with it, what it is to hold, and where it was looked for."""
    lines = [f"{one_line(each.name)}  {each.trouble}"]
    if each.content:
        lines.append(f"  {each.content}")
    lines += [f"  from {one_line(url)}" for url in each.urls]
    if each.message:
        lines.append(f"  {one_line(each.message)}")
    return [*lines, *(f"  {one_line(answer)}" for answer in each.answers)]
