"""What a cloud itself answers, for machines of tests: metadata, credentials of roles, secrets, a bucket's address.

One HTTP server as machines of EC2 have it at 169.254.169.254 (version 2, with tokens), with Secrets Manager on the same
address, for the stand-in of AWS' command (`AWS`). Who asks is known by the address; what a machine may do stands in the
policy of its role, as Terraform has planned it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

#: The command on machines, in the place of AWS' own.
AWS: Final = """#!/bin/sh
at=http://169.254.169.254/secrets/$4
case "$1 $2 $3" in
  "secretsmanager get-secret-value --secret-id") exec curl -fsS "$at" ;;
  "secretsmanager put-secret-value --secret-id") exec curl -fsS -X PUT --data-binary @- "$at" ;;
esac
echo "this stand-in does not know: aws $*" >&2
exit 2
"""
_BLOCK_BYTES: Final = 1 << 16


@dataclass(slots=True)
class Guest:
    """A machine as its cloud knows it."""

    address: str
    instance: str
    #: Statements of its role's policy.
    policy: list[dict[str, Any]]
    #: Metadata that not every machine has: a notice for a spot machine, say.
    metadata: dict[str, str] = field(default_factory=dict)

    def may(self, action: str, resource: str) -> bool:
        return any(
            one["Effect"] == "Allow" and action in one["Action"] and resource in one["Resource"] for one in self.policy
        )


@dataclass(slots=True)
class Cloud:
    """State of the cloud; its servers read it at every request."""

    archive: bytes
    #: Name of a secret -> its ARN.
    arns: Mapping[str, str]
    #: Keys of the bucket, which machines get by their role.
    access_key: str
    secret_key: str
    guests: dict[str, Guest] = field(default_factory=dict)
    secrets: dict[str, bytes] = field(default_factory=dict)
    #: What a policy refused.
    refused: list[tuple[str, str]] = field(default_factory=list)
    _tokens: set[str] = field(default_factory=set)

    def token(self) -> str:
        made = secrets.token_hex(8)
        self._tokens.add(made)
        return made

    def metadata(self, guest: Guest, token: str, path: str) -> str | None:
        """Return what a machine is told; None: nothing, of which it is told too. Raises `PermissionError`."""
        if token not in self._tokens:
            raise PermissionError
        role = "iam/security-credentials/"
        keys = {
            "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": self.access_key, "SecretAccessKey": self.secret_key,
            "Token": "", "LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2100-01-01T00:00:00Z",
        }  # fmt: skip
        told = {
            "local-ipv4": guest.address, "instance-id": guest.instance, role: "machine",
            f"{role}machine": json.dumps(keys), "autoscaling/target-lifecycle-state": "InService", **guest.metadata,
        }  # fmt: skip
        return told.get(path)

    def answer(self, guest: Guest, token: str, path: str, given: bytes | None) -> bytes | None:
        """Return what a machine gets for a path; None: nothing is there. Raises `PermissionError`."""
        if path == "/latest/api/token":
            return self.token().encode()
        if path.startswith("/secrets/"):
            return self.secret(guest, path.removeprefix("/secrets/"), given)
        told = self.metadata(guest, token, path.removeprefix("/latest/meta-data/"))
        return None if told is None else told.encode()

    def secret(self, guest: Guest, name: str, value: bytes | None = None) -> bytes | None:
        """Return a secret's value, which is set before where one is given. Raises `PermissionError`."""
        action = "secretsmanager:GetSecretValue" if value is None else "secretsmanager:PutSecretValue"
        if not guest.may(action, self.arns.get(name, name)):
            self.refused.append((guest.instance, name))
            raise PermissionError
        if value is not None:
            self.secrets[name] = value
        return self.secrets.get(name)


def _handler(cloud: Cloud) -> type[BaseHTTPRequestHandler]:
    class Asked(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            given = self.rfile.read(int(self.headers.get("Content-Length", "0"))) if self.command == "PUT" else None
            try:
                if self.path == "/drover.tar.gz":
                    body: bytes | None = cloud.archive
                else:
                    token = self.headers.get("X-aws-ec2-metadata-token", "")
                    body = cloud.answer(cloud.guests[self.client_address[0]], token, self.path, given)
            except PermissionError:
                return self.send_error(HTTPStatus.FORBIDDEN)
            self.send_response(HTTPStatus.NOT_FOUND if body is None else HTTPStatus.OK)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")
            return None

        do_PUT = do_GET  # noqa: N815 - the library's name

        def log_message(self, *_: object) -> None:
            pass

    return Asked


@contextmanager
def serving(cloud: Cloud, *sockets: socket.socket) -> Iterator[None]:
    """Answer on listening sockets meanwhile; one that is of TLS is a `ssl.SSLSocket`."""
    servers = []
    for listener in sockets:
        server = ThreadingHTTPServer(("", 0), _handler(cloud), bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        servers.append(server)
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def certificate(place: Path, name: str) -> tuple[Path, Path]:
    """Return the files of a certificate that signs itself, and of its key."""
    place.mkdir(exist_ok=True)
    made = place / "certificate.pem", place / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-out", made[0], "-keyout", made[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


def with_tls(listener: socket.socket, files: tuple[Path, Path]) -> ssl.SSLSocket:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files)
    return context.wrap_socket(listener, server_side=True, do_handshake_on_connect=True)


Dial = Callable[[], Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@contextmanager
def relayed(routes: Mapping[socket.socket, Dial]) -> Iterator[None]:
    """Hand each connection of a listening socket on to where its function dials: servers of this machine's network."""
    stop = asyncio.Event()
    running: Future[asyncio.AbstractEventLoop] = Future()

    async def run() -> None:
        servers = [
            await asyncio.start_server(partial(_relay, dial), sock=listener) for listener, dial in routes.items()
        ]
        running.set_result(asyncio.get_running_loop())
        await stop.wait()
        for server in servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    loop = running.result()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _relay(dial: Dial, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    there_reader, there_writer = await dial()
    try:
        await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
    except (OSError, asyncio.CancelledError):
        # The other side has gone, or the relay ends.
        pass
    finally:
        for one in (there_writer, writer):
            one.close()
            with suppress(OSError):
                await one.wait_closed()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read(_BLOCK_BYTES):
        writer.write(block)
        await writer.drain()
    writer.write_eof()
