"""The words of `drover doctor`."""

from __future__ import annotations

import click

from coordinator.cli.sections import ExampledCommand


@click.command(cls=ExampledCommand)
@click.argument("caches", metavar="[CACHE-URL]...", nargs=-1)
@click.option("--key", "keys", multiple=True, metavar="NAME:KEY", help="A public key that Nix should trust.")
@click.option(
    "--no-plan", "plan", flag_value=False, default=True, help="Do not look at this directory's flake or lock."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(caches: tuple[str, ...], keys: tuple[str, ...], plan: bool, as_json: bool) -> int:
    """Say what keeps Nix on this machine from fetching.

    Looks at Nix, its settings in force, each cache that it asks, tokens, clock and disk, and says the line that mends
    each finding. For a flake, a lock of Flox or devbox, default.nix or shell.nix of this directory it says what Nix
    would fetch and build. No farm account is needed. Exit status 1: there is a problem.
    """
    from coordinator.cli import doctor as examining  # noqa: PLC0415 - slow to import

    return examining.doctor(caches, keys, plan=plan, as_json=as_json)
