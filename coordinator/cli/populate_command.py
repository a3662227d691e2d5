"""The words of `drover populate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from coordinator.cli.options import EVALUATION_OPTIONS, Address, Systems, Wait, addressed, evaluated
from coordinator.cli.plan_commands import KINDS
from coordinator.cli.sections import ExampledCommand

#: As `coordinator.cli.proof.ProofMeans` has them.
PROOFS: Final = ("auto", "nix", "own", "none")


@click.command(cls=ExampledCommand)
@click.argument("sources", nargs=-1, metavar="[LOCK|LIST|FILE|FLAKE#ATTR|PATH|-]...")
@click.option("--diff", nargs=2, metavar="OLD NEW", help="Only what is new in the list NEW.")
@click.option("-A", "--attr", "attrs", multiple=True, metavar="ATTR", help="Attribute of a Nix file; repeatable.")
@click.option("--kind", type=click.Choice(KINDS), help="Form of the sources.  [default: by name and content]")
@click.option(
    "--systems", type=Systems(), default="", help="Systems to populate.  [default: the list's, or this one's]"
)
@click.option("--pull/--no-pull", default=True, help="Have paths from the farm's upstreams.  [default: yes]")
@click.option("--build/--no-build", default=True, help="Build what no upstream has.  [default: yes]")
@click.option("--evaluate", "compare", is_flag=True, help="Evaluate every entry of a lock, and compare its paths.")
@click.option(
    "--proof",
    type=click.Choice(PROOFS),
    default="auto",
    show_default=True,
    help="Client that proves: Nix, or drover's own verification where Nix is not installed.",
)
@click.option("--keep-as", default="", metavar="NAME", help="Root that keeps the paths.  [default: from the list]")
@click.option("--retry", is_flag=True, help="Build again what is known to fail.")
@click.option("--wait", "wait_s", type=Wait(), help="How long a step waits for a worker, as for build.")
@click.option("--arg", "args", multiple=True, nargs=2, metavar="NAME EXPR", help="Passed to the evaluation.")
@click.option("--argstr", "argstrs", multiple=True, nargs=2, metavar="NAME TEXT", help="Passed to the evaluation.")
@click.option("--option", "options", multiple=True, nargs=2, metavar="NAME VALUE", help="Nix setting on this machine.")
@evaluated
@click.option("--store", metavar="DIR", help="Evaluate into a Nix store below DIR.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write Markdown to FILE too.")
@addressed
def populate(url: str, token_file: str, **options: Any) -> int:
    """Fill the cache with what a wish list names, and prove it.

    Wish lists are those of `drover plan`. What the cache lacks comes from the farm's upstreams, verified, or is built;
    then a plain Nix client fetches every closure. Interrupted, the same command goes on where it stopped.

    Exit status: 0 all is there and proven, 1 a build failed, 3 nothing worse than that something cannot be evaluated,
    8 something could not be had or proven, 9 what a derivation makes is not what the list names (drift).
    """
    from coordinator.cli import populate as populating  # noqa: PLC0415 - slow to import
    from coordinator.cli.evaluation import EvaluationRequest  # noqa: PLC0415
    from coordinator.cli.proof import ProofMeans  # noqa: PLC0415
    from coordinator.cli.wish_reading import WishRequest, command_flags  # noqa: PLC0415
    from coordinator.client.token import find_token  # noqa: PLC0415
    from coordinator.wishes.model import WishSource  # noqa: PLC0415

    sources, diff = options.pop("sources"), options.pop("diff")
    if diff and sources:
        raise click.UsageError("--diff OLD NEW names both lists; give no other")
    flags = command_flags(options.pop("args"), options.pop("argstrs"))
    settings = tuple(word for name, value in options.pop("options") for word in ("--option", name, value))
    of_evaluation = {name: options.pop(name) for name in ("attrs", "systems", *EVALUATION_OPTIONS)}
    evaluation = EvaluationRequest(flags=flags, **of_evaluation)
    kind, store = options.pop("kind"), options.pop("store")

    def wishes(names: tuple[str, ...]) -> WishRequest:
        return WishRequest(names, evaluation, WishSource(kind) if kind else None, settings, store)

    old, new = (wishes((diff[0],)), wishes((diff[1],))) if diff else (None, wishes(sources))
    request = populating.PopulateRequest(
        new, old, evaluate=options.pop("compare"), proof=ProofMeans(options.pop("proof")), **options
    )
    return populating.populate(Address(url, token_file).client, find_token(token_file), request)
