"""Critical path so far: the chain of steps that in fact bounded the time of a submission, from its end downwards.

Each step of the chain waited for the one before it, which was the last of its needs to end. What lies between the end
of one and the lease of the next was spent waiting: for a slot, or with attempts that came to nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Final

from coordinator.api.estimates import PathStepView, PathView, SubmissionEtaView
from coordinator.api.models import StepStatus
from coordinator.readmodel.etas import Etas, load_views
from coordinator.readmodel.rows import StepRow, SubmissionRow
from coordinator.readmodel.views import Views
from scheduler.farm import Farm
from scheduler.model import StepKey
from scheduler.pauses import PAUSE, PIECE, Pause

#: Steps of the chain that are followed, and the last ones of these that are named.
FOLLOWED: Final = 4096
NAMED: Final = 24


def submission_eta(
    views: Views, farm: Farm, etas: Etas, row: SubmissionRow
) -> Generator[Pause, None, SubmissionEtaView]:
    """Return when a submission ends, as far as that is worked out, with the critical path so far and to come."""
    foreseen = etas.foreseen(row)
    if foreseen is None:
        so_far = yield from path_so_far(views, farm, row, None)
        return SubmissionEtaView(submission=row.id, eta=None, so_far=so_far, to_come=PathView())
    path = etas.path(foreseen)
    estimate = foreseen.estimate
    so_far = yield from path_so_far(views, farm, row, views.row_of(StepKey(path[0].step)) if path else None)
    return SubmissionEtaView(
        submission=row.id,
        eta=foreseen.view,
        so_far=so_far,
        to_come=PathView(steps=path, count=estimate.path_steps, seconds=estimate.path_s),
        loads=load_views(foreseen),
    )


def path_so_far(
    views: Views, farm: Farm, submission: SubmissionRow, following: StepRow | None
) -> Generator[Pause, None, PathView]:
    """Return the chain, with pauses: down from `following`, an unfinished step, or from what ended last."""
    since = submission.created_at
    if following is None:
        last = yield from _last_of(views, submission.members, since)
    else:
        last = yield from _last_of(views, farm.needs(following.key), since)
    chain: list[StepRow] = []
    while last is not None and len(chain) < FOLLOWED:
        chain.append(last)
        last = yield from _last_of(views, farm.needs(last.key), since, before=last.life.ended_at)
    if not chain:
        return PathView()
    shown = []
    for row, earlier in zip(chain[:NAMED], [*chain[1:], None], strict=False):
        begun = max(since, earlier.life.ended_at if earlier is not None else since)
        shown.append(_link(views, row, begun))
    return PathView(steps=tuple(reversed(shown)), count=len(chain), seconds=chain[0].life.ended_at - since)


def _last_of(
    views: Views, keys: Iterable[StepKey], since: float, before: float = float("inf")
) -> Generator[Pause, None, StepRow | None]:
    """Return the step that ended last, of those that were built (or failed) since a moment."""
    found: StepRow | None = None
    for count, key in enumerate(keys, 1):
        row = views.row_of(key)
        # Strictly before: two that end together stand on each other in one order only.
        if (
            row is not None
            and row.state in _ENDED
            and since < row.life.ended_at < before
            and (found is None or row.life.ended_at > found.life.ended_at)
        ):
            found = row
        if not count % PIECE:
            yield PAUSE
    return found


_ENDED: Final = frozenset({StepStatus.DONE, StepStatus.FAILED})


def _link(views: Views, row: StepRow, begun: float) -> PathStepView:
    life = row.life
    # One that ran for another submission already was waited for from the beginning.
    started_at = min(max(life.started_at, begun), life.ended_at)
    return PathStepView(
        step=row.key,
        name=views.name_of(row),
        state=row.state,
        worker=life.builder,
        started_at=life.started_at,
        took_s=life.ended_at - started_at,
        waited_s=max(0.0, started_at - begun),
    )
