"""Causes of a rebuild as the API has them."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.api.difference_models import ChangeView
from coordinator.api.rebuild_models import RebuildCausesView, RebuildCauseView
from infra.nix.difference import ChangedInput
from infra.nix.rebuilds import FoldedRebuild, RebuildCause
from infra.nix.store_path import base_name_of


def causes_view(changed: Sequence[ChangedInput], folded: FoldedRebuild) -> RebuildCausesView:
    """Render the causes of `changed`, with the places of each one's causes in its order."""
    return RebuildCausesView(
        causes=tuple(map(_cause_view, folded.causes)),
        cause_count=folded.cause_count,
        reasons=tuple(folded.reasons[pair] for pair in changed),
        compared=folded.compared,
        unfollowed=folded.unfollowed,
    )


def _cause_view(cause: RebuildCause) -> RebuildCauseView:
    return RebuildCauseView(
        names=cause.names,
        count=cause.count,
        reach=cause.reach,
        changes=tuple(
            ChangeView(field=each.field.value, name=each.name, before=each.before, after=each.after)
            for each in cause.changes
        ),
        change_count=cause.change_count,
        drv=base_name_of(cause.pair.after),
        previous_drv=base_name_of(cause.pair.before),
        uncompared=cause.uncompared.value if cause.uncompared else "",
    )
