"""Seconds that attempts spent in each of their phases since the start of the process, for metrics.

Labels are bounded: the phases of an attempt are the farm's own, and of the phases that builders announce those of
Nixpkgs' standard environment have a name here; all others are `other`, because any build may name as many as it likes.
"""

from __future__ import annotations

from typing import Final

from infra.histogram import Histogram

#: Phases of an attempt, in order. Between two of them it may have waited on its worker, for a slot.
PHASES: Final = ("wait", "inputs", "build", "pack", "upload", "verify", "publish")
#: Phases of `stdenv.mkDerivation` (Nixpkgs, pkgs/stdenv/generic/setup.sh).
STANDARD_PHASES: Final = (
    "unpackPhase",
    "patchPhase",
    "updateAutotoolsGnuConfigScriptsPhase",
    "configurePhase",
    "buildPhase",
    "checkPhase",
    "installPhase",
    "fixupPhase",
    "installCheckPhase",
    "distPhase",
)
OTHER: Final = "other"


class AttemptMeter:
    """Histograms by phase, and what was fetched ahead.

    Each histogram is there from the start, so that a first duration shows as an increase.
    """

    def __init__(self) -> None:
        self.phases = {phase: Histogram() for phase in PHASES}
        self.builder_phases = {phase: Histogram() for phase in (*STANDARD_PHASES, OTHER)}
        #: Attempts of which inputs had come ahead of the lease, and the bytes of these.
        self.helped = self.ahead_bytes = 0

    def spent(self, phase: str, seconds: float) -> None:
        """Count a stretch of an attempt; one that is none of `PHASES` is left out."""
        found = self.phases.get(phase)
        if found is not None:
            found.add(seconds)

    def built(self, phase: str, seconds: float) -> None:
        """Count a phase that a builder announced."""
        self.builder_phases.get(phase, self.builder_phases[OTHER]).add(seconds)

    def came_ahead(self, bytes_: int) -> None:
        """Count the inputs of one attempt that had come ahead of its lease."""
        if bytes_ > 0:
            self.helped += 1
            self.ahead_bytes += bytes_
