"""Drawing of the graph around a step: five columns, what is needed on the left, what stands on it on the right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from markupsafe import Markup

from coordinator.readmodel.surroundings import Level, Surroundings

#: Measures in pixels.
BOX_WIDTH: Final = 168
BOX_HEIGHT: Final = 30
COLUMN_GAP: Final = 44
ROW_GAP: Final = 10
MARGIN: Final = 4
#: Characters of a name in its box.
NAME_CHARS: Final = 22

_SVG: Final = Markup(
    '<svg class="graph" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="group" '
    'aria-label="{label}">'
    "{edges}{boxes}</svg>"
)
_EDGE: Final = Markup('<path class="edge" d="M{x0} {y0}C{x1} {y0} {x1} {y2} {x2} {y2}"/>')
_BOX: Final = Markup(
    '<a href="/steps/{address}"{current}><title>{title}</title>'
    '<rect class="box is-{state}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
    '<text x="{text_x}" y="{text_y}">{text}</text></a>'
)
_MORE: Final = Markup('<text class="more" x="{x}" y="{y}">and {count:,} more</text>')


@dataclass(frozen=True, slots=True)
class DrawnStep:
    """A step as it is drawn."""

    name: str
    state: str


@dataclass(frozen=True, slots=True)
class _Place:
    x: int
    y: int


def drawing(around: Surroundings, node_of: Callable[[str], DrawnStep]) -> Markup:
    """Return the SVG of a step's surroundings; `node_of` returns how a step of it is drawn."""
    columns = [
        around.needs_of_needs,
        around.needs,
        Level((around.step,), 1),
        around.dependents,
        around.dependents_of_dependents,
    ]
    # A step may be near in two ways; it is drawn where it is nearest.
    seen: set[str] = set()
    kept: dict[int, list[str]] = {}
    for index in (2, 1, 3, 0, 4):
        kept[index] = [key for key in columns[index].steps if key not in seen]
        seen.update(kept[index])
    first = next(index for index in range(5) if kept[index])
    last = next(index for index in reversed(range(5)) if kept[index])
    shown = range(first, last + 1)
    more = {index: columns[index].total - len(columns[index].steps) for index in shown}
    rows = max(len(kept[index]) + (more[index] > 0) for index in shown)
    height = rows * (BOX_HEIGHT + ROW_GAP) - ROW_GAP + 2 * MARGIN
    width = len(shown) * (BOX_WIDTH + COLUMN_GAP) - COLUMN_GAP + 2 * MARGIN
    places: dict[str, _Place] = {}
    notes = []
    for column, index in enumerate(shown):
        x = MARGIN + column * (BOX_WIDTH + COLUMN_GAP)
        used = len(kept[index]) + (more[index] > 0)
        top = MARGIN + (rows - used) * (BOX_HEIGHT + ROW_GAP) // 2
        for row, key in enumerate(kept[index]):
            places[key] = _Place(x, top + row * (BOX_HEIGHT + ROW_GAP))
        if more[index] > 0:
            y = top + len(kept[index]) * (BOX_HEIGHT + ROW_GAP) + BOX_HEIGHT // 2 + 4
            notes.append(_MORE.format(x=x + 10, y=y, count=more[index]))
    return _SVG.format(
        width=width,
        height=height,
        label="What the step needs, on the left, and what stands on it, on the right",
        edges=_edges(around.edges, places),
        boxes=Markup("").join(
            [*(_box(key, place, node_of(key), around.step) for key, place in places.items()), *notes]
        ),
    )


def _edges(edges: Sequence[tuple[str, str]], places: Mapping[str, _Place]) -> Markup:
    drawn = []
    for need, user in edges:
        left, right = places.get(need), places.get(user)
        # Edges within a column, or backwards, would cross boxes.
        if left is not None and right is not None and left.x < right.x:
            x0, x2 = left.x + BOX_WIDTH, right.x
            drawn.append(
                _EDGE.format(x0=x0, y0=left.y + BOX_HEIGHT // 2, x1=(x0 + x2) // 2, x2=x2, y2=right.y + BOX_HEIGHT // 2)
            )
    return Markup("").join(drawn)


def _box(key: str, place: _Place, node: DrawnStep, step: str) -> Markup:
    return _BOX.format(
        address=quote(key, safe=""),
        current=Markup(' class="here" aria-current="true"') if key == step else "",
        title=f"{node.name}, {node.state}",
        state=node.state,
        x=place.x,
        y=place.y,
        width=BOX_WIDTH,
        height=BOX_HEIGHT,
        text_x=place.x + 10,
        text_y=place.y + BOX_HEIGHT // 2 + 4,
        text=node.name if len(node.name) <= NAME_CHARS else f"{node.name[: NAME_CHARS - 1]}…",
    )
