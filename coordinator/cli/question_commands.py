"""The words of the commands that answer questions about steps, submissions and the farm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.cli.completion import completes
from coordinator.cli.options import Name, addressed, run_with_client
from coordinator.cli.sections import ExampledCommand

#: As `coordinator.api.source_routes.SourceTrouble`, which is slow to import; a test compares them.
TROUBLES = ("gone", "unreachable", "mismatch", "failed", "network only")


@click.command(cls=ExampledCommand)
@click.argument("step", type=Name(), shell_complete=completes("steps"))
@click.option("-f", "--follow", is_flag=True, help="Go on until the build ends.")
@click.option("--attempt", type=click.IntRange(1), metavar="N", help="An earlier attempt.  [default: the latest]")
@click.option("--search", default="", metavar="TEXT", help="Only lines that contain TEXT, with their numbers.")
@addressed
def log(url: str, token_file: str, step: str, **options: Any) -> int:
    """Print the build log of a step.

    STEP is its key or any unique part of it, an attribute that was submitted, a .drv path or an output path.
    """
    from coordinator.cli import log as logging  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: logging.log(client, step, **options))


@click.command(cls=ExampledCommand)
@click.argument("step", type=Name(), shell_complete=completes("steps"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def why(url: str, token_file: str, step: str, as_json: bool) -> int:
    """Show why a step waits, runs, ran or failed.

    What it stands on down to what holds it, which submission wants it for what, and what changed since its last build.

    STEP is its key or any unique part of it, an attribute that was submitted, a .drv path or an output path.
    """
    from coordinator.cli import reasons  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: reasons.why(client, step, as_json=as_json))


@click.command(cls=ExampledCommand)
@click.argument("step", type=Name(), shell_complete=completes("steps"))
@click.argument("other", required=False, default="", shell_complete=completes("steps"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def diff(url: str, token_file: str, step: str, other: str, as_json: bool) -> int:
    """Show what differs from the last build of a step's name.

    Or between two steps, down to the first causes. Both are named as for `drover why`; of what the farm has long
    forgotten, by the whole key or path.
    """
    from coordinator.cli import reasons  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: reasons.diff(client, step, other, as_json=as_json))


@click.command(cls=ExampledCommand)
@click.argument("submission", metavar="ID", shell_complete=completes("submissions"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def eta(url: str, token_file: str, submission: str, as_json: bool) -> int:
    """Show when a submission ends and what bounds that.

    The critical path, or the slots of a system.
    """
    from coordinator.cli.eta import eta as foresee  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: foresee(client, submission, as_json=as_json))


@click.command(cls=ExampledCommand)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def capacity(url: str, token_file: str, as_json: bool) -> int:
    """Show the capacity that the farm could use.

    Slots that are worth having now and hours of work, by system, features and memory: what a farm that grows goes by.
    """
    from coordinator.cli.capacity import capacity as wanted  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: wanted(client, as_json=as_json))


@click.command(cls=ExampledCommand)
@click.option("--most", type=click.IntRange(1, 10_000), default=20, show_default=True, help="So many paths.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def demand(url: str, token_file: str, most: int, as_json: bool) -> int:
    """Show what people wait for.

    Paths that clients of the cache asked for and did not get, the most wanted first, and what the farm does about them.
    """
    from coordinator.cli.demand import demand as wanted  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: wanted(client, most, as_json=as_json))


@click.command(cls=ExampledCommand)
@click.option("--trouble", "troubles", type=click.Choice(TROUBLES), multiple=True, help="Only these; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def sources(url: str, token_file: str, troubles: tuple[str, ...], as_json: bool) -> int:
    """Show sources that the farm could not do without.

    Fixed outputs that are neither in the cache nor at an upstream or a mirror: whose address is dead, does not answer,
    or gives something else, and those that are yet to be fetched.
    """
    from coordinator.cli.sources import sources as lacking  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: lacking(client, troubles, as_json=as_json))


@click.command(cls=ExampledCommand)
@addressed
def top(url: str, token_file: str) -> int:
    """Show the farm live until Ctrl-C.

    Throughput, submissions that run and their ends, workers and what they do, queues and what holds them, troubles.
    Where there is no terminal it is shown once.
    """
    from coordinator.cli import top as showing  # noqa: PLC0415 - slow to import
    from coordinator.cli.screen import Screen  # noqa: PLC0415

    return run_with_client(url, token_file, lambda client: showing.top(client, Screen.choose(as_json=False)))


@click.command(cls=ExampledCommand)
@click.argument("step", type=Name(), shell_complete=completes("steps"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def story(url: str, token_file: str, step: str, as_json: bool) -> int:
    """Tell all that happened to a step, in order.

    Its attempts, where each ran, where its time went and what it used.
    """
    from coordinator.cli import history as telling  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: telling.story(client, step, as_json=as_json))


@click.command(cls=ExampledCommand)
@click.argument("submission", type=Name(), shell_complete=completes("submissions"))
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("trace.json"), show_default=True
)
@addressed
def trace(url: str, token_file: str, submission: str, output: Path) -> int:
    """Write where a submission's time went, for Perfetto.

    One track for each slot of each worker; open the file in https://ui.perfetto.dev, which reads it in the browser.
    """
    from coordinator.cli.trace import trace as write  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: write(client, submission, output))


@click.command(cls=ExampledCommand)
@click.argument("name", type=Name())
@click.option("--system", default="", help="Only builds for this system.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def history(url: str, token_file: str, name: str, system: str, as_json: bool) -> int:
    """Show builds of a package over time.

    Durations, memory, sizes, failures. NAME is with or without its version.
    """
    from coordinator.cli import history as telling  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: telling.history(client, name, system, as_json=as_json))
