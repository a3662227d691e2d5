"""`drover bisect`: the first commit at which a build fails, times out, differs or is slower."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from coordinator.api.difference_models import DifferenceView
from coordinator.bisect.candidates import BisectedAttr, Candidates, asked_of
from coordinator.bisect.errors import BisectError
from coordinator.bisect.history import CommitRecord, commit_of, first_parents
from coordinator.bisect.memory import Arguments, Memory, opened
from coordinator.bisect.search import Judgement, good_again
from coordinator.bisect.session import Bisection, CommitVerdict, Conclusion
from coordinator.bisect.verdicts import Criterion, Outcome, Until
from coordinator.cli import exit_status
from coordinator.cli.bisect_builds import FarmBuilds
from coordinator.cli.evaluation import make_store
from coordinator.cli.import_builds import FarmImports
from coordinator.cli.printing import print_json
from coordinator.cli.reasons import difference_lines
from coordinator.cli.rendering import counted, one_line
from coordinator.cli.screen import Screen
from coordinator.client.api_client import ApiClient
from coordinator.client.closure import local_store
from coordinator.client.errors import RefusedError
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.revisions import Repository
from infra.records import record

#: Name of the state's file below the repository's `.git`.
STATE: Final = "drover-bisect.json"
#: Commits that the answer names of those that cannot be tested.
NAMED: Final = 20
_SHORT: Final = 12


@record(frozen=True, slots=True)
class BisectRequest:
    """Arguments of the command."""

    file: str
    attr: str
    good: str
    bad: str
    until: Until
    factor: float = 1.5
    system: str = ""
    #: `--arg`, `--argstr`, `-I` and `--option` words.
    flags: tuple[str, ...] = ()
    evaluators: int | None = None
    memory_mib: int | None = None
    timeout_s: float = 0.0
    store: str | None = None
    #: File of what is known; None: in the repository's `.git`.
    state: Path | None = None
    restart: bool = False
    as_json: bool = False


def bisect(connect: Callable[[], ApiClient], request: BisectRequest) -> int:
    """Run `drover bisect`; returns the exit status."""
    begun = _Begun()

    async def work() -> int:
        # SIGTERM ends it as Ctrl-C does, so that nothing is left in the temporary directory.
        task = asyncio.ensure_future(search())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    async def search() -> int:
        async with connect() as client:
            return await _bisect(client, request, begun)

    try:
        return asyncio.run(work())
    except (KeyboardInterrupt, asyncio.CancelledError):
        if not begun.state:
            raise KeyboardInterrupt from None
        click.echo(
            f"\ndrover: interrupted; builds go on, and what is known is in {begun.state}: the same command goes on",
            err=True,
        )
        return exit_status.INTERRUPTED


@record(slots=True)
class _Begun:
    """The file of a bisection that an interruption names."""

    state: str = ""


async def _bisect(client: ApiClient, request: BisectRequest, begun: _Begun) -> int:
    screen = Screen.choose(as_json=request.as_json)
    # First of all whether a coordinator answers: evaluations take a while.
    farm = await client.farm()
    file = request.file.partition("#")[0] or "."
    place = Path(file)
    if not await asyncio.to_thread(place.exists):
        raise BisectError(f"{file} does not exist; name the Nix file to evaluate, as it is called now")
    repository = await Repository.around(place, os.environ)
    flags = (*request.flags, *(local_store(request.store).flags if request.store else ()))
    asked = await asked_of(repository, request.file, request.attr, request.system, flags)
    good, bad = await repository.commit_of(request.good), await repository.commit_of(request.bad)
    line = await first_parents(repository, good, bad)
    if await repository.uncommitted():
        screen.line("note: changes of the working tree that are not committed are part of no commit, and not tested")
    path = request.state or repository.git_dir / STATE
    arguments = Arguments(
        good=good,
        bad=bad,
        file=asked.file,
        attr=asked.attr,
        until=request.until,
        factor=request.factor,
        system=request.system,
        flags=flags,
    )
    with opened(path, arguments, restart=request.restart) as memory:
        begun.state = str(path)
        screen.line(_first_line(asked, line, memory))
        await make_store(request.store)
        settings = [word for at, word in enumerate(flags) if word == "--option" for word in flags[at : at + 3]]
        async with FarmImports(client, farm, screen, settings, request.store, wait_s=None) as imports:
            conclusion = await _search(client, request, repository, asked, line, memory, screen, imports)
        report = await _report(client, repository, line, conclusion)
        if report.status != exit_status.INFRASTRUCTURE:
            memory.forget()
    if request.as_json:
        print_json(_document(request, asked, line, conclusion, report))
    else:
        for text in report.lines(conclusion, line):
            screen.line(text)
    return report.status


def _first_line(asked: BisectedAttr, line: Sequence[str], memory: Memory) -> str:
    what = f"{counted(len(line) - 1, 'commit')} after {line[0][:_SHORT]} up to {line[-1][:_SHORT]}"
    known = f"; going on with {counted(len(memory.evaluated), 'evaluation')} of before" if memory.is_old else ""
    return f"bisecting {one_line(asked.name)}: {what}, along first parents{known}"


async def _search(  # noqa: PLR0917 - collaborators, named by their types
    client: ApiClient,
    request: BisectRequest,
    repository: Repository,
    asked: BisectedAttr,
    line: Sequence[str],
    memory: Memory,
    screen: Screen,
    imports: FarmImports,
) -> Conclusion:
    """Search; what the repository or the farm says no to for good is forgotten, so that a corrected command begins."""
    memory_bytes = request.memory_mib and request.memory_mib * 1024 * 1024
    limits = PoolLimits.of_machine(request.evaluators, memory_bytes, request.timeout_s or None)
    store = local_store(request.store)
    builds = FarmBuilds(client, store, screen, until=request.until, label=f"bisect {asked.name}"[:900])
    with memory.directory() as directory:
        candidates = Candidates(repository, asked, directory, limits, imports)
        witness = _Narrator(screen)
        criterion = Criterion(request.until, request.factor)
        bisection = Bisection(line, criterion, candidates.evaluate, builds, memory, witness)
        try:
            return await bisection.run()
        except BisectError:
            memory.forget()
            raise


class _Narrator:
    """Says what a bisection does, a line each."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def evaluated(self, revisions: Sequence[str]) -> None:
        """These commits were evaluated."""
        if revisions:
            self._screen.status(f"evaluated {', '.join(each[:_SHORT] for each in revisions)}")

    def builds(self, revisions: Sequence[str]) -> None:
        """These commits are being built."""
        self._screen.status(f"testing {', '.join(each[:_SHORT] for each in revisions)}")

    def judged(self, revision: str, answer: Judgement, outcome: Outcome, why: str) -> None:
        """A commit was judged."""
        style = {Judgement.GOOD: "green", Judgement.BAD: "red", Judgement.UNTESTABLE: "yellow"}[answer]
        self._screen.line(f"{answer.value:<10} {revision[:_SHORT]} ({outcome.origin.value}): {one_line(why)}", style)

    def passed_over(self, revision: str, why: str) -> None:
        """A commit cannot be tested."""
        self._screen.line(f"{'skipped':<10} {revision[:_SHORT]}: {one_line(why)}", "yellow")


