"""Redis as the place of the head's tables: whether it can be used, and the settings that Ray gets for it.

Ray ends its head with a stack trace where Redis does not answer, so it is probed first. Ray would write the password
into the command lines of its processes, which everybody on the machine can read; it goes through a file in the node's
private directory instead (`workers.ray_transport.node_start`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from workers.ray_transport.access import RayNodeError

#: In a head's private directory (mode 0600): the password as gcs_server reads it (`--flagfile`).
FLAGS_FILE = "redis.flags"
_FLAG = "--redis_password="
#: Seconds for connecting, and for each answer.
ANSWER_WITHIN_S = 5.0


class RedisUnusableError(RayNodeError):
    """Redis cannot be reached, or does not take us."""


@dataclass(frozen=True, slots=True)
class RedisStore:
    """`address` is `host:port`; farms that share a Redis have different `namespace`s."""

    address: str
    namespace: str
    #: Empty: Redis wants none.
    password: str = field(default="", repr=False)

    def env(self) -> dict[str, str]:
        """Return the head's environment for Redis; nothing of it is secret."""
        return {"RAY_REDIS_ADDRESS": self.address, "RAY_external_storage_namespace": self.namespace}

    def write_flags(self, directory: Path) -> None:
        """Leave the password where the head's processes find it."""
        file = directory / FLAGS_FILE
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as flags:
            flags.write(f"{_FLAG}{self.password}\n" if self.password else "")


def read_password(flags: Path) -> str:
    """Return the password from a file that `write_flags` left."""
    return flags.read_text().removeprefix(_FLAG).rstrip("\n")


async def check_redis(store: RedisStore) -> None:
    """Raise `RedisUnusableError` with one sentence where Redis does not answer or does not take the password."""
    host, _, port = store.address.rpartition(":")
    where = f"the Redis at {store.address}, where the Ray head keeps its tables,"
    commands = [*([("AUTH", store.password)] if store.password else []), ("PING",)]
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            for command in commands:
                writer.write(_request(command))
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    answer = (await reader.readline()).decode("utf-8", "replace").strip()
                if answer.startswith("-"):
                    raise RedisUnusableError(f"{where} refuses: {answer[1:]}")
                if not answer.startswith("+"):
                    raise RedisUnusableError(f"{where} does not answer as Redis does")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    except TimeoutError:
        raise RedisUnusableError(f"{where} does not answer within {ANSWER_WITHIN_S:.0f} s") from None
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        raise RedisUnusableError(f"{where} cannot be reached: {why}") from None


def _request(words: tuple[str, ...]) -> bytes:
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
