"""Drawing of a forest upside down: what runs stands above what waits for it, and what was submitted at the bottom.

Each step is drawn once. Where there is no room, what only stands between two others goes first, then everything that
waits, at last the steps that have run for the shortest time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from infra.records import record


@record(frozen=True, slots=True)
class Place:
    """One row of the drawing: a step, and the lines that lead to it."""

    key: str
    branches: str


def draw(running: Sequence[str], above: Mapping[str, str], room: int, depth: int) -> tuple[list[Place], int]:
    """Return the rows, and how many of `running` (longest first) have none.

    `above` leads from a step to one that waits for it; a way up ends where it has no entry or an empty one. There are
    at most `room` rows, and none is more than `depth` steps away from its lowest one.
    """
    tree = _ways_up(running, above)
    if len(tree) > room or _deepest(tree) > depth:
        tree = _short_cuts(tree, set(running))
    if len(tree) > room or _deepest(tree) > depth:
        tree = dict.fromkeys(running[: room if len(running) <= room else max(0, room - 1)], "")
    order = {key: number for number, key in enumerate(running)}
    return list(_rows(tree, order)), sum(1 for key in running if key not in tree)


def _ways_up(running: Sequence[str], above: Mapping[str, str]) -> dict[str, str]:
    """Return the part of `above` that leads up from what runs; tops have ""."""
    tree: dict[str, str] = {}
    for start in running:
        key = start
        while key not in tree:
            upper = above.get(key, "")
            # A way up that is not known any further ends; so does one that leads back, which none should.
            tree[key] = upper if upper in above else ""
            if not tree[key]:
                break
            key = upper
    return tree


def _deepest(tree: Mapping[str, str]) -> int:
    """Return how many steps the longest way up of a tree has."""
    known = {"": -1}
    for start in tree:
        way = []
        key = start
        while key not in known:
            way.append(key)
            key = tree[key]
        known |= {each: number for number, each in enumerate(reversed(way), known[key] + 1)}
    return max(known.values())


def _short_cuts(tree: Mapping[str, str], running: set[str]) -> dict[str, str]:
    """Return the tree without the waiting steps that only stand between one other and the next."""
    below: dict[str, int] = {}
    for upper in tree.values():
        below[upper] = below.get(upper, 0) + 1
    kept = {key for key, upper in tree.items() if key in running or not upper or below.get(key, 0) > 1}
    short: dict[str, str] = {}
    for key in kept:
        upper = tree[key]
        while upper and upper not in kept:
            upper = tree[upper]
        short[key] = upper
    return short


def _rows(tree: Mapping[str, str], order: Mapping[str, int]) -> Iterator[Place]:
    """Yield the rows from top to bottom: what has run longest stands lowest, where new rows move it least."""
    below: dict[str, list[str]] = {}
    for key, upper in tree.items():
        below.setdefault(upper, []).append(key)
    first: dict[str, int] = {}
    for key in sorted(tree, key=lambda key: order.get(key, len(order))):
        upper = key
        while upper and upper not in first:
            first[upper] = order.get(key, len(order))
            upper = tree[upper]
    for siblings in below.values():
        siblings.sort(key=lambda key: (first[key], key), reverse=True)
    # Depth-first without recursion: a way up may be as long as the graph is deep.
    stack = [(key, "", "", False) for key in reversed(below.get("", []))]
    while stack:
        key, branches, inner, opened = stack.pop()
        children = below.get(key, [])
        if opened or not children:
            yield Place(key, branches)
            continue
        stack.append((key, branches, inner, True))
        for number in range(len(children) - 1, -1, -1):
            line, space = ("\u250c\u2500 ", "   ") if number == 0 else ("\u251c\u2500 ", "\u2502  ")
            stack.append((children[number], inner + line, inner + space, False))
