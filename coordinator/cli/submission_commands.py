"""The words of the commands about submissions as a whole: which there are, which goes first, how they end."""

from __future__ import annotations

from typing import Any

import click

from coordinator.api.limits import HIGHEST_PRIORITY, LOWEST_PRIORITY
from coordinator.cli.completion import completes
from coordinator.cli.options import Name, Wait, addressed, run_with_client
from coordinator.cli.sections import ExampledCommand
from coordinator.cli.submission_options import Tags

#: As `coordinator.api.models.SubmissionState`, which is slow to import; a test compares them.
STATES = ("running", "succeeded", "failed", "cancelled", "superseded", "expired")


@click.command(cls=ExampledCommand)
@click.option("--state", "states", type=click.Choice(STATES), multiple=True, help="Only in this state; repeatable.")
@click.option("--owner", default="", help="Only of this owner.")
@click.option("--branch", default="", help="Only of this branch.")
@click.option("--pull", default="", help="Only of this pull request.")
@click.option("--label", default="", help="Only with this label.")
@click.option("--tag", type=Tags(), metavar="KEY=VALUE", help="Only with this tag.")
@click.option("--since", type=Wait(), help="Only those of the last so long, as 2h or 7d.")
@click.option("--newest", type=click.IntRange(1, 10_000), default=20, show_default=True, help="So many at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@addressed
def submissions(url: str, token_file: str, newest: int, as_json: bool, **options: Any) -> int:
    """List submissions, the newest first, all or some."""
    from coordinator.cli import submissions as listing  # noqa: PLC0415 - slow to import

    tag = options.pop("tag")
    filters = {
        "state": ",".join(options.pop("states")),
        "within": str(options.pop("since") or ""),
        "tag": "=".join(tag) if tag else "",
        **options,
    }
    given = {name: value for name, value in filters.items() if value}
    return run_with_client(url, token_file, lambda client: listing.submissions(client, given, newest, as_json=as_json))


@click.command(cls=ExampledCommand)
@click.argument("submission", type=Name(), shell_complete=completes("submissions"))
@click.option(
    "--priority",
    type=click.IntRange(LOWEST_PRIORITY, HIGHEST_PRIORITY),
    help="Which.  [default: above all that wait of its owner]",
)
@addressed
def bump(url: str, token_file: str, submission: str, priority: int | None) -> int:
    """Let a submission go before others of its owner.

    Owners share the farm by their weights whatever the priorities of their submissions.
    """
    from coordinator.cli import submissions as listing  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: listing.bump(client, submission, priority))


@click.command(cls=ExampledCommand)
@click.argument("names", type=Name(), metavar="ID...", nargs=-1, required=True, shell_complete=completes("submissions"))
@click.option("--timeout", "timeout_s", type=Wait(), default="forever", help="Give up after this time.  [forever]")
@click.option("--json", "as_json", is_flag=True, help="Print the submissions as JSON at the end.")
@addressed
def wait(url: str, token_file: str, names: tuple[str, ...], timeout_s: int, as_json: bool) -> int:
    """Wait until submissions have ended.

    The exit status is that of the worst end, as of `drover build`; 4 where the time is over. A coordinator that
    starts again meanwhile does not end it.
    """
    from coordinator.cli import submissions as listing  # noqa: PLC0415 - slow to import

    return run_with_client(url, token_file, lambda client: listing.wait(client, names, timeout_s, as_json=as_json))
