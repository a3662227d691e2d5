"""Views of lists in pages: all submissions, the steps of one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from coordinator.api.models import StepStatus
from coordinator.errors import BadRequestError
from coordinator.http.web.guards import VISITOR, html
from coordinator.http.web.lines import StepLine, SubmissionLine, step_line, submission_line
from coordinator.http.web.rendering import PageRenderer
from coordinator.http.web.submission import MEMBERS_LOOKED_AT
from coordinator.readmodel.rows import SubmissionRow
from coordinator.readmodel.views import Views
from infra.slices import in_slices
from scheduler.model import StepKey

#: Rows of one page.
STEPS_SHOWN: Final = 200
SUBMISSIONS_SHOWN: Final = 50
#: Digits of a position in a list.
_DIGITS: Final = 9


@dataclass(frozen=True, slots=True)
class StepsData:
    """A page of steps."""

    line: SubmissionLine
    #: The state that is chosen, "" for all; and how many are in each.
    state: str
    counts: dict[str, int]
    steps: tuple[StepLine, ...]
    #: Where the next page begins, 0 where this is the last.
    following: int
    after: int


class SubmissionLists:
    """The pages at `/submissions` and `/submissions/ID/steps`."""

    def __init__(self, views: Views, renderer: PageRenderer) -> None:
        self._views = views
        self._renderer = renderer

    async def submissions(self, request: web.Request) -> web.Response:
        """List submissions, newest first."""
        after = request.query.get("after", "")
        rows = self._views.submissions_after(after, SUBMISSIONS_SHOWN + 1)

        def gathering() -> Generator[None, None, list[SubmissionLine]]:
            lines = []
            for row in rows[:SUBMISSIONS_SHOWN]:
                yield
                lines.append(submission_line(self._views, row))
            return lines

        lines = await in_slices(gathering())
        following = lines[-1].id if len(rows) > SUBMISSIONS_SHOWN else ""
        body = await self._renderer.page(
            "submissions.html", visitor=request[VISITOR], lines=lines, following=following, after=after
        )
        return html(body)

    async def steps(self, request: web.Request) -> web.Response:
        """List the steps of a submission, all or those in one state."""
        row = self._views.submission(request.match_info["id"])
        data = await in_slices(self.gathering(row, _state_of(request), _position_of(request)))
        return html(await self._renderer.page("steps.html", visitor=request[VISITOR], page=data))

    def gathering(self, row: SubmissionRow, state: StepStatus | None, after: int) -> Generator[None, None, StepsData]:
        """Return a page of steps behind the first `after` members, with pauses."""
        line = submission_line(self._views, row)
        counts = {each.value: getattr(line.counts, each.value) for each in StepStatus}
        counts["done"] += line.counts.held
        found: list[StepLine] = []
        members, position = row.members, after
        while position < len(members) and len(found) < STEPS_SHOWN:
            member = self._views.row_of(StepKey(members[position]))
            position += 1
            if member is not None and (state is None or member.state is state):
                found.append(step_line(self._views, member))
            if not position % MEMBERS_LOOKED_AT:
                yield
        following = position if position < len(members) else 0
        return StepsData(line, state or "", counts, tuple(found), following, after)


def _state_of(request: web.Request) -> StepStatus | None:
    name = request.query.get("state", "")
    try:
        return StepStatus(name) if name else None
    except ValueError:
        raise BadRequestError(f"a step's state is one of {', '.join(StepStatus)}.") from None


def _position_of(request: web.Request) -> int:
    digits = request.query.get("after", "0")
    if not digits.isascii() or not digits.isdigit() or len(digits) > _DIGITS:
        raise BadRequestError("`after` is the number of rows before the page.")
    return int(digits)
