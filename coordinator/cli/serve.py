"""`drover up`, `drover head` and `drover worker`: the commands that stay."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from coordinator.cli import exit_status
from coordinator.config import ConfigError, Settings, WorkerConfig, load_settings
from coordinator.errors import CoordinatorError
from coordinator.stop_signals import StopSignals
from infra.validation import first_fault

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"


def up(
    *,
    state_dir: Path | None,
    listen: str | None,
    config: Path | None,
    slots: int | None,
    emulated: Sequence[str],
    nix_options: Sequence[tuple[str, str]],
    weak: Sequence[str],
    no_workers: bool,
) -> int:
    """Run a farm until SIGINT or SIGTERM."""
    host, port = _address(listen)
    settings = load_settings(config, state_dir=state_dir, host=host, port=port)
    if no_workers and (slots is not None or emulated):
        raise click.UsageError("--no-workers starts none; leave --slots and --emulate out")
    if slots is not None and settings.workers:
        raise click.UsageError(f"{config} names its workers; set their slots there")
    settings = settings.model_copy(
        update={
            "workers": () if no_workers else _workers(settings, slots, emulated),
            "weak_isolation": _weak(settings, weak),
            "nix_options": {**settings.nix_options, **dict(nix_options)},
        }
    )
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, stream=sys.stderr)
    # Ray and the HTTP server are imported only now: what is wrong with the settings is said at once.
    from coordinator.main import Ready  # noqa: PLC0415
    from coordinator.run import run_up  # noqa: PLC0415

    def ready(farm: Ready) -> None:
        workers = ", ".join(worker.name for worker in settings.workers) or "none; they join with `drover worker`"
        click.echo(f"the farm is ready at {farm.url}")
        click.echo(f"  workers     {workers}")
        click.echo(f"  cache       {farm.cache_url}")
        for key in farm.public_keys:
            click.echo(f"  public key  {key}")
        click.echo(f"  API token   {farm.token_file}")
        click.echo("  build       drover build FILE -A ATTR      stop with Ctrl-C")
        sys.stdout.flush()

    def standing_by(url: str) -> None:
        click.echo(f"another coordinator works on the same database; standing by at {url} until it ends (Ctrl-C stops)")
        if not settings.ray_address:
            click.echo("  it has a Ray head of its own: builds that run then are done again (set ray_address on both)")
        sys.stdout.flush()

    run_up(settings, ready, standing_by)
    return exit_status.OK


def _weak(settings: Settings, names: Sequence[str]) -> tuple[str, ...]:
    """All workers that may build although they isolate weakly. Raises `ConfigError` for what is no worker's name."""
    try:
        return Settings(weak_isolation=(*settings.weak_isolation, *names)).weak_isolation
    except ValidationError as error:
        raise ConfigError(f"--allow-weak-isolation: {first_fault(error).message}") from None


def head(*, state_dir: Path, listen: str | None, config: Path | None) -> int:
    """Run a Ray head until SIGINT or SIGTERM."""
    from coordinator.fleet.ray_cluster import serve_head  # noqa: PLC0415 - imports Ray
    from workers.errors import WorkerError  # noqa: PLC0415

    host, port = _address(listen)
    settings = load_settings(config, state_dir=state_dir, ray_host=host, ray_port=port)
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, stream=sys.stderr)

    def ready(address: str) -> None:
        click.echo(f"the Ray head is ready at {address}")
        click.echo(f"  token       {settings.ray_token_file}      stop with Ctrl-C")
        sys.stdout.flush()

    async def run() -> None:
        await serve_head(settings, ready, StopSignals.install().stop)

    try:
        asyncio.run(run())
    except WorkerError as error:
        raise CoordinatorError(str(error)) from None
    return exit_status.OK


def _address(listen: str | None) -> tuple[str | None, int | None]:
    if listen is None:
        return None, None
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise click.UsageError(f"--listen wants HOST:PORT, such as 127.0.0.1:7878, not {listen}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _workers(settings: Settings, slots: int | None, emulated: Sequence[str]) -> tuple[WorkerConfig, ...]:
    """The configured workers, or one for this machine where the cluster is ours; and one for each system to emulate."""
    workers = list(settings.workers)
    if not workers and not (settings.ray_address and slots is None):
        # Several coordinators may share a cluster, and the names of workers must differ.
        workers = [WorkerConfig(name="native", slots=slots or 0)]
    taken = {worker.name for worker in workers}
    for system in dict.fromkeys(emulated):
        if system in taken:
            raise ConfigError(f"--emulate {system} adds a worker of that name, but the settings have one already.")
        workers.append(WorkerConfig(name=system, emulate=(system,), slots=slots or 0))
    return tuple(workers)


def worker_config(options: dict[str, Any]) -> WorkerConfig:
    """Check what the command line says of one worker. Raises `ConfigError` with one sentence."""
    try:
        return WorkerConfig(**options)
    except ValidationError as error:
        place, why = first_fault(error)
        raise ConfigError(f"--{place.partition('.')[0]}: {why}") from None


def worker(*, head: str, ray_token: Path, host: str, config: WorkerConfig, state_dir: Path) -> int:
    """Join this machine to a farm that runs elsewhere, until SIGINT, SIGTERM or the end of the node."""
    from coordinator.fleet.ray_cluster import worker_state_dir, write_worker_settings  # noqa: PLC0415 - imports Ray
    from workers.agent.stopping import stop_agents  # noqa: PLC0415
    from workers.errors import WorkerError  # noqa: PLC0415
    from workers.ray_transport.node_process import Handover  # noqa: PLC0415
    from workers.ray_transport.nodes import RayWorkerNode  # noqa: PLC0415

    settings = load_settings(state_dir=state_dir)
    file = write_worker_settings(settings, config, (head.rpartition(":")[0],))

    async def run() -> int:
        signals = StopSignals.install()
        node = RayWorkerNode(
            name=config.name,
            head=head,
            token_file=ray_token,
            settings_file=file,
            host=host,
            keep=Handover(settings.state_dir / "ray" / "worker", settings.ray_outlive_s),
        )
        async with node:
            click.echo(f"worker {config.name} has joined the farm at {head}; stop with Ctrl-C")
            sys.stdout.flush()

            async def stopped() -> None:
                await signals.stop.wait()
                ours = [worker_state_dir(settings, config.name)]
                await stop_agents(ours, settings.stop_grace_s, signals.at_once.is_set)

            failing, stopping = asyncio.ensure_future(node.wait_failed()), asyncio.ensure_future(stopped())
            try:
                await asyncio.wait((failing, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not stopping.done():
                    raise CoordinatorError(f"{failing.result()}; start the worker again, its builds are done elsewhere")
                await stopping
            finally:
                failing.cancel()
                stopping.cancel()
        return exit_status.OK

    try:
        return asyncio.run(run())
    except WorkerError as error:
        raise CoordinatorError(str(error)) from None
