"""`drover environments …` and `drover coverage`: the words of the commands; `coordinator.cli.environments` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.cli.options import Name, Systems, addressed, run_with_client
from coordinator.cli.sections import ExampledCommand

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def environments() -> None:
    """Track what people install: revisions, releases, rollback."""


@environments.command("list")
@_JSON
@addressed
def list_environments(url: str, token_file: str, as_json: bool) -> int:
    """List the environments that are tracked."""
    from coordinator.cli import environments as tracked  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: tracked.listing(client, as_json=as_json))


@environments.command()
@click.argument("name", type=Name())
@_JSON
@addressed
def show(url: str, token_file: str, name: str, as_json: bool) -> int:
    """Show an environment: its source, its revisions, where stable is."""
    from coordinator.cli import environments as tracked  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: tracked.show(client, name, as_json=as_json))


@environments.command()
@click.argument("name", type=Name())
@click.option("--push", "pushed", is_flag=True, help="Its content is sent with `push`.  [default]")
@click.option("--path", default="", help="Lock, list or directory on the coordinator's machine.")
@click.option("--git", "url_of_git", default="", metavar="URL", help="Git repository, polled.")
@click.option("--ref", default="", help="With --git, branch or tag.  [default: HEAD]")
@click.option("--file", default="", help="With --git, the file.  [default: a lock by its name]")
@click.option("--system", default="", help="System of store paths that do not say theirs.")
@click.option("--owner", "owners", multiple=True, help="Owner who may change it; repeatable.  [default: you]")
@_JSON
@addressed
def track(url: str, token_file: str, name: str, as_json: bool, **options: Any) -> int:
    """Track an environment, or give one another source.

    Its history stays. What it consists of is kept in the cache, had from upstreams or built where it can be.
    """
    from coordinator.cli import environments as tracked  # noqa: PLC0415 - slow to import

    kinds = [bool(options["pushed"]), bool(options["path"]), bool(options["url_of_git"])]
    if sum(kinds) > 1:
        raise click.UsageError("name one source: --push, --path or --git")
    if not options["url_of_git"] and (options["ref"] or options["file"]):
        raise click.UsageError("--ref and --file say what to read of a --git repository")
    return run_with_client(
        url, token_file, lambda client: tracked.track(client, name, tracked.TrackOptions(**options), as_json=as_json)
    )


@environments.command()
@click.argument("name", type=Name())
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--submission", default="", metavar="ID", help="Its roots instead of a FILE.")
@click.option("--system", default="", help="System of store paths that do not say theirs.")
@click.option("--mark", default="", help="What to call the revision, such as a commit.")
@_JSON
@addressed
def push(url: str, token_file: str, name: str, file: Path | None, as_json: bool, **options: Any) -> int:
    """Send what an environment consists of.

    FILE is a lock, a list of store paths, or what nix-eval-jobs prints. What must be evaluated is submitted first, and
    the submission is pushed. A repeat changes nothing.
    """
    from coordinator.cli import environments as tracked  # noqa: PLC0415 - slow to import

    if (file is None) == (not options["submission"]):
        raise click.UsageError("name a FILE or a --submission")
    return run_with_client(url, token_file, lambda client: tracked.push(client, name, file, as_json=as_json, **options))


@environments.command()
@click.argument("name", type=Name())
@_JSON
@addressed
def look(url: str, token_file: str, name: str, as_json: bool) -> int:
    """Look at the source of an environment now, as a webhook may."""
    from coordinator.cli import environments as tracked  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: tracked.look(client, name, as_json=as_json))


@environments.command()
@click.argument("name", type=Name())
@click.option("--systems", type=Systems(), default="", help="Only there.  [default: everywhere]")
@click.option("--to", type=click.IntRange(1), default=None, metavar="REVISION", help="[default: the one before]")
@_JSON
@addressed
def rollback(*, url: str, token_file: str, name: str, systems: tuple[str, ...], to: int | None, as_json: bool) -> int:
    """Move stable back to a revision that can be fetched whole.

    It stays there until a revision comes that is newer than all that there are now.
    """
    from coordinator.cli import environments as tracked  # noqa: PLC0415 - slow to import

    return run_with_client(
        url, token_file, lambda client: tracked.rollback(client, name, systems, to or 0, as_json=as_json)
    )


@environments.command()
@click.argument("name", type=Name())
@addressed
def forget(url: str, token_file: str, name: str) -> int:
    """Forget an environment: its history, and that its paths are kept."""
    from coordinator.cli import environments as tracked  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: tracked.forget(client, name))


@click.command(cls=ExampledCommand)
@click.argument("environment", type=Name(), required=False, metavar="[ENVIRONMENT]")
@_JSON
@addressed
def coverage(url: str, token_file: str, environment: str | None, as_json: bool) -> int:
    """Show what of environments can be fetched, and why not all.

    A package counts as fetched only with all that it refers to.
    """
    from coordinator.cli import environments as tracked  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: tracked.coverage(client, environment, as_json=as_json))
