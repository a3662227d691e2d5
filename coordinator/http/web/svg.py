"""Drawings that the server makes: SVG without styles, whose colours are classes of the style sheet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from markupsafe import Markup

#: Width of a bar in its own units; a smaller share than one of these is drawn as one.
BAR_WIDTH: Final = 1000
_RECT: Final = Markup('<rect class="fill-{}" x="{}" width="{}" height="8"/>')
_BAR: Final = Markup(
    '<svg class="bar" viewBox="0 0 {} 8" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
)


def bar(label: str, shares: Iterable[tuple[str, int]], total: int) -> Markup:
    """Return a bar of coloured shares (class, count) of a total; `label` says the same in words."""
    rects, x = [], 0
    for name, count in shares:
        if count and total:
            width = min(max(1, round(count * BAR_WIDTH / total)), BAR_WIDTH - x)
            rects.append(_RECT.format(name, x, width))
            x += width
    return _BAR.format(BAR_WIDTH, label, Markup("").join(rects))
