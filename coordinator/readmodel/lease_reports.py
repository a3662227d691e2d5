"""Reports of workers about their leases that are not worth a fact: stages, phases, and how far transfers are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from coordinator.api.models import StepStatus, TransferView
from coordinator.readmodel.rows import StepRow, notify_bytes_moved, notify_step_changed
from scheduler.model import StepKey
from workers.wire.messages import Stage, StageChange, Transfer

#: Stage of a lease in which bytes go in a direction.
_STAGE_OF: Final[Mapping[str, str]] = {"fetch": Stage.FETCHING.value, "upload": Stage.UPLOADING.value}


class LeaseReports:
    """Rows of steps, and what workers send of those that they have."""

    def __init__(self) -> None:
        self._steps: dict[StepKey, StepRow] = {}

    def stage(self, change: StageChange) -> None:
        """Take in the stage of a lease as its worker reports it; stale reports are ignored."""
        row = self._steps.get(StepKey(change.step))
        if row is None or row.life.attempt != change.attempt or row.state is not StepStatus.RUNNING:
            return
        life = row.mutable_life()
        if (life.stage, life.phase) != (change.stage.value, change.phase):
            if life.stage != change.stage.value:
                life.transfer = None
            life.stage, life.phase = change.stage.value, change.phase
            notify_step_changed(row)

    def transfers(self, worker: str, moving: Iterable[Transfer], now: float) -> None:
        """Take in how far a worker's transfers are; those of leases that it does not hold are ignored."""
        for each in moving:
            row = self._steps.get(StepKey(each.step))
            if row is None or row.state is not StepStatus.RUNNING:
                continue
            life = row.life
            if (life.attempt, life.builder, life.stage) != (each.attempt, worker, _STAGE_OF[each.direction]):
                continue
            view = TransferView(
                direction=each.direction,
                path=each.path,
                source=each.source,
                done_bytes=each.done_bytes,
                size_bytes=each.size_bytes,
            )
            if view != life.transfer:
                row.mutable_life().transfer = view
                notify_bytes_moved(row, now)
