"""The `drover` command.

Exit status: 0 done, 1 a build failed, 2 wrong usage, 3 something could not be evaluated (what could be is built), 4
infrastructure (no coordinator, no Nix, a store that cannot be read), 130 interrupted; `exit_status` has the table.
Whatever goes wrong is one sentence on standard error; an unexpected error is written to a file that the sentence names.

Commands import what they need when they run, and are themselves imported when they are called.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from coordinator.cli import short_life
from coordinator.cli.build_arguments import refuse_contradictions, refuse_not_remote, take_flake
from coordinator.cli.completion import SHELLS, completes, script
from coordinator.cli.exit_status import INFRASTRUCTURE, INTERRUPTED, OK, USAGE, status_of
from coordinator.cli.options import (
    EVALUATION_OPTIONS,
    Address,
    Name,
    Systems,
    Wait,
    addressed,
    evaluated,
    run_with_client,
    sectioned,
)
from coordinator.cli.sections import LateCommands, SectionedGroup
from coordinator.cli.submission_options import describes, taken_words
from coordinator.errors import CoordinatorError
from coordinator.terminal_controls import harmless

#: What a shell shows for a program that was ended by SIGPIPE.
READER_GONE = 141

#: The end of `drover --help`. A lone \b keeps click from joining the lines below it.
EPILOG = """\b
Exit status:
  0    all is built, the question is answered
  1    a build failed
  2    wrong usage: an argument, a token, a name that does not exist
  3    something is nothing that this farm builds, or cannot be evaluated
  4    infrastructure: no coordinator, no Nix; later it may succeed
  5    the submission was cancelled
  6    the submission was superseded by a newer one
  7    the deadline of the submission passed
  8    something of a wish list could not be had or proven
  9    a derivation makes another path than a wish list names
  130  interrupted; builds go on

\b
Environment:
  DROVER_URL         address of the coordinator
  DROVER_TOKEN_FILE  file with the API token; the token itself: DROVER_TOKEN
  DROVER_CI          github, gitlab or none: how a log folds
  NO_COLOR           no colours
