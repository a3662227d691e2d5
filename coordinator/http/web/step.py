"""View of a step's page: why it runs or waits, attempts, outputs, and the graph around it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final
from urllib.parse import quote

from aiohttp import web
from markupsafe import Markup

from coordinator.api.flakes import failure_sentence, flake_sentence
from coordinator.api.models import StepStatus, StepView
from coordinator.errors import BadRequestError
from coordinator.http.web.attempts import AttemptLine, attempt_lines
from coordinator.http.web.graph import DrawnStep, drawing
from coordinator.http.web.guards import VISITOR, html, seen_elsewhere
from coordinator.http.web.lines import StepLine, SubmissionLine, step_line, submission_line
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.texts import date_text, short_failure
from coordinator.intake.submissions import Submissions
from coordinator.readmodel.comparisons import PAGE
from coordinator.readmodel.rows import StepRow
from coordinator.readmodel.runs import Run, Runs
from coordinator.readmodel.surroundings import Surroundings, surrounding
from coordinator.readmodel.views import Views
from coordinator.stores.timings import AttemptTiming, TimingsError, TimingStore
from infra.cache.cache import Cache
from infra.nix.narinfo import NarInfo, parse
from infra.nix.store_path import base_name_of, package_of
from infra.slices import in_slices
from scheduler.farm import Farm
from scheduler.model import StepKey

#: Rows of each list on the page.
SUBMISSIONS_SHOWN: Final = 10
ATTEMPTS_SHOWN: Final = 20
OUTPUTS_SHOWN: Final = 20
#: Paths of an output's closure whose sizes are added up.
CLOSURE_SHOWN: Final = 2_000
#: Steps of which the reasons are remembered, some 20 KiB each.
RAN_REMEMBERED: Final = 64
#: Paths that an output refers to.
REFERENCES_SHOWN: Final = 50
#: Characters of a question.
MAX_FIND: Final = 300
_ENDED: Final = {
    StepStatus.DOOMED: "It cannot run: a step below it has failed.",
    StepStatus.ABANDONED: "No submission wants it any more.",
}
#: States after which a page does not change by itself.
_FINAL: Final = (StepStatus.DONE, StepStatus.FAILED, StepStatus.DOOMED, StepStatus.ABANDONED)


@dataclass(frozen=True, slots=True)
class OutputLine:
    """An output, as the cache has it; without sizes where it has not."""

    name: str
    path: str
    info: NarInfo | None = None
    closure_bytes: int = 0
    closure_paths: int = 0
    #: There are more paths than were looked at.
    closure_more: bool = False

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the first of the paths that it refers to."""
        return () if self.info is None else tuple(map(base_name_of, self.info.path.references[:REFERENCES_SHOWN]))


@dataclass(frozen=True, slots=True)
class StepData:
    """The whole page."""

    view: StepView
    #: In one or two sentences: why it runs, waits, failed, or is done.
    why: str
    #: Why it failed, without the lines of the log that stand beside.
    failure: str
    #: What else its recipe did, where that is not the same; "" elsewhere.
    record: str
    cause: StepLine | None
    submissions: tuple[SubmissionLine, ...]
    attempts: tuple[AttemptLine, ...]
    #: Why timelines may be missing, "" while none are.
    timings_trouble: str
    #: Name without its version.
    package: str
    outputs: tuple[OutputLine, ...]
    needs: tuple[StepLine, ...]
    need_total: int
    waiting: tuple[StepLine, ...]
    waiting_total: int
    run: Run
    #: The build that it is compared with has a page.
    other_known: bool
    #: None for a step that stands alone.
    graph: Markup | None

    @property
    def final(self) -> bool:
        """True where the page stays as it is unless the step is asked for again."""
        return self.view.state in _FINAL


