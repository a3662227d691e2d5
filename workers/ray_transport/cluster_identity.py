"""Identity of the Ray cluster at an address, which a head that was started again without its tables does not keep.

Every node looks again and again. Ray's own client would cost each of them half a second of processor and 50 MB, so the
one gRPC call is written here: a request of four HTTP/2 frames, and the one frame of the answer that counts (RFC 9113).
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import BinaryIO

#: Seconds for reaching the head's port, and for each part of its answer.
ANSWER_WITHIN_S = 10.0
#: More frames than an answer has: settings, their acknowledgement, a window, a ping, headers, the answer, trailers.
FRAMES = 32
#: The environment's name of the file that holds the token (`workers.ray_transport.access`).
TOKEN_VARIABLE = "RAY_AUTH_TOKEN_PATH"  # noqa: S105 - a name, no token

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_CALL = b"/ray.rpc.NodeInfoGcsService/GetClusterId"
_DATA, _HEADERS, _RESET, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_END_STREAM, _END_HEADERS = 1, 4
#: Field 2 of `GetClusterIdReply`: bytes, and how many.
_CLUSTER_ID = b"\x12\x1c"
_CLUSTER_ID_BYTES = 28


def cluster_at(address: str) -> str:
    """Return the id of the cluster whose head is at `host:port`; "" where none answers, or it refuses our token."""
    host, _, port = address.rpartition(":")
    try:
        token = Path(os.environ.get(TOKEN_VARIABLE, "")).read_bytes().strip()
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_WITHIN_S) as connection:
            connection.sendall(_request(address.encode(), token))
            with connection.makefile("rb") as answer:
                return _cluster_id(answer)
    except (OSError, ValueError):
        return ""


def cluster_lost(address: str) -> str:
    """Say that the head there is another than the farm's."""
    return f"the Ray head at {address} was started again without its tables and knows nothing of this farm's nodes"


def _request(authority: bytes, token: bytes) -> bytes:
    """Return a whole connection's requests: our settings, headers without any table or code, and an empty message."""
    headers = b"\x83\x86" + b"\x04" + _text(_CALL) + b"\x01" + _text(authority)
    for name, value in (
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"authorization", b"Bearer " + token),
    ):
        headers += b"\x00" + _text(name) + _text(value)
    return (
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, headers)
        + _frame(_DATA, _END_STREAM, 1, bytes(5))
    )


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _text(text: bytes) -> bytes:
    """Return a string of HPACK as it is (RFC 7541, 5.1 and 5.2)."""
    length = len(text)
    if length < 0x7F:
        return bytes((length,)) + text
    length -= 0x7F
    code = bytearray((0x7F,))
    while length >= 0x80:
        code.append(length % 0x80 | 0x80)
        length //= 0x80
    code.append(length)
    return bytes(code) + text


def _cluster_id(answer: BinaryIO) -> str:
    """Return the id in the answer, in hexadecimal; "" where it ends without one."""
    for _ in range(FRAMES):
        head = answer.read(9)
        payload = answer.read(int.from_bytes(head[:3], "big"))
        if len(head) < 9 or head[3] in {_RESET, _GOAWAY}:
            return ""
        of_call = int.from_bytes(head[5:9], "big") == 1
        if of_call and head[3] == _DATA and payload:
            # Fields stand in the order of their numbers, so the id is the last.
            found = payload[:-_CLUSTER_ID_BYTES].endswith(_CLUSTER_ID)
            return payload[-_CLUSTER_ID_BYTES:].hex() if found else ""
        if of_call and head[4] & _END_STREAM:
            return ""
    return ""
