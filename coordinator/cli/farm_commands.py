"""The words of the commands that run a farm and steer its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.cli import short_life
from coordinator.cli.completion import completes
from coordinator.cli.options import Name, addressed, run_with_client
from coordinator.cli.sections import ExampledCommand
from coordinator.defaults import HOST, PORT


@click.command(cls=ExampledCommand)
@click.option("--state-dir", type=click.Path(file_okay=False, path_type=Path), help="Where the farm keeps everything.")
@click.option("--listen", metavar="HOST:PORT", help=f"Address to listen on.  [default: {HOST}:{PORT}]")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="Settings file (TOML).")
@click.option("--slots", type=click.IntRange(0, 1024), help="Builds at one time of the native worker; 0: one per core.")
@click.option("--emulate", "emulated", multiple=True, metavar="SYSTEM", help="Add a worker that pretends to be SYSTEM.")
@click.option(
    "--nix-option", "nix_options", multiple=True, nargs=2, metavar="NAME VALUE", help="Nix setting of every worker."
)
@click.option(
    "--allow-weak-isolation",
    "weak",
    multiple=True,
    metavar="NAME",
    help="Let worker NAME build although it isolates builds weakly (class C in `drover workers`).",
)
@click.option("--no-workers", is_flag=True, help="Only the coordinator; workers join with `drover worker`.")
def up(**options: Any) -> int:
    """Run a farm on this machine until Ctrl-C.

    Coordinator, Ray head and workers, with its state in ~/.local/state/drover unless told otherwise.
    """
    from coordinator.cli import serve  # noqa: PLC0415 - imports Ray and the HTTP server

    short_life.stay()
    return serve.up(**options)


@click.command(cls=ExampledCommand)
@click.option("--state-dir", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory to use.")
@click.option("--listen", metavar="HOST:PORT", help="Address to listen on, numeric.  [default: 127.0.0.1, a free port]")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="Settings file (TOML).")
def head(**options: Any) -> int:
    """Run a Ray head by itself until Ctrl-C.

    For coordinators with `ray_address`, which come and go while builds run.
    """
    from coordinator.cli import serve  # noqa: PLC0415 - imports Ray

    short_life.stay()
    return serve.head(**options)


@click.command(cls=ExampledCommand)
@click.option("--head", required=True, metavar="HOST:PORT", help="Address of the farm's Ray head.")
@click.option(
    "--ray-token", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The farm's Ray token file."
)
@click.option("--name", required=True, help="Name of this worker, unique in the farm.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of this machine for the farm.")
@click.option("--state-dir", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory to use.")
@click.option("--slots", type=click.IntRange(0, 1024), default=0, help="Builds at one time; 0: one per core.")
@click.option("--emulate", "emulate", multiple=True, metavar="SYSTEM", help="Pretend to be SYSTEM too.")
@click.option("--feature", "features", multiple=True, help="System feature beside the machine's own.")
@click.option("--store", default="", metavar="DIR", help="Chroot store; by default one in the state directory.")
@click.option(
    "--min-free-mb", type=click.IntRange(0), default=512, show_default=True, help="No work while less room is left."
)
@click.option("--network/--no-network", default=True, help="Fetch sources here.  [default: network]")
@click.option(
    "--yield-to-others/--no-yield-to-others",
    default=True,
    help="Offer fewer slots while others keep this machine busy.  [default: yield-to-others]",
)
@click.option("--nix-option", "nix_options", multiple=True, nargs=2, metavar="NAME VALUE", help="Nix setting.")
def worker(head: str, ray_token: Path, host: str, state_dir: Path, **options: Any) -> int:
    """Join this machine to a farm that runs elsewhere.

    It works for the farm until Ctrl-C; `drover drain` lets it end its builds first.
    """
    from coordinator.cli import serve  # noqa: PLC0415 - imports Ray and the HTTP server

    short_life.stay()
    options["nix_options"] = dict(options["nix_options"])
    return serve.worker(
        head=head, ray_token=ray_token, host=host, config=serve.worker_config(options), state_dir=state_dir
    )


@click.command(cls=ExampledCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def workers(url: str, token_file: str, as_json: bool) -> int:
    """Show the workers: what they offer and what they do."""
    from coordinator.cli import status as showing  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: showing.workers(client, as_json=as_json))


@click.command(cls=ExampledCommand)
@click.argument("worker_name", type=Name(), metavar="WORKER", shell_complete=completes("workers"))
@click.option("--off", is_flag=True, help="Give it new builds again.")
@click.option("--wait", is_flag=True, help="Return once the builds that run there have ended.")
@addressed
def drain(url: str, token_file: str, worker_name: str, off: bool, wait: bool) -> int:
    """Give a worker no new builds; those that run there finish.

    A worker that starts anew is not drained.
    """
    from coordinator.cli import status as showing  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: showing.drain(client, worker_name, on=not off, wait=wait))