class StepPage:
    """The page at `/steps/KEY`, and the way to it."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        views: Views,
        core: Farm,
        submissions: Submissions,
        cache: Cache,
        timings: TimingStore,
        runs: Runs,
        renderer: PageRenderer,
        streams: LiveStreams,
    ) -> None:
        self._views = views
        self._core = core
        self._submissions = submissions
        self._cache = cache
        self._timings = timings
        self._runs = runs
        #: (step, attempt, state) -> why it ran, the newest: a live page shows the same again and again.
        self._ran: OrderedDict[tuple[str, int, StepStatus], Run] = OrderedDict()
        self._renderer = renderer
        self._streams = streams

    async def find(self, request: web.Request) -> web.StreamResponse:
        """Lead to the step that is looked for."""
        text = request.query.get("find", "").strip()
        if not 0 < len(text) <= MAX_FIND:
            raise BadRequestError("say a part of a step's name, its output or its .drv.")
        return seen_elsewhere(f"/steps/{quote(self._views.step(text).key, safe='')}")

    async def show(self, request: web.Request) -> web.Response:
        """Show a step."""
        data = await self._data(self._views.step(request.match_info["key"]))
        return html(await self._renderer.page("step.html", visitor=request[VISITOR], page=data))

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Stream what changes of it until it has ended."""
        key = self._views.step(request.match_info["key"]).key
        return await self._streams.serve(request, partial(self._parts, key))

    async def retry(self, request: web.Request) -> web.StreamResponse:
        """Build it again, or the step that doomed it."""
        step, _ = await self._submissions.retry_step(request.match_info["key"])
        return seen_elsewhere(f"/steps/{quote(step.key, safe='')}")

    async def _parts(self, key: str) -> tuple[Mapping[str, str], bool]:
        data = await self._data(self._views.step(key))
        return await self._renderer.parts("step.html", page=data), data.final

    async def _data(self, row: StepRow) -> StepData:
        around = await in_slices(surrounding(self._core, row.key))
        await self._views.recipes.fetch([row])
        view = self._views.step_view(row)
        outputs = await self._outputs(view) if view.state is StepStatus.DONE else _bare(view)
        cause = self._views.row_of(StepKey(view.cause)) if view.cause else None
        submissions = [*row.submissions, *self._views.failed_through(row)]
        lines = [submission_line(self._views, each) for each in dict.fromkeys(submissions)][:SUBMISSIONS_SHOWN]
        numbers = range(view.attempt, max(0, view.attempt - ATTEMPTS_SHOWN), -1)
        timings, trouble = await self._kept(row.key) if view.attempt else ([], "")
        run = await self._run(row)
        other = run.difference.other if run.difference else None
        return StepData(
            view=view,
            why=_why(view, around),
            failure=short_failure(view.failure.message) if view.failure is not None else "",
            record=failure_sentence(view.record) if view.failure is not None else flake_sentence(view.record),
            cause=step_line(self._views, cause) if cause is not None else None,
            submissions=tuple(lines),
            attempts=attempt_lines(numbers, timings),
            timings_trouble=trouble,
            package=package_of(view.name or view.key),
            outputs=outputs,
            needs=self._lines(around.needs.steps),
            need_total=around.needs.total,
            waiting=self._lines(around.waiting.steps),
            waiting_total=around.waiting.total,
            run=run,
            other_known=other is not None and self._views.row_of(StepKey(other.step)) is not None,
            graph=drawing(around, self._node) if around.edges else None,
        )

    async def _run(self, row: StepRow) -> Run:
        """Return why it ran, and what differs from the last build of its name."""
        now = (row.key, row.life.attempt, row.state)
        run = self._ran.pop(now, None)
        if run is None:
            await self._runs.differences.refresh()
            run = await self._runs.of(row, PAGE)
        self._ran[now] = run
        if len(self._ran) > RAN_REMEMBERED:
            self._ran.popitem(last=False)
        return run

    async def _kept(self, key: StepKey) -> tuple[list[AttemptTiming], str]:
        """Return the timings of a step's attempts, and why some may be missing: the page has more to show."""
        try:
            return await self._timings.of_steps([key]), self._timings.trouble
        except TimingsError as error:
            return [], str(error)

    def _lines(self, keys: Sequence[StepKey]) -> tuple[StepLine, ...]:
        rows = [self._views.row_of(key) for key in keys]
        return tuple(step_line(self._views, row) for row in rows if row is not None)

    def _node(self, key: str) -> DrawnStep:
        row = self._views.row_of(StepKey(key))
        return DrawnStep(key, StepStatus.WAITING) if row is None else DrawnStep(self._views.name_of(row), row.state)

    async def _outputs(self, view: StepView) -> tuple[OutputLine, ...]:
        lines = []
        for name, path in list(view.outputs.items())[:OUTPUTS_SHOWN]:
            infos, _ = await self._cache.closure([path], at_most=CLOSURE_SHOWN + 1)
            lines.append(await asyncio.to_thread(self._output, name, path, infos))
        return tuple(lines)

    def _output(self, name: str, path: str, infos: Sequence[bytes]) -> OutputLine:
        parsed = [parse(info, self._cache.store_dir) for info in infos]
        own = next((info for info in parsed if info.store_path == path), None)
        more = len(parsed) > CLOSURE_SHOWN
        return OutputLine(name, path, own, sum(info.path.nar_size for info in parsed), len(parsed), closure_more=more)


def _bare(view: StepView) -> tuple[OutputLine, ...]:
    return tuple(OutputLine(name, path) for name, path in list(view.outputs.items())[:OUTPUTS_SHOWN])


def _why(view: StepView, around: Surroundings) -> str:
    """Say why a step is where it is."""
    match view.state:
        case StepStatus.RUNNING | StepStatus.PUBLISHING:
            count = around.waiting.total
            waiting = f"; {count:,} {'step waits' if count == 1 else 'steps wait'} for it" if count else ""
            return f"It is built because a submission wants it and the cache lacks it{waiting}."
        case StepStatus.DONE:
            built = "It was built here, and its outputs are in the cache."
            return built if view.started_at else "Its outputs were in the cache before."
        case StepStatus.FAILED:
            known = view.waiting.until if view.waiting is not None else 0.0
            until = f" Submissions that want it take that for known until {date_text(known)}." if known else ""
            return f"It failed by itself.{until}"
        case StepStatus.DOOMED | StepStatus.ABANDONED:
            return _ENDED[view.state]
        case _:
            return f"{view.waiting_for[:1].upper()}{view.waiting_for[1:]}."
