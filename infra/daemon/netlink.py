"""Addresses and routes of a network namespace, by rtnetlink(7).

A socket belongs to the namespace in which it was opened. This file stands alone, as `owner.py` does.
"""

from __future__ import annotations

import _socket
import os
import struct
from collections.abc import Iterator
from typing import Final

#: Subscription of changes to IPv4 addresses.
IPV4_ADDRESSES: Final = 0x10
#: Bytes of one answer of the kernel; it never sends more than 32 KiB at once.
ANSWER_BYTES: Final = 65_536
_ROUTE: Final = 0
_NEW_LINK, _NEW_ROUTE, _GET_ADDRESSES = 16, 24, 22
_ERROR, _DONE, _NEW_ADDRESS = 2, 3, 20
_REQUEST, _ACKNOWLEDGE, _DUMP, _REPLACE, _CREATE = 0x1, 0x4, 0x300, 0x100, 0x400
_UP: Final = 1
_LOOPBACK_INDEX: Final = 1
_UNICAST, _PROHIBIT = 1, 8
_MAIN_TABLE, _STATIC = 254, 4
_DESTINATION, _GATEWAY = 1, 5
#: Attributes of an address: its own, or on a link between two its own beside the peer's.
_ADDRESS, _LOCAL = 1, 2


def open_socket(groups: int = 0) -> _socket.socket:
    """Open a socket in the namespace of this thread, which receives changes to the groups."""
    made = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, _ROUTE)
    made.bind((0, groups))
    return made


def ipv4_addresses() -> list[str]:
    """Return the IPv4 addresses of all interfaces, without the loopback's. Raises OSError."""
    found = []
    for kind, body in _ask(_GET_ADDRESSES, _DUMP, struct.pack("BBBBI", _socket.AF_INET, 0, 0, 0, 0)):
        if kind == _NEW_ADDRESS:
            attributes = dict(_attributes(body[8:]))
            packed = attributes.get(_LOCAL) or attributes.get(_ADDRESS)
            if packed and len(packed) == 4 and packed[0] != 127:
                found.append(_socket.inet_ntoa(packed))
    return found


def raise_loopback() -> None:
    """Bring the loopback interface up. Raises OSError."""
    _ask(_NEW_LINK, _ACKNOWLEDGE, struct.pack("BxHiII", 0, 0, _LOOPBACK_INDEX, _UP, _UP))


def prohibit(network: str) -> None:
    """Let nothing reach an IPv4 network (`a.b.c.d/n`); longer routes go before. Raises OSError."""
    _add_route(network, _PROHIBIT, b"")


def allow(network: str, gateway: str) -> None:
    """Send what goes to an IPv4 network through a gateway, whatever shorter routes prohibit. Raises OSError."""
    _add_route(network, _UNICAST, _attribute(_GATEWAY, _socket.inet_aton(gateway)))


def _add_route(network: str, kind: int, gateway: bytes) -> None:
    address, _, length = network.partition("/")
    head = struct.pack("BBBBBBBBI", _socket.AF_INET, int(length or "32"), 0, 0, _MAIN_TABLE, _STATIC, 0, kind, 0)
    body = head + _attribute(_DESTINATION, _socket.inet_aton(address)) + gateway
    _ask(_NEW_ROUTE, _ACKNOWLEDGE | _REPLACE | _CREATE, body)


def _ask(kind: int, flags: int, body: bytes) -> list[tuple[int, bytes]]:
    """Return the messages of the kernel's answer as (kind, body)."""
    connection = open_socket()
    try:
        connection.send(struct.pack("IHHII", 16 + len(body), kind, _REQUEST | flags, 1, 0) + body)
        answers: list[tuple[int, bytes]] = []
        while True:
            data = connection.recv(ANSWER_BYTES)
            while data:
                length, message_kind = struct.unpack_from("IH", data)
                answers.append((message_kind, data[16:length]))
                data = data[(length + 3) & ~3 :]
            last, body = answers[-1]
            if last == _ERROR:
                (number,) = struct.unpack_from("i", body)
                if number:
                    raise OSError(-number, os.strerror(-number))
            if last in {_ERROR, _DONE}:
                return answers
    finally:
        connection.close()


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("HH", data)
        if length < 4:
            return
        yield kind, data[4:length]
        data = data[(length + 3) & ~3 :]
