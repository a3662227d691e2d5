"""Providers of Terraform with a schema and nothing else: enough for `validate`, and tests with mocked providers.

`provider.py PROVIDERS` serves all until its standard input ends; the argument is a list of {source, schema (a file),
configuration (the schema of the provider's own)}. It prints what Terraform wants as TF_REATTACH_PROVIDERS, with which
it starts none itself: a start takes Python a second, and Terraform makes dozens in a test. `DEPLOY_PYTHON` names the
directory with gRPC and the messages of protocol 6.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, os.environ["DEPLOY_PYTHON"])
sys.path.insert(0, str(Path(os.environ["DEPLOY_PYTHON"], "pyvider", "protocols", "tfprotov6", "protobuf")))

import grpc  # type: ignore[import-untyped]
import tfplugin6_pb2 as wire  # type: ignore[import-not-found]

#: Nesting of blocks in the protocol.
LIST = 2


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


def answers(file: str, configuration: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(Path(file).read_text())
    schema = wire.GetProviderSchema.Response(
        provider=wire.Schema(**plain(configuration)),
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


def served(file: str, configuration: dict[str, Any]) -> tuple[Any, int]:
    """Return a server of one provider, and its port."""
    server = grpc.server(ThreadPoolExecutor(4))
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            lambda request, _, answer=answer: answer(request),
            request_deserializer=request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        for name, (request, answer) in answers(file, configuration).items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tfplugin6.Provider", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


def main() -> None:
    servers = [(one["source"], *served(one["schema"], one["configuration"])) for one in json.loads(sys.argv[1])]
    reattach = {
        f"registry.terraform.io/{source}": {
            "Protocol": "grpc", "ProtocolVersion": 6, "Pid": os.getpid(), "Test": True,
            "Addr": {"Network": "tcp", "String": f"127.0.0.1:{port}"},
        }
        for source, _, port in servers
    }  # fmt: skip
    sys.stdout.write(f"{json.dumps(reattach)}\n")
    sys.stdout.flush()
    sys.stdin.read()
    for _, server, _ in servers:
        server.stop(0)


if __name__ == "__main__":
    main()
