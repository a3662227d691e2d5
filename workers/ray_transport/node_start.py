"""Program that starts the Ray servers of one node, and then becomes their leader (`workers.ray_transport.node_leader`).

It does what `ray start --block` does, through the same class of Ray, and leaves out what a farm does not use. Of the
Python programs that Ray starts beside its two servers none remains: they cost a second of processor and 60 MB each.

* The raylet's two agents, for metrics and for environments that jobs bring along, are stand-ins that end with it: a
  raylet does not start without them. The farm's agents run in the installation's own environment.
* The head has no API server. Its raylet ends once it has joined: nodes of before 2026-11-30 ask the tables for a head's
  directories, and take them of one that has ended too; nothing else needs it.
* The servers' timed waits have slack (`timer_slack`).
* Ray's libraries go with the exec: what waits for the servers' end is a small program.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from workers.ray_transport import node_leader
from workers.ray_transport.redis import FLAGS_FILE, read_password
from workers.ray_transport.timer_slack import with_ray_slack

#: Ray refuses less than 75 MiB; messages up to 100 KiB do not touch the object store at all.
OBJECT_STORE_BYTES = 80 * 1024 * 1024
#: Waits for the end of its input, a pipe from the raylet.
_STAND_IN: Final = '/bin/sh -ec "read line"'
#: No process listens there. Without a number the raylet waits for one from the agent.
_NO_PORT: Final = "1"
_RAYLET_OPTIONS: Final = {
    "--dashboard_agent_command": _STAND_IN,
    "--runtime_env_agent_command": _STAND_IN,
    "--metrics-agent-port": _NO_PORT,
    "--metrics_export_port": _NO_PORT,
    "--runtime_env_agent_port": _NO_PORT,
    "--dashboard_agent_listen_port": _NO_PORT,
}


def main(arguments: Sequence[str]) -> None:
    """Start the node; ends with an exception where Ray cannot."""
    parser = argparse.ArgumentParser(prog="drover-ray-node")
    role = parser.add_mutually_exclusive_group(required=True)
    role.add_argument("--port", type=int, help="be a head, and listen there")
    role.add_argument("--head", help="host:port of the head to join")
    parser.add_argument("--temp-dir", required=True, help="Ray's own files")
    parser.add_argument("--host", required=True, help="address to listen on")
    parser.add_argument("--name", default="", help="name of the node")
    parser.add_argument("--label", action="append", default=[], help="KEY=VALUE, may be repeated")
    parser.add_argument("--resource", action="append", default=[], help="NAME=NUMBER, for autoscalers; as --label")
    options = parser.parse_args(arguments)

    from ray._private.node import Node  # noqa: PLC0415 - the helpers above are used without Ray too
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET  # noqa: PLC0415

    params = _parameters(options)
    _leave_out_agents()
    is_head = options.port is not None
    if is_head:
        _use_redis_password(params)
    else:
        _ask_for_no_head()
    # Its exit would end the servers on a Mac, where Ray has a process that watches over that; the sweep does it there.
    node = Node(params, head=is_head, shutdown_at_exit=True, spawn_reaper=sys.platform == "linux")
    servers = {kind: process.process.pid for kind, [process] in node.all_processes.items()}
    if is_head:
        del servers[PROCESS_TYPE_RAYLET]
        _end(node.all_processes[PROCESS_TYPE_RAYLET][0].process)
    node_leader.become(
        cluster_file=Path(options.temp_dir) / "ray_current_cluster",
        cluster=node.gcs_address,
        cluster_id="" if is_head else node.cluster_id.hex(),
        servers=servers,
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(node_leader.SERVER_GRACE_S)
        return
    server.kill()
    server.wait()


def _parameters(options: argparse.Namespace) -> Any:
    from ray._private.parameter import RayParams  # noqa: PLC0415 - as above
    from ray._private.resource_isolation_config import ResourceIsolationConfig  # noqa: PLC0415

    return RayParams(
        gcs_address=options.head,
        gcs_server_port=options.port,
        node_ip_address=options.host,
        node_name=options.name or options.host,
        labels=dict(label.split("=", 1) for label in options.label),
        temp_dir=options.temp_dir,
        # Its own, whatever the head's is.
        object_spilling_directory=f"{options.temp_dir}/spilled",
        # Nodes that share an address must not hand out the same fixed ports: the system chooses.
        min_worker_port=0,
        max_worker_port=0,
        # The agent asks for no CPU, and Ray then starts no idle processes in advance.
        num_cpus=0,
        resources={name: float(number) for name, _, number in (each.partition("=") for each in options.resource)},
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        include_log_monitor=False,  # type: ignore[arg-type]  # Ray calls it a text and asks whether it is true
        # No autoscaler is configured.
        no_monitor=True,
        resource_isolation_config=ResourceIsolationConfig(),
    )


def _leave_out_agents() -> None:
    """Have Ray start servers alone. It has no switch for this, as of 2.60."""
    from ray._private import services  # noqa: PLC0415 - as above
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET  # noqa: PLC0415

    start_process = services.start_ray_process

    def started(command: list[str], process_type: str, *positional: Any, **named: Any) -> Any:
        if process_type == PROCESS_TYPE_RAYLET:
            kept = [word for word in command if word.partition("=")[0] not in _RAYLET_OPTIONS]
            command = [*kept, *(f"{name}={value}" for name, value in _RAYLET_OPTIONS.items())]
        with with_ray_slack():
            return start_process(command, process_type, *positional, **named)

    services.start_ray_process = started
    services.start_api_server = lambda *_, **__: ("", None)


def _ask_for_no_head() -> None:
    """Have a node take no directory of the head for its own: the tables forget a head of which no server runs."""
    from ray._private import node  # noqa: PLC0415 - as above

    module: Any = node
    none = SimpleNamespace(state=None, temp_dir="", session_dir="")
    module.get_all_node_info_until_retrieved = lambda *_, **__: [none]


def _use_redis_password(params: Any) -> None:
    """Give Redis's password to Ray and to the GCS, in no command line: Ray has no other way, as of 2.60."""
    from ray._private import services  # noqa: PLC0415 - as above
    from ray._private.ray_constants import PROCESS_TYPE_GCS_SERVER  # noqa: PLC0415

    flags = Path(os.environ.get(node_leader.DIRECTORY_VARIABLE, "/nonexistent")) / FLAGS_FILE
    if not flags.exists():
        return
    params.redis_password = read_password(flags)

    def without(start: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *positional, **named: start(*positional, **{**named, "redis_password": ""})

    def started(command: list[str], process_type: str, *positional: Any, **named: Any) -> Any:
        extra = [f"--flagfile={flags}"] if process_type == PROCESS_TYPE_GCS_SERVER else []
        return start_process([*command, *extra], process_type, *positional, **named)

    start_process = services.start_ray_process
    services.start_ray_process = started
    services.start_gcs_server = without(services.start_gcs_server)
    services.start_raylet = without(services.start_raylet)


if __name__ == "__main__":
    main(sys.argv[1:])
