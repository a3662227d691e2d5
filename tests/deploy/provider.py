"""A provider of Terraform with a schema and nothing else: enough for `validate`, and tests with mocked providers.

Run by Terraform from a directory that stands in for a registry (`test_terraform.mirror`). `DEPLOY_PYTHON` names the
directory with gRPC and the messages of protocol 6.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ["DEPLOY_PYTHON"])
sys.path.insert(0, str(Path(os.environ["DEPLOY_PYTHON"], "pyvider", "protocols", "tfprotov6", "protobuf")))

import grpc  # type: ignore[import-untyped]
import tfplugin6_pb2 as wire  # type: ignore[import-not-found]
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

#: Nesting of blocks in the protocol.
LIST = 2
#: Blocks of the provider's own configuration, beside its attributes.
PROVIDER = {"attributes": {"region": {"type": "string"}}, "blocks": {"default_tags": {
    "many": False, "attributes": {"tags": {"type": ["map", "string"]}}, "blocks": {}}}}  # fmt: skip


def block(of: dict[str, Any]) -> Any:
    attributes = [
        wire.Schema.Attribute(
            name=name,
            type=json.dumps(one["type"]).encode(),
            required=one.get("required", False),
            optional=not one.get("required", False),
            computed=not one.get("required", False),
        )
        for name, one in of["attributes"].items()
    ]
    nested = [
        wire.Schema.NestedBlock(
            type_name=name,
            block=block(one),
            nesting=LIST,
            min_items=int(one.get("required", False)),
            max_items=0 if one["many"] else 1,
        )
        for name, one in of["blocks"].items()
    ]
    return wire.Schema.Block(attributes=attributes, block_types=nested)


def plain(of: dict[str, Any]) -> dict[str, Any]:
    """The provider's configuration, of which nothing is computed."""
    made = block(of)
    for attribute in made.attributes:
        attribute.computed = False
    return {"block": made}


def answers() -> dict[str, Any]:
    found = json.loads(Path(os.environ["DEPLOY_SCHEMA"]).read_text())
    schema = wire.GetProviderSchema.Response(
        provider=wire.Schema(**plain(PROVIDER)),
        resource_schemas={name: wire.Schema(block=block(one)) for name, one in found["resource"].items()},
        data_source_schemas={name: wire.Schema(block=block(one)) for name, one in found["data"].items()},
    )
    return {
        "GetProviderSchema": (wire.GetProviderSchema.Request, lambda _: schema),
        "ValidateProviderConfig": (
            wire.ValidateProviderConfig.Request,
            lambda _: wire.ValidateProviderConfig.Response(),
        ),
        "ValidateResourceConfig": (
            wire.ValidateResourceConfig.Request,
            lambda _: wire.ValidateResourceConfig.Response(),
        ),
        "ValidateDataResourceConfig": (
            wire.ValidateDataResourceConfig.Request,
            lambda _: wire.ValidateDataResourceConfig.Response(),
        ),
    }


def certificate() -> tuple[bytes, bytes, str]:
    """Return a key and a certificate for this connection, and the latter as the handshake has it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    der = base64.b64encode(made.public_bytes(serialization.Encoding.DER)).decode().rstrip("=")
    return private, made.public_bytes(serialization.Encoding.PEM), der


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    ended = threading.Event()
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            lambda request, _, answer=answer: answer(request),
            request_deserializer=request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name, (request, answer) in answers().items()
    }

    def shut_down(_request: bytes, _context: object) -> bytes:
        ended.set()
        return b""

    server.add_generic_rpc_handlers((
        grpc.method_handlers_generic_handler("tfplugin6.Provider", methods),
        grpc.method_handlers_generic_handler(
            "plugin.GRPCController", {"Shutdown": grpc.unary_unary_rpc_method_handler(shut_down)}
        ),
    ))  # fmt: skip
    private, public, der = certificate()
    # Not asked for the client's own: gRPC for Python would refuse Terraform's.
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(private, public)]))
    server.start()
    sys.stdout.write(f"1|6|tcp|127.0.0.1:{port}|grpc|{der}\n")
    sys.stdout.flush()
    ended.wait()
    server.stop(0)


if __name__ == "__main__":
    main()
