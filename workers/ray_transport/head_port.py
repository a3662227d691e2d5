"""Look at the port of a Ray head, before Ray is asked to connect to it."""

from __future__ import annotations

import asyncio
import contextlib
import os

from workers.ray_transport.access import RayNodeError

#: Seconds for reaching the head's port at all.
LISTEN_DEADLINE_S = 10.0


async def check_listens(address: str) -> None:
    """Check that a head listens at `host:port`, which Ray itself reports after 40 s. Raises `RayNodeError`."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(LISTEN_DEADLINE_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        raise RayNodeError(f"no Ray head answers at {address} within {LISTEN_DEADLINE_S:.0f} s") from None
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error)
        raise RayNodeError(f"no Ray head answers at {address}: {why}") from None
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
