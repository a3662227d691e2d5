"""What views ask others about while they render: the core about waiting, the log store about last lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coordinator.logs import LogStore
from infra.clock import Clock
from scheduler.farm import Farm
from scheduler.model import Instant, Requirements, StepKey
from scheduler.reasons import BacksOff, WaitsForSteps


class FarmExplainer:
    """`coordinator.views.Explainer` over a farm and its logs. `name_of` gives a step's name, or nothing."""

    def __init__(self, farm: Farm, logs: LogStore, clock: Clock) -> None:
        self._farm = farm
        self._logs = logs
        self._clock = clock

    def waiting_for(self, step: StepKey, name_of: Callable[[StepKey], str]) -> str:
        """Say why a step does not run."""
        now = Instant(self._clock.now())
        try:
            reason = self._farm.why(step, now)
        except KeyError:
            return ""
        if isinstance(reason, WaitsForSteps):
            names = ", ".join(name_of(key) or key for key in reason.some)
            more = f" and {reason.count - len(reason.some)} more" if reason.count > len(reason.some) else ""
            return f"waits for {names}{more}"
        if isinstance(reason, BacksOff):
            return f"tried again in {max(0.0, reason.until - now):.0f} s after {reason.failures} failures"
        return _for_people(str(reason)) if reason is not None else ""

    def stuck(self, ready: Mapping[Requirements, int]) -> tuple[str, ...]:
        """Say which of the ready steps, counted by what they require, nobody can take, and why."""
        if not ready:
            return ()
        classes = {found.requirements: found.reason for found in self._farm.stuck()}
        return tuple(
            f"{count} {'step waits' if count == 1 else 'steps wait'}: {_for_people(str(classes[requirements]))}"
            for requirements, count in ready.items()
            if requirements in classes
        )

    def log_tail(self, step: StepKey, attempt: int) -> str:
        """Return the last lines of an attempt's log."""
        return self._logs.tail(step, attempt)


def _for_people(reason: str) -> str:
    # The core knows no machines and says "builder"; a program that a derivation runs is called so too.
    return reason.replace("builder", "worker")
