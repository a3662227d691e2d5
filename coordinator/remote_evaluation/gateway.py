"""Way of a sandbox to the hosts that the operator allows: a SOCKS5 server at a socket that only the sandbox sees.

It connects a name of the list, and nothing else: a number is refused as a name. The name is looked up here, and what
it means must not be private, local or reserved (unless `network_allow` has it). The connection goes to the very address
that was looked at, so no second answer of a name server counts. A redirection is one more connection, and so must lead
to an allowed host too. What passes are bytes; nothing reads them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

#: Connections of one sandbox at one time.
MAX_CONNECTIONS: Final = 32
#: Seconds for a handshake, and for a connection.
HANDSHAKE_S: Final = 10.0
CONNECT_S: Final = 15.0
#: Seconds without a byte in either direction.
IDLE_S: Final = 300.0
_PIECE_BYTES: Final = 64 * 1024
_HOST: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?")
#: Networks that no public host has, beside those that Python calls private: metadata of clouds, translations of IPv4.
_NEVER: Final = tuple(map(ipaddress.ip_network, ("100.64.0.0/10", "168.63.129.16/32", "64:ff9b::/96", "2002::/16")))
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Of RFC 1928: version, no authentication, connect, kinds of addresses, replies.
_VERSION, _NO_AUTHENTICATION, _CONNECT, _NAME = 5, 0, 1, 3
_GRANTED, _NOT_ALLOWED, _UNREACHABLE = 0, 2, 4


class Gateway:
    """Rules of the way out."""

    def __init__(self, hosts: Sequence[str], allowed: Sequence[str] = ()) -> None:
        """`hosts`: names, or `NAME:PORT`; without a port 443. `allowed`: networks that are reached although private."""
        self._hosts = frozenset(each if ":" in each else f"{each}:443" for each in map(str.lower, hosts))
        self._allowed: tuple[_Network, ...] = tuple(map(ipaddress.ip_network, allowed))

    def allows_host(self, host: str, port: int) -> bool:
        """Return whether the operator allows a host."""
        return f"{host.lower().removesuffix('.')}:{port}" in self._hosts

    def allows_address(self, text: str) -> bool:
        """Return whether an address may be reached."""
        address: _Address = ipaddress.ip_address(text.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if any(address in network for network in self._allowed):
            return True
        public = address.is_global and not address.is_multicast and not address.is_reserved
        return public and not any(address in network for network in _NEVER)

    @asynccontextmanager
    async def serving(self, path: Path, owner: int) -> AsyncIterator[None]:
        """Serve at a socket for as long as the block runs; `owner` is who may connect, 0: this user."""
        tasks: set[asyncio.Task[None]] = set()
        listener = _listen(path, owner)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is None or len(tasks) >= MAX_CONNECTIONS:
                writer.close()
                return
            tasks.add(task)
            try:
                await self._serve(reader, writer)
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                pass  # the other end is gone
            finally:
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_unix_server(serve, sock=listener)
        try:
            yield
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(HANDSHAKE_S):
            _, count = await reader.readexactly(2)
            await reader.readexactly(count)
            writer.write(bytes([_VERSION, _NO_AUTHENTICATION]))
            _, command, _, kind = await reader.readexactly(4)
            # A number says nothing of who is meant, and is no name of the list.
            host, port = "", 0
            if kind == _NAME:
                host = (await reader.readexactly((await reader.readexactly(1))[0])).decode("ascii", "replace")
                port = int.from_bytes(await reader.readexactly(2), "big")
        if command != _CONNECT or not _HOST.fullmatch(host.lower()) or not self.allows_host(host, port):
            _log.info("a remote evaluation asked for %.80r, which is no allowed host", host)
            return await _refuse(writer, _NOT_ALLOWED)
        theirs = await self._connect(host, port)
        if theirs is None:
            return await _refuse(writer, _UNREACHABLE)
        writer.write(_reply(_GRANTED))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pass_on(reader, theirs[1]))
                group.create_task(_pass_on(theirs[0], writer))
        except BaseExceptionGroup:
            pass  # one end is gone, and the other goes with it
        finally:
            theirs[1].close()
        return None

    async def _connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        try:
            async with asyncio.timeout(CONNECT_S):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
                addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
                # One private answer among public ones is an attempt, not a choice.
                if not addresses or not all(map(self.allows_address, addresses)):
                    _log.warning("the allowed host %s means %s, which may not be reached", host, ", ".join(addresses))
                    return None
                for address in addresses:
                    with suppress(OSError):
                        return await asyncio.open_connection(address, port)
        except (OSError, TimeoutError, UnicodeError):
            pass
        return None


def _listen(path: Path, owner: int) -> socket.socket:
    """Return a socket at a path of any length, which `bind` would cut at 107 bytes."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        path.chmod(0o600)
        if owner:
            os.chown(path, owner, owner)
    finally:
        os.close(directory)
    listener.setblocking(False)
    return listener


def _reply(status: int) -> bytes:
    return bytes([_VERSION, status, 0, 1, 0, 0, 0, 0, 0, 0])


async def _refuse(writer: asyncio.StreamWriter, status: int) -> None:
    writer.write(_reply(status))
    await writer.drain()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        async with asyncio.timeout(IDLE_S):
            data = await reader.read(_PIECE_BYTES)
        if not data:
            break
        writer.write(data)
        await writer.drain()
    with suppress(OSError):
        writer.write_eof()
