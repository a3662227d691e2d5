"""Timelines of attempts: where the time of each went, as stretches of one bar and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from coordinator.http.web.texts import bytes_text, seconds_text, short_failure
from coordinator.stores.timings import AttemptTiming

#: Width of a bar in its own units.
WIDTH: Final = 1000
#: Stretches by their names, in their order; agents send those between waiting and verifying.
STRETCHES: Final = ("waiting", "inputs", "build", "pack", "upload", "verify", "publish")
#: Inputs that are listed of each attempt.
FETCHES_SHOWN: Final = 20
#: Outcomes that are not said by their own word.
_ENDINGS: Final = {"retried": "failed, tried again", "returned": "handed back", "moved": "moved to a faster worker"}
_RECT: Final = Markup('<rect class="span-{}" x="{:.1f}" width="{:.1f}" height="8"><title>{}</title></rect>')
_BAR: Final = Markup(
    '<svg class="bar" viewBox="0 0 {} 8" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
)


@dataclass(frozen=True, slots=True)
class StretchLine:
    """A part of an attempt; times in Unix seconds and seconds."""

    name: str
    at: float
    took_s: float


@dataclass(frozen=True, slots=True)
class FetchLine:
    """An input that an attempt waited for."""

    path: str
    source: str
    size: int
    took_s: float


@dataclass(frozen=True, slots=True)
class AttemptLine:
    """An attempt with its timeline; without one where nothing was kept of it."""

    number: int
    timing: AttemptTiming | None
    stretches: tuple[StretchLine, ...] = ()
    phases: tuple[StretchLine, ...] = ()
    #: Its largest fetches, and how many it had.
    fetches: tuple[FetchLine, ...] = ()
    fetched: int = 0

    @property
    def used(self) -> str:
        """Processor time, memory and bytes of the build, as far as they are known."""
        timing = self.timing
        if timing is None:
            return ""
        parts = (
            (timing.cpu_s, seconds_text, "{} of processor"),
            (timing.peak_memory_bytes, bytes_text, "at most {} of memory"),
            (timing.read_bytes, bytes_text, "{} read from disks"),
            (timing.written_bytes, bytes_text, "{} written"),
            (timing.fetched_bytes or None, bytes_text, "{} of inputs fetched"),
            (timing.output_bytes, bytes_text, "{} of outputs"),
            (timing.uploaded_bytes, bytes_text, "sent as {}"),
        )
        return ", ".join(form.format(text(value)) for value, text, form in parts if value is not None)

    @property
    def ending(self) -> str:
        """Its outcome in words."""
        outcome = self.timing.outcome if self.timing is not None else None
        return _ENDINGS.get(outcome, outcome) if outcome is not None else "runs"

    @property
    def trouble(self) -> str:
        """Message of the failure that ended it; "" where none did."""
        message = self.timing.message if self.timing is not None else None
        return short_failure(message) if message else ""

    @property
    def bar(self) -> Markup:
        """The timeline, drawn; nothing where there is none."""
        if not self.stretches:
            return Markup("")
        begin = min(each.at for each in self.stretches)
        end = max(each.at + each.took_s for each in self.stretches)
        scale = WIDTH / max(end - begin, 0.001)
        rects = [
            _RECT.format(class_of(each.name), (each.at - begin) * scale, max(1.0, each.took_s * scale), each.name)
            for each in self.stretches
        ]
        summary = ", ".join(f"{each.name} {each.took_s:.1f} s" for each in self.stretches)
        return _BAR.format(WIDTH, summary, Markup("").join(rects))


def attempt_lines(numbers: Sequence[int], timings: Sequence[AttemptTiming]) -> tuple[AttemptLine, ...]:
    """Return a line for each attempt, in the order of their numbers."""
    by_number = {timing.attempt: timing for timing in timings}
    return tuple(_line(number, by_number.get(number)) for number in numbers)


def _line(number: int, timing: AttemptTiming | None) -> AttemptLine:
    if timing is None:
        return AttemptLine(number, None)
    measured = timing.measured
    stretches = [StretchLine(*span) for span in measured.spans] if measured is not None else []
    phases = [StretchLine(*phase) for phase in measured.phases] if measured is not None else []
    if timing.ready_at and timing.leased_at and timing.leased_at > timing.ready_at:
        stretches.insert(0, StretchLine("waiting", timing.ready_at, timing.leased_at - timing.ready_at))
    if timing.verify_at is not None and timing.verify_s is not None:
        stretches.append(StretchLine("verify", timing.verify_at, timing.verify_s))
        if timing.publish_s is not None:
            stretches.append(StretchLine("publish", timing.verify_at + timing.verify_s, timing.publish_s))
    if measured is None:
        return AttemptLine(number, timing, tuple(stretches), tuple(phases))
    largest = sorted(measured.fetches, key=lambda fetch: -fetch[2])[:FETCHES_SHOWN]
    fetches = tuple(FetchLine(path, source, size, took_s) for path, source, size, _, took_s, _ in largest)
    fetched = len(measured.fetches) + measured.more_fetches
    return AttemptLine(number, timing, tuple(stretches), tuple(phases), fetches, fetched)


def class_of(name: str) -> str:
    """Return a stretch's class; names come from agents."""
    return name if name in STRETCHES else "other"
