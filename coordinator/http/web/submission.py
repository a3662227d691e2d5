"""View of a submission's page: progress, failures by root cause, what runs, what was reused, what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

from aiohttp import web

from coordinator.api.estimates import SubmissionEtaView
from coordinator.api.flakes import failure_sentence
from coordinator.api.models import FarmView, StepStatus, SubmissionState, SubmissionView
from coordinator.api.origin import origin_words
from coordinator.http.web.guards import VISITOR, html, seen_elsewhere
from coordinator.http.web.lines import QueueLine, StepLine, SubmissionLine, line_of, queue_lines, step_line
from coordinator.http.web.live import LiveStreams
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.texts import short_failure
from coordinator.intake.submissions import Submissions
from coordinator.readmodel.critical_path import submission_eta
from coordinator.readmodel.etas import Etas
from coordinator.readmodel.rows import StepRow, SubmissionRow
from coordinator.readmodel.views import Views
from infra.slices import in_slices
from scheduler.farm import Farm
from scheduler.model import Requirements
from scheduler.pauses import PAUSE, Pause

#: Rows of each list on the page; all steps stand in pages of their own.
ROOTS_SHOWN: Final = 40
CAUSES_SHOWN: Final = 20
ACTIVE_SHOWN: Final = 40
QUEUES_SHOWN: Final = 12
#: Seconds for which a page waits for its submission's end to be worked out; else it comes with the next part.
ETA_WAIT_S: Final = 0.2
#: Failed steps whose recipes' records are read, the first.
RECORDS_READ: Final = 200
#: Members looked at between two pauses.
MEMBERS_LOOKED_AT: Final = 2_000


@dataclass(frozen=True, slots=True)
class CauseLine:
    """A step that failed by itself, and how many others cannot run because of it."""

    step: StepLine
    kind: str
    message: str
    attempt: int
    doomed: int
    log_tail: str
    #: That its recipe can succeed, "" where it never did.
    record: str = ""


@dataclass(frozen=True, slots=True)
class Hint:
    """Something to do next: a sentence, and a command where one does it."""

    text: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class SubmissionData:
    """The whole page."""

    view: SubmissionView
    line: SubmissionLine
    causes: tuple[CauseLine, ...]
    cause_total: int
    active: tuple[StepLine, ...]
    active_total: int
    queues: tuple[QueueLine, ...]
    foreseen: SubmissionEtaView
    hints: tuple[Hint, ...]

    @property
    def origin(self) -> tuple[tuple[str, str], ...]:
        """Whose it is and whence it comes, as words and values."""
        return origin_words(self.view)

    @property
    def running(self) -> bool:
        """True while it may change."""
        return self.view.state is SubmissionState.RUNNING

    @property
    def announcement(self) -> str:
        """Sentence that a screen reader speaks when it changes."""
        counts = self.view.counts
        return f"{self.view.state}, {counts.failed + counts.doomed:,} failed or cannot run"


class SubmissionPage:
    """The page at `/submissions/ID`, and its changes."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        views: Views,
        submissions: Submissions,
        farm: Callable[[], FarmView],
        queues: Callable[[], Mapping[Requirements, str]],
        core: Farm,
        etas: Etas,
        renderer: PageRenderer,
        streams: LiveStreams,
    ) -> None:
        self._core = core
        self._etas = etas
        self._views = views
        self._submissions = submissions
        self._farm = farm
        self._queues = queues
        self._renderer = renderer
        self._streams = streams

    async def show(self, request: web.Request) -> web.Response:
        """Show a submission."""
        row = self._views.submission(request.match_info["id"])
        await self._etas.wait_for([row], ETA_WAIT_S)
        data = await self._data(row)
        return html(await self._renderer.page("submission.html", visitor=request[VISITOR], page=data))

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Stream what changes of it until it has ended."""
        name = self._views.submission(request.match_info["id"]).id
        return await self._streams.serve(request, partial(self._parts, name))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """Withdraw it."""
        return self._back(await self._submissions.cancel(request.match_info["id"]))

    async def retry(self, request: web.Request) -> web.StreamResponse:
        """Build again what failed."""
        return self._back(await self._submissions.retry(request.match_info["id"]))

    async def _parts(self, name: str) -> tuple[Mapping[str, str], bool]:
        row = self._views.submission(name)
        data = await self._data(row)
        return await self._renderer.parts("submission.html", page=data), not data.running

    async def _data(self, row: SubmissionRow) -> SubmissionData:
        await self._views.recipes.fetch(islice(row.failed.values(), RECORDS_READ))
        return await in_slices(self.gathering(row))

    @staticmethod
    def _back(row: SubmissionRow) -> web.StreamResponse:
        return seen_elsewhere(f"/submissions/{row.id}")

    def gathering(self, row: SubmissionRow) -> Generator[Pause | None, None, SubmissionData]:
        """Return what the page shows, with pauses."""
        views = self._views
        view = views.submission_view(row, ROOTS_SHOWN)
        yield PAUSE
        doomed = (yield from self._doomed(row)) if view.counts.doomed else Counter()
        failed = sorted(row.failed.values(), key=lambda step: -doomed[step.key])
        causes = []
        for step in failed[:CAUSES_SHOWN]:
            yield PAUSE
            causes.append(self._cause(step, doomed[step.key]))
        active = []
        # Those that have run longest bound what is to come.
        longest = sorted(row.active.values(), key=lambda step: step.life.started_at)
        for step in longest[:ACTIVE_SHOWN]:
            yield PAUSE
            active.append(step_line(views, step))
        foreseen = yield from submission_eta(views, self._core, self._etas, row)
        return SubmissionData(
            view=view,
            foreseen=foreseen,
            line=line_of(view),
            causes=tuple(causes),
            cause_total=len(row.failed),
            active=tuple(active),
            active_total=len(row.active),
            queues=self._queued(row),
            hints=tuple(self._hints(view, causes)),
        )

    def _doomed(self, row: SubmissionRow) -> Generator[None, None, Counter[str]]:
        """Count the members that cannot run, by the step whose failure is the cause."""
        found: Counter[str] = Counter()
        for count, key in enumerate(row.members, 1):
            member = self._views.row_of(key)
            if member is not None and member.state is StepStatus.DOOMED:
                found[member.life.cause] += 1
            if not count % MEMBERS_LOOKED_AT:
                yield
        return found

    def _cause(self, step: StepRow, doomed: int) -> CauseLine:
        view = self._views.step_view(step)
        failure = step.life.failure
        return CauseLine(
            step=step_line(self._views, step),
            kind=failure.kind if failure is not None else "",
            message=short_failure(failure.message) if failure is not None else "it was tried again since",
            attempt=view.attempt,
            doomed=doomed,
            log_tail=view.log_tail,
            record=failure_sentence(view.record),
        )

    def _queued(self, row: SubmissionRow) -> tuple[QueueLine, ...]:
        ended = row.ended or row.withdrawn
        return () if ended else tuple(queue_lines(row.ready, self._queues())[:QUEUES_SHOWN])

    def _hints(self, view: SubmissionView, causes: list[CauseLine]) -> list[Hint]:
        """Say what to do next."""
        hints = [Hint(f"Read why {cause.step.name} failed.", f"drover log {cause.step.key}") for cause in causes[:3]]
        match view.state:
            case SubmissionState.RUNNING:
                hints += [Hint(f"{each}. Start a worker that can; what waits runs then.") for each in view.stuck]
                return hints or [Hint("Nothing: it goes on by itself.", f"drover watch {view.id}")]
            case SubmissionState.SUPERSEDED:
                return [Hint(f"Submission {view.superseded_by} took its place.", f"drover watch {view.superseded_by}")]
            case SubmissionState.EXPIRED:
                return [Hint("Its deadline passed. Submit its roots again to build them.", "drover build FILE")]
            case SubmissionState.CANCELLED:
                return [Hint("It was cancelled. Submit its roots again to build them.", "drover build FILE")]
            case SubmissionState.FAILED:
                return [*hints, Hint("Build again what failed, once that is mended.", f"drover retry {view.id}")]
            case SubmissionState.SUCCEEDED:
                return self._fetch_hints(view)

    def _fetch_hints(self, view: SubmissionView) -> list[Hint]:
        paths = [path for root in view.roots for path in root.outputs.values()][:1]
        farm = self._farm()
        keys = " ".join(farm.public_keys)
        options = f"--option substituters {farm.cache_url} --option trusted-public-keys '{keys}'"
        return [Hint("Fetch it with any Nix.", f"nix-store -r {path} {options}") for path in paths]