"""


if TYPE_CHECKING:
    # Imported by name in `LateCommands`; here for the checks of what imports what.
    from coordinator.cli import (  # noqa: F401
        bisect_command,
        cache_commands,
        doctor_command,
        environment_commands,
        farm_commands,
        plan_commands,
        populate_command,
        question_commands,
        rebuild_commands,
        submission_commands,
    )

#: Module -> its commands, which it imports when one of them is called.
_ELSEWHERE: Final = {
    "bisect_command": ("bisect",),
    "cache_commands": ("cache",),
    "doctor_command": ("doctor",),
    "environment_commands": (
        "coverage",
        "environments",
    ),
    "farm_commands": (
        "drain",
        "head",
        "up",
        "worker",
        "workers",
    ),
    "plan_commands": ("plan",),
    "populate_command": ("populate",),
    "question_commands": (
        "capacity",
        "demand",
        "diff",
        "eta",
        "history",
        "log",
        "sources",
        "story",
        "top",
        "trace",
        "why",
    ),
    "rebuild_commands": ("rebuild",),
    "submission_commands": (
        "bump",
        "submissions",
        "wait",
    ),
}


@click.group(
    cls=SectionedGroup,
    commands=LateCommands(_ELSEWHERE),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EPILOG,
)
@click.version_option(package_name="drover", message="drover %(version)s")
def cli() -> None:
    """A build farm for Nix: one command on one machine, the same program on a fleet."""


@cli.command()
@click.argument("files", nargs=-1, metavar="FILE|FLAKE#ATTR|DRV...|-")
@click.option(
    "-A",
    "--attr",
    "attrs",
    multiple=True,
    metavar="ATTR",
    help="Attribute to build; repeatable; - reads them as lines.",
)
@click.option("-E", "--expr", "expression", default="", metavar="EXPR", help="Evaluate an expression and no file.")
@click.option("--flake", "flake", default="", metavar="FLAKE", help="Evaluate a flake and no file, as FLAKE#ATTR does.")
@click.option(
    "--systems",
    type=Systems(),
    default="",
    help="Systems to evaluate for, as x86_64-linux,aarch64-darwin or all, linux, darwin.  [default: this machine's]",
)
@click.option("--arg", "args", multiple=True, nargs=2, metavar="NAME EXPR", help="Passed to the evaluation.")
@click.option("--argstr", "argstrs", multiple=True, nargs=2, metavar="NAME TEXT", help="Passed to the evaluation.")
@click.option("-I", "includes", multiple=True, metavar="PATH", help="Passed to the evaluation.")
@click.option("--option", "options", multiple=True, nargs=2, metavar="NAME VALUE", help="Nix setting on this machine.")
@evaluated
@click.option("--remote", is_flag=True, help="Evaluate at the coordinator: files that git tracks, as they are.")
@click.option("--git", "git", default="", metavar="URL", help="With --remote, FILE of this git repository.")
@click.option("--rev", default="", metavar="REV", help="With --git, the commit, branch or tag.")
@click.option("--store", metavar="DIR", help="Evaluate into (and fetch to) a Nix store below DIR.")
@describes
@click.option("--retry", is_flag=True, help="Build again what is known to fail.")
@click.option(
    "--wait",
    "wait_s",
    type=Wait(),
    help="How long a step waits for a worker that can build it, before it fails.  [default: as the farm says]",
)
@click.option("--detach", is_flag=True, help="Do not watch; print how to, once all is evaluated.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--fetch", is_flag=True, help="Realise the outputs on this machine when all is built.")
@sectioned
@addressed
def build(url: str, token_file: str, **options: Any) -> int:
    """Evaluate FILE, build its attributes on the farm, and watch.

    FILE may also be a flake's output (`.#checks`), .drv paths of the local store (`PATH.drv`, `PATH.drv!out,dev`), or -
    for lines on standard input: .drv paths, or what nix-eval-jobs prints.
    """
    from coordinator.cli import build as building  # noqa: PLC0415 - slow to import
    from coordinator.cli.evaluation import EvaluationRequest  # noqa: PLC0415 - slow to import

    take_flake(options)
    refuse_contradictions(options)
    refuse_not_remote(options)
    remote, git, rev = (options.pop(name) for name in ("remote", "git", "rev"))
    flags: list[str] = []
    for option, pairs in (("--arg", options["args"]), ("--argstr", options["argstrs"])):
        flags += [word for name, value in pairs for word in (option, name, value)]
    flags += [word for path in options.pop("includes") for word in ("-I", path)]
    settings = [word for name, value in options.pop("options") for word in ("--option", name, value)]
    names = ("files", "attrs", "expression", "systems", *EVALUATION_OPTIONS)
    of_evaluation = {name: options.pop(name) for name in names}
    evaluation = EvaluationRequest(flags=tuple(flags), **of_evaluation)
    words = taken_words(options)
    source = None
    if remote:
        from coordinator.cli.remote import RemoteSource  # noqa: PLC0415 - slow to import

        source = RemoteSource(git, rev)
    request = building.BuildRequest(evaluation, settings=tuple(settings), words=words, remote=source, **options)
    return building.build(Address(url, token_file).client, request)


@cli.command()
@click.argument("submission", type=Name(), shell_complete=completes("submissions"))
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@sectioned
@addressed
def watch(url: str, token_file: str, submission: str, **options: Any) -> int:
    """Watch a submission until it ends.

    It ends with the status of the build, as `drover build` does.
    """
    from coordinator.cli import build as building  # noqa: PLC0415 - slow to import

    return building.watch(Address(url, token_file).client, submission, **options)


@cli.command()
@click.argument(
    "submission", type=Name(), required=False, metavar="[ID|STEP]", shell_complete=completes("submissions", "steps")
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def status(url: str, token_file: str, submission: str | None, as_json: bool) -> int:
    """Show the farm, one submission, or one step."""
    from coordinator.cli import status as showing  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: showing.status(client, submission, as_json=as_json))


@cli.command()
@click.argument("submission", type=Name(), shell_complete=completes("submissions"))
@addressed
def cancel(url: str, token_file: str, submission: str) -> int:
    """Withdraw a submission; builds that another one wants go on."""
    from coordinator.cli import status as showing  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: showing.cancel(client, submission))


@cli.command()
@click.argument("name", type=Name(), metavar="ID|STEP", shell_complete=completes("submissions", "steps"))
@addressed
def retry(url: str, token_file: str, name: str) -> int:
    """Build again what failed of a submission, or one failed step.

    Everything that the failed steps doomed is built too.
    """
    from coordinator.cli import status as showing  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: showing.retry(client, name))


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> int:
    """Print what a shell runs to complete commands and names.

    Names of steps, submissions and workers are completed by asking the farm, a second long at most.

    For bash put `eval "$(drover completion bash)"` into ~/.bashrc, for zsh the same with zsh into ~/.zshrc, for fish
    run `drover completion fish > ~/.config/fish/completions/drover.fish`.
    """
    click.echo(script(cli, shell))
    return OK


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    short_life.begin()
    try:
        status = run(sys.argv[1:])
    except SystemExit as ended:
        # The completion of a word ends so.
        if not isinstance(ended.code, int):
            raise
        status = ended.code
    short_life.end(status)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status; never raises."""
    try:
        status = cli.main(arguments, prog_name="drover", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    except CoordinatorError as error:
        _say(str(error))
        return status_of(getattr(error, "reason", error.code))
    except BrokenPipeError:
        # The reader of the output is gone; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return READER_GONE
    except Exception as error:  # noqa: BLE001 - the last stop: a person gets a sentence, the details go to a file
        return _unforeseen(error)
    return status if isinstance(status, int) else OK


def _say(sentence: str) -> None:
    click.echo(f"drover: {harmless(sentence)}", err=True)


def _unforeseen(error: BaseException) -> int:
    import tempfile  # noqa: PLC0415 - slow to import
    import traceback  # noqa: PLC0415

    details = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="drover-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", errors="replace") as file:
            file.write(details)
        where = f"the details are in {path}"
    except OSError:
        where = "the details could not be written"
    summary = str(error).split("\n", 1)[0][:200] or type(error).__name__
    _say(f"this should not have happened: {summary}; {where}")
    return INFRASTRUCTURE
