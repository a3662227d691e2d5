"""Arguments of `drover build` that do not go together, each with the sentence that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def take_flake(options: dict[str, Any]) -> None:
    """Take `--flake REF` for the file `REF#`."""
    flake = options.pop("flake")
    if flake and (options["files"] or options["expression"]):
        raise click.UsageError("name a file, an expression or a --flake; one of them")
    if flake:
        options["files"] = (flake if "#" in flake else f"{flake}#",)


def refuse_contradictions(options: dict[str, Any]) -> None:
    """Refuse arguments of `drover build` that do not go together."""
    files, expression = options["files"], options["expression"]
    if bool(files) == bool(expression):
        raise click.UsageError("name one file, flake output or .drv path, or an expression with -E")
    drvs = [file for file in files if file.partition("!")[0].endswith(".drv")]
    if drvs and len(drvs) != len(files):
        raise click.UsageError("name one file to evaluate or several .drv paths, not both")
    if not drvs and len(files) > 1:
        raise click.UsageError("name one file; choose several things to build with -A")
    chosen = "-A" if options["attrs"] else "--systems" if options["systems"] else ""
    if drvs and chosen:
        raise click.UsageError(f"{chosen} chooses from a file; a .drv path is one derivation")
    if files == ("-",) and chosen:
        raise click.UsageError(f"{chosen} chooses from a file; lines on standard input name derivations")
    if len(files) == 1 and "#" in files[0] and not Path(files[0]).exists():
        if options["attrs"]:
            raise click.UsageError("-A chooses from a file; name a flake's output after its #")
        if options["args"] or options["argstrs"]:
            raise click.UsageError("a flake takes no arguments; leave --arg and --argstr out")
    if options["detach"] and options["fetch"]:
        raise click.UsageError("--fetch waits for the build and --detach does not; choose one")


def refuse_not_remote(options: dict[str, Any]) -> None:
    """Refuse arguments of `drover build` that do not go together with --remote, or not without it."""
    files = options["files"]
    if not options["remote"]:
        if options["git"] or options["rev"]:
            raise click.UsageError("--git and --rev say what --remote evaluates; add --remote")
        return
    if bool(options["git"]) != bool(options["rev"]):
        raise click.UsageError("--git wants --rev with it, and --rev wants --git")
    if "-" in (*files, *options["attrs"]) or any(file.partition("!")[0].endswith(".drv") for file in files):
        raise click.UsageError("--remote evaluates a file or an expression; not derivations")
    if any("://" in file or file.startswith(("<", "/")) for file in files if options["git"]):
        raise click.UsageError("with --git, FILE is a path in the repository")
    for name, option in (
        ("includes", "-I"),
        ("options", "--option"),
        ("evaluators", "--eval-workers"),
        ("memory_mib", "--eval-memory"),
    ):
        if options[name] and not (name == "options" and options["fetch"]):
            raise click.UsageError(f"{option} is for an evaluation on this machine; the coordinator has its own")
