"""The command `drover bisect`. Nothing slow is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coordinator.cli.options import Address, Systems, Wait, addressed
from coordinator.cli.sections import ExampledCommand


@click.command(cls=ExampledCommand)
@click.argument("file", default="default.nix", metavar="[FILE|FLAKE#ATTR]")
@click.option("-A", "--attr", default="", metavar="ATTR", help="Attribute to build; one derivation.")
@click.option("--good", required=True, metavar="REV", help="A commit before it went bad.")
@click.option("--bad", required=True, metavar="REV", help="A commit at which it is bad.")
@click.option(
    "--until",
    type=click.Choice(["failed", "timed-out", "differs", "slower"]),
    default="failed",
    show_default=True,
    help="What bad is: the build fails, exceeds its time, gives another content than at good, or is slower.",
)
@click.option(
    "--factor",
    type=click.FloatRange(1.0, 1000.0, min_open=True),
    default=1.5,
    show_default=True,
    help="How many times as long as at good is slower.",
)
@click.option("--system", type=Systems(), default="", help="System to evaluate for.  [default: this machine's]")
@click.option("--arg", "args", multiple=True, nargs=2, metavar="NAME EXPR", help="Passed to the evaluation.")
@click.option("--argstr", "argstrs", multiple=True, nargs=2, metavar="NAME TEXT", help="Passed to the evaluation.")
@click.option("-I", "includes", multiple=True, metavar="PATH", help="Passed to the evaluation.")
@click.option("--option", "options", multiple=True, nargs=2, metavar="NAME VALUE", help="Nix setting on this machine.")
@click.option("--eval-workers", "evaluators", type=click.IntRange(1, 256), help="Evaluators side by side.")
@click.option(
    "--eval-memory", "memory_mib", type=click.IntRange(64), metavar="MIB", help="Memory of all evaluators together."
)
@click.option("--eval-timeout", "timeout_s", type=Wait(), default="30m", help="How long one commit may take.  [30m]")
@click.option("--store", metavar="DIR", help="Evaluate into a Nix store below DIR.")
@click.option(
    "--state",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of what is known so far.  [default: drover-bisect.json in the repository's .git]",
)
@click.option("--restart", is_flag=True, help="Forget what an earlier run has found out.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@addressed
def bisect(url: str, token_file: str, **options: Any) -> int:
    """Find the first commit at which a build is bad.

    The commits from --good to --bad along first parents, of the git repository that FILE is in. Those that have the
    same derivation are built once, all free slots of the farm are used, and what the farm has or knows to fail is not
    built. Commits that cannot be evaluated or tested are passed over. After Ctrl-C the same command goes on.
    """
    from coordinator.bisect.verdicts import Until  # noqa: PLC0415 - slow to import
    from coordinator.cli import bisect as searching  # noqa: PLC0415

    systems = options.pop("system")
    if len(systems) > 1:
        raise click.UsageError("--system takes one system; bisect each by itself")
    flags: list[str] = []
    for option, pairs in (("--arg", options.pop("args")), ("--argstr", options.pop("argstrs"))):
        flags += [word for name, value in pairs for word in (option, name, value)]
    flags += [word for path in options.pop("includes") for word in ("-I", path)]
    flags += [word for name, value in options.pop("options") for word in ("--option", name, value)]
    until = Until(options.pop("until"))
    request = searching.BisectRequest(system="".join(systems), flags=tuple(flags), until=until, **options)
    return searching.bisect(Address(url, token_file).client, request)
