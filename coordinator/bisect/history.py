"""The line of commits between two of a local git repository, along first parents.

A merge stands on it as one commit: what it brought was tested as a whole by the one who merged it, or never, and a
commit of the merged branch may not even build. So a search ends at the merge, and goes on inside of it if asked to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coordinator.bisect.errors import BisectError
from coordinator.evaluation.revisions import Repository

#: Commits of the longest line.
MAX_COMMITS: Final = 100_000
_FIELDS: Final = "%H%x00%P%x00%an <%ae>%x00%aI%x00%s"
_SHORT: Final = 12


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """A commit as people know it."""

    revision: str
    parents: tuple[str, ...]
    author: str
    #: ISO 8601.
    date: str
    subject: str


async def first_parents(repository: Repository, good: str, bad: str) -> tuple[str, ...]:
    """Return the commits from `good` to `bad`, which are hashes of commits.

    Raises:
        BisectError: `good` does not stand on that line.
    """
    if good == bad:
        raise BisectError(f"the good and the bad commit are the same, {good[:_SHORT]}; name two")
    if (await repository.ask("merge-base", "--is-ancestor", good, bad)).returncode != 0:
        advice = "is --bad the older one? `git log --first-parent` shows the history"
        if await _is_shallow(repository):
            advice = "this clone is shallow: fetch the rest with `git fetch --unshallow`"
        raise BisectError(f"the good commit {good[:_SHORT]} is no ancestor of the bad one {bad[:_SHORT]}; {advice}")
    listed = await _answer(repository, "rev-list", "--first-parent", f"--max-count={MAX_COMMITS + 1}", bad, f"^{good}")
    revisions = listed.split()[::-1]
    if len(revisions) > MAX_COMMITS:
        raise BisectError(f"more than {MAX_COMMITS} commits lie between the two; choose them closer together")
    parents = (await commit_of(repository, revisions[0])).parents
    if parents[:1] != (good,):
        hint = f"; name {parents[0][:_SHORT]}, where that line leaves it" if parents else ""
        raise BisectError(
            f"the good commit {good[:_SHORT]} came into the history of {bad[:_SHORT]} by a merge and does not stand on "
            f"its line of first parents{hint}"
        )
    return (good, *revisions)


async def commit_of(repository: Repository, revision: str) -> CommitRecord:
    """Return a commit with what people know of it."""
    shown = await _answer(repository, "show", "-s", "--no-show-signature", f"--format={_FIELDS}", revision, "--")
    fields = shown.rstrip("\n").split("\0")
    return CommitRecord(fields[0], tuple(fields[1].split()), *fields[2:5])


async def _is_shallow(repository: Repository) -> bool:
    return (await _answer(repository, "rev-parse", "--is-shallow-repository")).strip() == "true"


async def _answer(repository: Repository, *arguments: str) -> str:
    done = await repository.ask(*arguments)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise BisectError(f"git {arguments[0]} failed in {repository.root}: {lines[-1]}")
    return done.stdout.decode(errors="replace")
