"""Identity of the Ray cluster at an address, which a head that was started again without its tables does not keep."""

from __future__ import annotations

import socket

from workers.ray_transport.access import LISTEN_DEADLINE_S


def cluster_at(address: str) -> str:
    """Return the id of the cluster whose head is at `host:port`; "" where none answers."""
    from ray import exceptions  # noqa: PLC0415 - ray reads the environment when it is imported
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # noqa: PLC0415 - no public equal

    host, _, port = address.rpartition(":")
    try:
        # Ray itself takes 40 s to report that no process listens.
        with socket.create_connection((host.strip("[]"), int(port)), LISTEN_DEADLINE_S):
            pass
        return str(GcsClient(address=address).cluster_id)
    except (OSError, exceptions.RayError):
        return ""


def cluster_lost(address: str) -> str:
    """Say that the head there is another than the farm's."""
    return f"the Ray head at {address} was started again without its tables and knows nothing of this farm's nodes"