@record(frozen=True, slots=True)
class BisectReport:
    """The answer: the commits that may be the first bad one, and what is different."""

    good: CommitRecord
    bad: CommitRecord
    #: Those before it that cannot be tested, oldest first.
    between: tuple[str, ...]
    why: str
    outcome: Outcome
    good_again: tuple[str, ...]
    #: 0 where one commit is to blame.
    status: int
    difference: DifferenceView | None
    #: Why there is no difference to show.
    trouble: str = ""

    def lines(self, conclusion: Conclusion, line: Sequence[str]) -> list[str]:
        """Return the answer for people."""
        bad = self.bad
        if not self.between:
            lines = ["", f"first bad commit: {bad.revision}", *_commit_lines(bad)]
        else:
            hidden = len(self.between) - NAMED
            lines = [
                "",
                f"first bad commit: {bad.revision}, or one of {len(self.between)} before it that cannot be tested",
                *_commit_lines(bad),
                *(f"  or       {revision}" for revision in self.between[-NAMED:]),
                *([f"  or       one of {hidden} before these"] if hidden > 0 else []),
            ]
        lines += [f"  because  {one_line(self.why)}"]
        lines += [f"  before   {self.good.revision}  {one_line(self.good.subject)}"]
        if self.outcome.failed_step:
            lines.append(f"  its log  drover log {self.outcome.failed_step}")
        if len(bad.parents) > 1:
            lines.append(
                f"  it is a merge; commits of the merged branch: drover bisect --good $(git merge-base "
                f"{bad.parents[0][:_SHORT]} {bad.parents[1][:_SHORT]}) --bad {bad.parents[1][:_SHORT]} …"
            )
        if self.good_again:
            lines.append(
                f"  not the only place: {', '.join(each[:_SHORT] for each in self.good_again[:NAMED])} after it "
                "is good again"
            )
        lines.append("")
        lines += [self.trouble] if self.difference is None else difference_lines(self.difference, time.time())
        return [*lines, "", _figures_line(conclusion, line)]


