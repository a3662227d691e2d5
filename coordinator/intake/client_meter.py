"""Counts of the stages of clients before they submitted, since the start of the process, for metrics.

The farm does not evaluate: clients do, and say with each submission how long their stages took.
"""

from __future__ import annotations

from typing import Final

from coordinator.api.requests import SubmitRequest
from infra.histogram import Histogram

#: Stages of a client, in order.
STAGES: Final = ("evaluate", "closure", "upload")
#: Longest stage that is believed, seconds: a client's clock may jump, and one value must not bend a sum for ever.
LONGEST_S: Final = 86_400.0


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
