"""Counts of the stages of clients before they submitted, since the start of the process, for metrics.

The farm does not evaluate: clients do, and say with each submission how long their stages took.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from coordinator.api.requests import ClientStage, SubmitRequest
from infra.histogram import Histogram

#: Stages of a client, in order.
STAGES: Final = ("evaluate", "closure", "upload")
#: Longest stage that is believed, seconds: a client's clock may jump, and one value must not bend a sum for ever.
LONGEST_S: Final = 86_400.0


def placed(stages: Sequence[ClientStage], received_at: float) -> tuple[tuple[str, float, float], ...]:
    """Return stages by the coordinator's clock: the last one ended when the request that carries them was received.

    However wrong a client's clock is, its stages keep their lengths and lie together before that moment.
    """
    ahead = max((stage.end for stage in stages), default=0.0) - received_at
    earliest = received_at - LONGEST_S
    times = ((stage.name, max(earliest, stage.begin - ahead), max(earliest, stage.end - ahead)) for stage in stages)
    return tuple((name, begin, max(begin, end)) for name, begin, end in times)


class ClientMeter:
    """Numbers of all accepted submissions."""

    def __init__(self) -> None:
        self.stages = {stage: Histogram() for stage in STAGES}
        #: Derivations behind the steps of submissions; one that is submitted again counts again.
        self.derivations = 0

    def count(self, wish: SubmitRequest, derivations: int) -> None:
        """Count an accepted submission."""
        self.derivations += derivations
        for stage in wish.stages:
            self.stages[stage.name].add(min(max(0.0, stage.end - stage.begin), LONGEST_S))
