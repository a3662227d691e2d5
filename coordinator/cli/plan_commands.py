"""The words of `drover plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from coordinator.cli.options import EVALUATION_OPTIONS, Systems, addressed, evaluated, run_with_client
from coordinator.cli.sections import ExampledCommand

#: Forms of sources, as `coordinator.wishes.model.WishSource` has them.
KINDS: Final = ("flox", "devbox", "flake", "flake-lock", "paths", "nix-eval-jobs", "file", "configuration")


@click.command(cls=ExampledCommand)
@click.argument("sources", nargs=-1, metavar="[LOCK|LIST|FILE|FLAKE#ATTR|PATH|-]...")
@click.option("-A", "--attr", "attrs", multiple=True, metavar="ATTR", help="Attribute of a Nix file; repeatable.")
@click.option("--kind", type=click.Choice(KINDS), help="Form of the sources.  [default: by name and content]")
@click.option(
    "--systems", type=Systems(), default="", help="Systems to plan for.  [default: the list's, or this one's]"
)
@click.option("--arg", "args", multiple=True, nargs=2, metavar="NAME EXPR", help="Passed to the evaluation.")
@click.option("--argstr", "argstrs", multiple=True, nargs=2, metavar="NAME TEXT", help="Passed to the evaluation.")
@click.option("--option", "options", multiple=True, nargs=2, metavar="NAME VALUE", help="Nix setting on this machine.")
@evaluated
@click.option("--store", metavar="DIR", help="Evaluate into a Nix store below DIR.")
@click.option("--all", "every", is_flag=True, help="Also list packages that can be fetched on every system.")
@click.option(
    "--rate",
    type=click.FloatRange(0.01, 100_000),
    metavar="MIB",
    help="MiB/s that this machine fetches.  [default: unknown]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write Markdown to FILE too.")
@addressed
def plan(url: str, token_file: str, **options: Any) -> int:
    """Say what can be fetched, would be built, or cannot be had.

    For each package and system of a wish list: manifest.lock of Flox, devbox.lock, flake.lock, a flake's output or
    configuration, a Nix file, store paths, .drv paths, lines of nix-eval-jobs; of several together. Without any, what
    this directory has. Nothing is built, stored or queued.
    """
    from coordinator.cli import plan as planning  # noqa: PLC0415 - slow to import
    from coordinator.cli.evaluation import EvaluationRequest  # noqa: PLC0415
    from coordinator.cli.wish_reading import WishRequest, command_flags  # noqa: PLC0415
    from coordinator.wishes.model import WishSource  # noqa: PLC0415

    flags = command_flags(options.pop("args"), options.pop("argstrs"))
    settings = [word for name, value in options.pop("options") for word in ("--option", name, value)]
    of_evaluation = {name: options.pop(name) for name in ("attrs", "systems", *EVALUATION_OPTIONS)}
    evaluation = EvaluationRequest(flags=flags, **of_evaluation)
    kind, sources, store = (options.pop(name) for name in ("kind", "sources", "store"))
    wishes = WishRequest(sources, evaluation, WishSource(kind) if kind else None, tuple(settings), store)
    request = planning.PlanRequest(wishes, **options)
    return run_with_client(url, token_file, lambda client: planning.plan(client, request))
