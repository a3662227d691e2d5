"""`drover capacity`: the slots and hours that the farm's open work could use."""

from __future__ import annotations

from coordinator.api.capacity_routes import CapacityView
from coordinator.cli import exit_status
from coordinator.cli.printing import print_json, print_lines
from coordinator.cli.rendering import duration, one_line, table_lines
from coordinator.client.api_client import ApiClient


async def capacity(client: ApiClient, *, as_json: bool) -> int:
    """Show it."""
    found = await client.capacity()
    if as_json:
        print_json(found)
    else:
        print_lines(capacity_lines(found))
    return exit_status.OK


def capacity_lines(found: CapacityView) -> list[str]:
    """Return a table by system, features and memory."""
    if not found.classes:
        return ["nothing waits or runs: the farm could use no worker"]
    rows = [("SYSTEM", "FEATURES", "MEMORY", "SLOTS", "PRESENT", "READY", "RUN", "WAIT", "WORK")]
    rows += [
        (
            one_line(each.system),
            one_line(", ".join(each.features)) or "-",
            f"{each.memory_bytes / (1 << 30):g} GiB" if each.memory_bytes else "-",
            str(each.slots),
            str(each.slots_present),
            str(each.ready),
            str(each.running),
            str(each.waiting),
            duration(each.hours * 3600),
        )
        for each in found.classes
    ]
    return table_lines(rows)
