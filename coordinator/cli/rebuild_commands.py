"""The command line of `drover rebuild`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import click

from coordinator.cli.options import Address, Systems, Wait, addressed
from coordinator.cli.sections import ExampledCommand

#: Pairs of options, of which one says what is compared.
_PAIRS: Final = (("base", "head"), ("base_file", "head_file"), ("base_submission", "head_submission"))
MAX_DEPENDENTS: Final = 1_000


@click.command(cls=ExampledCommand)
@click.argument("file", default="", metavar="[FILE]")
@click.option("--base", metavar="REV", help="Revision to compare with, of the git repository around FILE.")
@click.option("--head", metavar="REV", help="Revision that is looked at.  [default: HEAD]")
@click.option("--base-file", metavar="FILE|FLAKE#ATTR", help="File or flake to compare with.")
@click.option("--head-file", metavar="FILE|FLAKE#ATTR", help="File or flake that is looked at.")
@click.option("--base-submission", metavar="ID", help="Submission to compare with.")
@click.option("--head-submission", metavar="ID", help="Submission that is looked at.")
@click.option("-A", "--attr", "attrs", multiple=True, metavar="ATTR", help="Attribute to compare; repeatable.")
@click.option(
    "--systems", type=Systems(), default="", help="Systems to evaluate for, as for build.  [default: this machine's]"
)
@click.option("--only", multiple=True, metavar="GLOB", help="Attributes that match, as 'python3*'; repeatable.")
@click.option("--regex", default="", metavar="REGEX", help="Attributes in which it is found.")
@click.option("--maintainer", "maintainers", multiple=True, metavar="NAME", help="Attributes with this maintainer.")
@click.option(
    "--at-most-dependents",
    type=click.IntRange(0, MAX_DEPENDENTS),
    metavar="N",
    help="Attributes that at most N others stand on.",
)
@click.option("--dry-run", is_flag=True, help="Build nothing; say what differs, why, and how large it is.")
@click.option(
    "--base-results",
    type=click.Choice(("build", "known")),
    default="build",
    show_default=True,
    help="Build the base where the cache lacks it, or take what the farm knows of it.",
)
@click.option("--arg", "args", multiple=True, nargs=2, metavar="NAME EXPR", help="Passed to both evaluations.")
@click.option("--argstr", "argstrs", multiple=True, nargs=2, metavar="NAME TEXT", help="Passed to both evaluations.")
@click.option("-I", "includes", multiple=True, metavar="PATH", help="Passed to both evaluations.")
@click.option("--option", "options", multiple=True, nargs=2, metavar="NAME VALUE", help="Nix setting on this machine.")
@click.option("--no-ifd", is_flag=True, help="Refuse what imports from derivations; else the farm builds it.")
@click.option("--store", metavar="DIR", help="Evaluate into a Nix store below DIR.")
@click.option("--retry", is_flag=True, help="Build again what is known to fail.")
@click.option("--wait", "wait_s", type=Wait(), help="How long a step waits for a worker, as for build.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write a comment for a pull request.")
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), help="Write JUnit XML.")
@click.option(
    "--summary",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append Markdown to FILE.  [default: $GITHUB_STEP_SUMMARY, where set]",
)
@addressed
def rebuild(url: str, token_file: str, **options: Any) -> int:
    """Compare two revisions: what is rebuilt, why, and what it does.

    Both are evaluated (FILE is default.nix where it is left out), what differs is built on the farm, and reported: what
    fails newly, is fixed or still fails, by root cause; rebuilds for nothing; outputs that really changed.

    Exit status: 0 nothing fails newly, 1 something does, 3 an attribute evaluates on one side only (or one side does
    not evaluate at all).
    """
    from coordinator.cli import rebuild as rebuilding  # noqa: PLC0415 - slow to import
    from coordinator.cli.evaluation import EvaluationRequest  # noqa: PLC0415 - slow to import
    from coordinator.cli.rebuild_sides import SidesRequest  # noqa: PLC0415 - slow to import
    from coordinator.rebuild.difference import Selection  # noqa: PLC0415 - slow to import

    pair = _pair(options)
    values = {name: options.pop(name) for names in _PAIRS for name in names}
    file = options.pop("file")
    base, head = (values[name] or "HEAD" for name in pair)
    sides = SidesRequest(
        revisions=(base, head) if pair == _PAIRS[0] else None,
        file=file,
        files=(base, head) if pair == _PAIRS[1] else None,
        submissions=(base, head) if pair == _PAIRS[2] else None,
    )
    selection = Selection(
        options.pop("only"),
        _expression(options.pop("regex")),
        options.pop("maintainers"),
        options.pop("at_most_dependents"),
    )
    flags: list[str] = []
    for option, words in (("--arg", options.pop("args")), ("--argstr", options.pop("argstrs"))):
        flags += [word for name, value in words for word in (option, name, value)]
    flags += [word for path in options.pop("includes") for word in ("-I", path)]
    settings = [word for name, value in options.pop("options") for word in ("--option", name, value)]
    of_evaluation = {name: options.pop(name) for name in ("attrs", "systems", "no_ifd")}
    evaluation = EvaluationRequest(flags=tuple(flags), **of_evaluation)
    if options["summary"] is None and (path := os.environ.get("GITHUB_STEP_SUMMARY")):
        options["summary"] = Path(path)
    request = rebuilding.RebuildRequest(sides, evaluation, selection, tuple(settings), **options)
    return rebuilding.rebuild(Address(url, token_file).client, request)


def _pair(options: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the pair of options that is given; refuses what does not go together."""
    given = [pair for pair in _PAIRS if any(options[name] for name in pair)]
    if len(given) != 1:
        raise click.UsageError(
            "say what is compared: --base REV [--head REV], or --base-file and --head-file, or --base-submission and "
            "--head-submission"
        )
    pair = given[0]
    for name in pair:
        if not options[name] and name != "head":
            raise click.UsageError(f"--{name.replace('_', '-')} is missing: two things are compared")
    of_set = {name for name in ("attrs", "systems", "args", "argstrs", "includes", "no_ifd", "store") if options[name]}
    if pair == _PAIRS[2]:
        of_set |= {name for name in ("maintainers", "dry_run", "retry", "wait_s") if options[name]}
        of_set |= {"at_most_dependents"} if options["at_most_dependents"] is not None else set()
        if of_set:
            name = min(of_set).replace("_", "-").removesuffix("s")
            raise click.UsageError(f"submissions are compared as they are: leave --{name} out")
    if options["file"] and pair != _PAIRS[0]:
        raise click.UsageError("FILE is a file of a repository, for --base and --head; name it with --head-file")
    flakes = [options[name] for name in pair if "#" in (options[name] or "") and pair == _PAIRS[1]]
    if flakes and (options["attrs"] or options["args"] or options["argstrs"]):
        raise click.UsageError("a flake takes no attributes and no arguments; name its output after its #")
    return pair


def _expression(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise click.UsageError(f"--regex {text!r} is no regular expression: {error}") from None
