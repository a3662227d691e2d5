"""Drawing of the farm's throughput: a bar for each stretch of time, and the same in words and as a table."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from coordinator.api.estimates import ThroughputBar, ThroughputView
from coordinator.http.web.texts import clock_text, number_text

#: Measures of a drawing in its own units; the page scales it.
BAR_WIDTH: Final = 10
HEIGHT: Final = 60
#: What a bar is stacked of, from the bottom: the field, the class of its colour.
_PARTS: Final = (("finished", "fill-done"), ("failed", "fill-failed"), ("reused", "fill-waiting"))
_RECT: Final = Markup('<rect class="{}" x="{}" y="{:.1f}" width="{}" height="{:.1f}"/>')
_BAR: Final = Markup('<g><title>{}</title><rect class="ground" x="{}" y="0" width="{}" height="{}"/>{}</g>')
_SVG: Final = Markup(
    '<svg class="throughput" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
)


@dataclass(frozen=True, slots=True)
class ThroughputCard:
    """The throughput of a span of time as the farm's page shows it."""

    id: str
    title: str
    #: The totals in words, which the drawing has as its label.
    words: str
    drawing: Markup
    #: The stretches in which something ended, the newest first: its beginning, and the counts.
    rows: tuple[tuple[str, ThroughputBar], ...]


def throughput_card(name: str, title: str, view: ThroughputView) -> Generator[None, None, ThroughputCard]:
    """Return the drawing of a span, its words and its table, with pauses."""
    words = f"{title}: {_words(view.total)}"
    since = view.until - len(view.bars) * view.every_s
    stretches = [(clock_text(since + place * view.every_s), bar) for place, bar in enumerate(view.bars)]
    most = max((bar.finished + bar.failed + bar.reused for bar in view.bars), default=0) or 1
    body = []
    for place, (begins, bar) in enumerate(stretches):
        yield
        body.append(_drawn(place * BAR_WIDTH, begins, bar, HEIGHT / most))
    drawing = _SVG.format(len(view.bars) * BAR_WIDTH, HEIGHT, words, Markup("").join(body))
    rows = tuple((begins, bar) for begins, bar in reversed(stretches) if bar != ThroughputBar())
    return ThroughputCard(name, title, words, drawing, rows)


def _drawn(x: int, begins: str, bar: ThroughputBar, scale: float) -> Markup:
    rects, y = [], float(HEIGHT)
    for field, colour in _PARTS:
        height = getattr(bar, field) * scale
        if height:
            y -= height
            rects.append(_RECT.format(colour, x + 1, y, BAR_WIDTH - 2, height))
    return _BAR.format(f"{begins} UTC: {_words(bar)}", x, BAR_WIDTH, HEIGHT, Markup("").join(rects))


def _words(bar: ThroughputBar) -> str:
    parts = (bar.finished, "finished"), (bar.failed, "failed"), (bar.reused, "reused")
    return ", ".join(f"{number_text(count)} {word}" for count, word in parts)
