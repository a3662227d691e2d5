"""`drover rebuild`: two sets of packages compared, built as far as they differ, and reported.

What is compared is evaluated on this machine, or was submitted before. Causes are worked out here; the coordinator
says how large the builds are, runs them, and compares the outputs.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Final, Literal

import click

from coordinator.api.limits import MAX_OUTPUT_PAIRS
from coordinator.api.models import StepView, SubmissionView
from coordinator.api.rebuild_models import ComparedOutputView, ForecastView, RebuildCausesView
from coordinator.api.requests import ForecastQuery, PairsQuery
from coordinator.cli import exit_status
from coordinator.cli.evaluation import EvaluationRequest
from coordinator.cli.follow import follow
from coordinator.cli.import_builds import FarmImports
from coordinator.cli.printing import print_json
from coordinator.cli.rebuild_junit import junit
from coordinator.cli.rebuild_markdown import markdown
from coordinator.cli.rebuild_sides import LoadedSide, Sides, SidesRequest, evaluate_sides, result_of, submitted_sides
from coordinator.cli.rebuild_text import difference_lines, report_lines, result_lines
from coordinator.cli.screen import Screen
from coordinator.cli.sending import ClientStages, send_closure, sending_again, taken_after_sending
from coordinator.cli.status import write_report
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import RootBody, SubmitBody
from coordinator.client.closure import ClosureError, LocalStore, read_closure
from coordinator.client.errors import RefusedError
from coordinator.rebuild.causes import causes_view
from coordinator.rebuild.difference import MAX_REASONS, AttrPair, Selection, SetDifference, changed, differ, select
from coordinator.rebuild.model import Package, RebuildReport, RootCause, SideReport
from coordinator.rebuild.outcome import UNKNOWN, SideResult, SideState, by_root_cause, judge, with_content
from coordinator.terminal_controls import harmless
from infra.nix import aterm
from infra.nix.causes import Bounds, Compared, Uncompared
from infra.nix.derivation import Derivation
from infra.nix.difference import ChangedInput, Difference, compare
from infra.nix.errors import FormatError
from infra.nix.rebuilds import FoldedRebuild, few_dependents, fold
from infra.records import record

#: Pairs of derivations that are compared: some minutes.
PAIRS: Final = Bounds(pairs=400_000, depth=1_000)
#: Pairs of outputs of one question, and questions that are put again where one had too many bytes.
OUTPUTS_AT_ONCE: Final = MAX_OUTPUT_PAIRS
MAX_ROUNDS: Final = 100
#: Root causes whose steps are asked for.
MAX_ROOT_CAUSES: Final = 200


@record(frozen=True, slots=True)
class RebuildRequest:
    """Arguments of the command."""

    sides: SidesRequest
    evaluation: EvaluationRequest
    selection: Selection = field(default_factory=Selection)
    settings: tuple[str, ...] = ()
    store: str | None = None
    dry_run: bool = False
    #: `build`: what the base lacks is built. `known`: what the farm knows of it counts.
    base_results: Literal["known", "build"] = "build"
    retry: bool = False
    wait_s: int | None = None
    as_json: bool = False
    markdown: Path | None = None
    junit: Path | None = None
    #: Where the summary of the job goes; None: nowhere.
    summary: Path | None = None


class _Interruption:
    """Submissions that go on where the command is interrupted."""

    def __init__(self) -> None:
        self.submissions: list[str] = []

    def sentences(self) -> list[str]:
        """Return what a person is told."""
        if not self.submissions:
            return ["interrupted; nothing was submitted"]
        first, last = self.submissions[0], self.submissions[-1]
        sentences = [f"interrupted; the builds go on: drover watch {last}"]
        sentences += [f"end it: drover cancel {name}" for name in self.submissions]
        if first != last:
            sentences.append(f"report later: drover rebuild --base-submission {first} --head-submission {last}")
        return sentences


def rebuild(connect: Callable[[], ApiClient], request: RebuildRequest) -> int:
    """Run `drover rebuild`; returns the exit status."""
    interruption = _Interruption()

    async def run() -> int:
        # A checkout is removed when its task is cancelled, so that a runner that stops the job leaves nothing behind.
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it runs in one
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with connect() as client:
            client.on_lost = lambda why: click.echo(f"drover: {harmless(why)}; trying again", err=True)
            return await _Rebuild(client, request, interruption).run()

    try:
        return asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        for sentence in interruption.sentences():
            click.echo(f"drover: {sentence}", err=True)
        return exit_status.INTERRUPTED


class _Rebuild:
    """One run of the command."""

    def __init__(self, client: ApiClient, request: RebuildRequest, interruption: _Interruption) -> None:
        self._client = client
        self._request = request
        self._interruption = interruption
        self._screen = Screen.choose(as_json=request.as_json)
        #: Renders what was not shown before the build.
        self._lines = report_lines

    async def run(self) -> int:
        """Compare, build and report; returns the exit status."""
        request = self._request
        # First of all whether a coordinator answers: an evaluation can take minutes.
        farm = await self._client.farm()

        def imports() -> FarmImports:
            return FarmImports(self._client, farm, self._screen, request.settings, request.store, wait_s=request.wait_s)

        if request.sides.submissions is not None:
            sides = await submitted_sides(self._client, request.sides.submissions)
        else:
            sides = await evaluate_sides(request.sides, request.evaluation, request.settings, request.store, imports)
        whole = differ(sides.base.packages, sides.head.packages)
        difference = await asyncio.to_thread(self._selected, whole, sides)
        causes = await self._causes(changed(difference.pairs), sides.store)
        report = _reported(sides, difference, causes)
        if sides.store is None:
            report = await self._results(report, difference, sides.base.results, sides.head.results)
        elif difference.pairs:
            report = await self._built(report, difference, sides, sides.store)
        return self._finish(report)

    def _selected(self, difference: SetDifference, sides: Sides) -> SetDifference:
        selection, store = self._request.selection, sides.store

        def dependents() -> Mapping[str, object]:
            assert store is not None  # noqa: S101 - refused of submissions
            wanted = {package.drv for package in sides.head.packages.packages.values()}
            needs: dict[str, list[str]] = {}
            for drv in read_closure(store, sorted(wanted)).derivations:
                needs[drv] = [need for need, _ in aterm.parse(store.read(drv)).input_drvs]
            return few_dependents(needs, wanted, selection.at_most_dependents or 0)

        return select(difference, selection, dependents)

    async def _causes(self, pairs: Sequence[AttrPair], store: LocalStore | None) -> RebuildCausesView:
        tops = [ChangedInput(pair.before.drv, pair.after.drv) for pair in pairs if pair.before and pair.after]
        if not tops:
            return RebuildCausesView()
        if store is None:
            query = PairsQuery(before=tuple(top.before for top in tops), after=tuple(top.after for top in tops))
            return await self._client.rebuild_causes(query)
        return causes_view(tops, await asyncio.to_thread(fold_local, store, tops))

    async def _built(
        self, report: RebuildReport, difference: SetDifference, sides: Sides, store: LocalStore
    ) -> RebuildReport:
        """Add the forecast and, unless this is a dry run, the results."""
        heads = [pair.after.attr for pair in difference.pairs if pair.after is not None]
        bases = [pair.before.attr for pair in changed(difference.pairs) if pair.before is not None]
        makers = await self._send(store, sides.head, heads)
        base_makers = await self._send(store, sides.base, bases)
        forecast, base_forecast = await self._forecast(sides.head, heads), await self._forecast(sides.base, bases)
        # Each attribute has its own result.
        report = replace(
            report,
            forecast=forecast and replace(forecast, roots=()),
            base_forecast=base_forecast and replace(base_forecast, roots=()),
        )
        if self._request.dry_run or not heads:
            return report
        for line in difference_lines(report):
            self._screen.line(line)
        self._lines = result_lines
        build_base = self._request.base_results == "build"
        submitted = [await self._submit(store, sides.head, heads, makers)]
        if build_base and bases:
            submitted.insert(0, await self._submit(store, sides.base, bases, base_makers))
        results = []
        for submission in submitted:
            side = sides.head if submission == submitted[-1] else sides.base
            results.append(await self._followed(submission, side, store, heads if side is sides.head else bases))
        base_results = results[0] if len(results) == 2 else _known(base_forecast, sides.base, bases)
        names = submitted if len(submitted) == 2 else ["", *submitted]
        report = replace(
            report,
            base=replace(report.base, submission=names[0]),
            head=replace(report.head, submission=names[1]),
        )
        return await self._results(report, difference, base_results, results[-1])

    async def _send(
        self, store: LocalStore, side: LoadedSide, attrs: Sequence[str], *, whole: bool = False
    ) -> tuple[str, ...]:
        if not attrs:
            return ()
        drvs = list(dict.fromkeys(side.roots[attr].drv for attr in attrs))
        return await send_closure(self._client, store, drvs, self._screen, ClientStages(), whole=whole)

    async def _forecast(self, side: LoadedSide, attrs: Sequence[str]) -> ForecastView | None:
        if not attrs:
            return None
        return await self._client.forecast(ForecastQuery(drvs=_drvs(side, attrs)))

    async def _submit(self, store: LocalStore, side: LoadedSide, attrs: Sequence[str], makers: tuple[str, ...]) -> str:
        roots = tuple(
            RootBody(attr=attr, drv=root.drv, outputs=root.outputs, limits=root.limits)
            for attr, root in ((attr, side.roots[attr]) for attr in attrs)
        )
        request = SubmitBody(
            roots=roots,
            label=f"rebuild: {side.packages.name}"[:200],
            retry_failed=self._request.retry,
            wait_s=self._request.wait_s,
        )

        async def send(whole: bool) -> tuple[str, ...]:
            return await self._send(store, side, attrs, whole=True) if whole else makers

        async def take(makers: tuple[str, ...]) -> SubmissionView:
            return await self._client.submit(replace(request, makers=makers))

        view = await taken_after_sending(send, take)
        self._interruption.submissions.append(view.id)
        self._screen.status(f"submitted {side.packages.name} as {view.id}: {view.counts.total} steps")
        return view.id

    async def _followed(
        self, submission: str, side: LoadedSide, store: LocalStore, attrs: Sequence[str]
    ) -> dict[str, SideResult]:
        """Show a submission until it ends; returns the result of each derivation."""

        async def send_again(whole: bool) -> None:
            await self._send(store, side, attrs, whole=whole)

        failed: dict[str, StepView] = {}
        async with sending_again(send_again, self._screen) as on_step:
            view = await follow(self._client, submission, self._screen, failed, on_step)
        view = await self._client.whole(view)
        return {root.drv: result_of(root.state, root.failure.step if root.failure else "") for root in view.roots}

    async def _results(
        self,
        report: RebuildReport,
        difference: SetDifference,
        base: Mapping[str, SideResult],
        head: Mapping[str, SideResult],
    ) -> RebuildReport:
        """Add results, contents and root causes."""
        reasons = {each.attr: each.causes for each in report.attributes}
        judged = [
            replace(judge(pair, _result(base, pair.before), _result(head, pair.after)), causes=reasons[pair.attr])
            for pair in difference.pairs
        ]
        contents, note = await self._contents(_comparable(difference.pairs, base, head))
        attributes = tuple(with_content(each, contents.get(each.attr, ())) for each in judged)
        known = await self._root_causes({each.root_cause: None for each in judged if each.root_cause})
        return replace(
            report,
            attributes=attributes,
            failures=by_root_cause(attributes, known),
            is_built=True,
            notes=(*report.notes, *([note] if note else [])),
        )

    async def _contents(
        self, wanted: Mapping[str, Sequence[tuple[str, str]]]
    ) -> tuple[dict[str, list[ComparedOutputView]], str]:
        """Have outputs compared; returns what is known by attribute, and a sentence about what is not."""
        known: dict[tuple[str, str], ComparedOutputView] = {}
        left = list(dict.fromkeys(pair for pairs in wanted.values() for pair in pairs))
        for _ in range(MAX_ROUNDS + len(left) // OUTPUTS_AT_ONCE):
            if not left:
                break
            part, left = left[:OUTPUTS_AT_ONCE], left[OUTPUTS_AT_ONCE:]
            query = PairsQuery(before=tuple(before for before, _ in part), after=tuple(after for _, after in part))
            answers = (await self._client.compare_outputs(query)).outputs
            known.update(zip(part, answers, strict=True))
            unread = [pair for pair, each in zip(part, answers, strict=True) if each.likeness == "unread"]
            if len(unread) < len(part):
                left += unread
        missing = sum(each.likeness in {"absent", "too large", "unread"} for each in known.values()) + len(left)
        note = f"{missing} outputs could not be compared: too large, or no longer in the cache" if missing else ""
        found = {attr: [known[pair] for pair in pairs if pair in known] for attr, pairs in wanted.items()}
        return found, note

    async def _root_causes(self, steps: Iterable[str]) -> dict[str, RootCause]:
        found: dict[str, RootCause] = {}
        for key in list(steps)[:MAX_ROOT_CAUSES]:
            try:
                step = await self._client.step(key)
            except RefusedError:
                # It is forgotten meanwhile; its key says enough.
                continue
            failure = step.failure
            kind, message = (failure.kind, failure.message) if failure else ("", "")
            found[key] = RootCause(
                key, step.name, step.system, kind, message, (), step.log_tail, has_log=step.attempt > 0
            )
        return found

    def _finish(self, report: RebuildReport) -> int:
        """Write the report in all forms that are wanted; returns the exit status."""
        request = self._request
        for line in self._lines(report):
            self._screen.line(line)
        for path, text, mode in (
            (request.markdown, markdown, "w"),
            (request.junit, junit, "w"),
            # Steps of a job share its summary.
            (request.summary, markdown, "a"),
        ):
            if path is not None:
                write_report(path, text(report), mode)
        if request.as_json:
            print_json(report)
        if report.fails_newly:
            return exit_status.BUILD_FAILED
        return exit_status.EVALUATION_FAILED if report.is_incomplete else exit_status.OK


def fold_local(store: LocalStore, tops: Sequence[ChangedInput]) -> FoldedRebuild:
    """Return what changed derivations of a local store follow from."""
    work = fold(tops, PAIRS)
    try:
        wanted = next(work)
        while True:
            wanted = work.send([_compared(store, pair) for pair in wanted])
    except StopIteration as end:
        folded: FoldedRebuild = end.value
        return folded


def _compared(store: LocalStore, pair: ChangedInput) -> Compared:
    try:
        before, after = (aterm.parse(store.read(path)) for path in (pair.before, pair.after))
    except (FormatError, ClosureError):
        return Uncompared.UNKNOWN
    # Two ways to one fixed output: what stands on it sees no difference.
    return Difference() if _has_same_outputs(before, after) else compare(before, after)


def _has_same_outputs(before: Derivation, after: Derivation) -> bool:
    paths = [[output.path for output in drv.outputs] for drv in (before, after)]
    return paths[0] == paths[1] and all(paths[0])


def _reported(sides: Sides, difference: SetDifference, causes: RebuildCausesView) -> RebuildReport:
    reasons = dict(zip((pair.attr for pair in changed(difference.pairs)), causes.reasons, strict=True))
    attributes = [replace(pair.report(), causes=reasons.get(pair.attr, ())[:MAX_REASONS]) for pair in difference.pairs]
    reports = [
        SideReport(side.packages.name, len(side.packages.packages), len(side.packages.failed), side.submission)
        for side in (sides.base, sides.head)
    ]
    # Each attribute has its own.
    shown = replace(causes, reasons=())
    return RebuildReport(
        reports[0],
        reports[1],
        tuple(attributes),
        difference.unchanged,
        difference.left_out,
        shown,
        notes=sides.notes,
    )


def _drvs(side: LoadedSide, attrs: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(side.roots[attr].drv for attr in attrs))


def _known(forecast: ForecastView | None, side: LoadedSide, attrs: Sequence[str]) -> dict[str, SideResult]:
    """Return what the farm knew of the base before."""
    if forecast is None:
        return {}
    states = {"cached": SideState.BUILT, "failed": SideState.FAILED}
    return {
        drv: SideResult(states.get(root.state, SideState.UNKNOWN), root.cause)
        for drv, root in zip(_drvs(side, attrs), forecast.roots, strict=True)
    }


def _result(results: Mapping[str, SideResult], package: Package | None) -> SideResult:
    return UNKNOWN if package is None else results.get(package.drv, UNKNOWN)


def _comparable(
    pairs: Iterable[AttrPair], base: Mapping[str, SideResult], head: Mapping[str, SideResult]
) -> dict[str, list[tuple[str, str]]]:
    """Return the outputs that both sides have built, by attribute."""
    found: dict[str, list[tuple[str, str]]] = {}
    for pair in changed(pairs):
        assert pair.before and pair.after  # noqa: S101, PT018 - on both sides
        both = _result(base, pair.before), _result(head, pair.after)
        if all(each.state is SideState.BUILT for each in both):
            after = dict(pair.after.outputs)
            found[pair.attr] = [(path, after[name]) for name, path in pair.before.outputs if name in after]
    return found