def _commit_lines(commit: CommitRecord) -> list[str]:
    return [
        f"  subject  {one_line(commit.subject)}",
        f"  author   {one_line(commit.author)}",
        f"  date     {commit.date}",
    ]


def _figures_line(conclusion: Conclusion, line: Sequence[str]) -> str:
    figures = conclusion.figures
    return (
        f"{counted(figures.evaluated, 'commit')} of {len(line)} evaluated; {counted(figures.built, 'derivation')} "
        f"built, {figures.cached} had from the cache, {figures.known} known to fail"
    )


async def _report(
    client: ApiClient, repository: Repository, line: Sequence[str], conclusion: Conclusion
) -> BisectReport:
    found, known = conclusion.found, conclusion.known
    bad = _verdict(conclusion, found.bad)
    difference, trouble = None, ""
    try:
        difference = await client.difference(known.classes[found.bad], known.classes[found.good])
    except RefusedError as error:
        trouble = f"what differs is not known: {error}"
    passing = [at for at in found.between if at in known.classes and not _verdict(conclusion, at).outcome.lasts]
    left = exit_status.INFRASTRUCTURE if passing else exit_status.EVALUATION_FAILED
    return BisectReport(
        good=await commit_of(repository, line[found.good]),
        bad=await commit_of(repository, line[found.bad]),
        between=tuple(line[at] for at in found.between),
        why=bad.why,
        outcome=bad.outcome,
        good_again=tuple(line[at] for at in good_again(known)),
        status=left if found.between else exit_status.OK,
        difference=difference,
        trouble=trouble,
    )


def _verdict(conclusion: Conclusion, position: int) -> CommitVerdict:
    return conclusion.verdicts[conclusion.known.classes[position]]


def _document(
    request: BisectRequest, asked: BisectedAttr, line: Sequence[str], conclusion: Conclusion, report: BisectReport
) -> dict[str, Any]:
    """Return the answer for programs."""
    tested = [
        {
            "commit": verdict.revision,
            "drv": drv,
            "answer": verdict.answer.value,
            "why": verdict.why,
            "origin": verdict.outcome.origin.value,
            "step": verdict.outcome.step,
            "seconds": verdict.outcome.seconds,
        }
        for drv, verdict in conclusion.verdicts.items()
    ]
    return {
        "attr": asked.name,
        "until": request.until.value,
        "first_bad": asdict(report.bad),
        "untestable_before_it": list(report.between),
        "last_good": asdict(report.good),
        "why": report.why,
        "failed_step": report.outcome.failed_step,
        "not_evaluated": conclusion.not_evaluated,
        "good_again": list(report.good_again),
        "commits": len(line) - 1,
        **asdict(conclusion.figures),
        "tested": tested,
        "difference": report.difference,
    }
