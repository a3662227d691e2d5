"""Lines of styled text: pieces with a style each, measured, cut and written as a terminal takes them.

Texts hold no control characters; the maker of a line has them pass `coordinator.cli.rendering.one_line`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from rich.cells import cell_len, set_cell_size

#: (text, style); styles are words of `_ATTRIBUTES` and `_COLOURS`, "" is plain.
Piece: TypeAlias = tuple[str, str]
Line: TypeAlias = list[Piece]

#: Parameters of SGR. Colours are the terminal's own, so that they fit a light and a dark ground.
_ATTRIBUTES: Final = {"bold": "1", "dim": "2"}
_COLOURS: Final = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35", "cyan": "36"}
_CUT: Final = "\u2026"


def plain(line: Line) -> str:
    """Return a line's text."""
    return "".join([text for text, _ in line])


def width_of(line: Line) -> int:
    """Return how many cells of a terminal a line takes."""
    return cell_len(plain(line))


def cut(line: Line, width: int) -> Line:
    """Return the line, or as much of it as fits into `width` cells with a sign that it goes on."""
    if width_of(line) <= width:
        return line
    room = width - 1
    kept: Line = []
    for text, style in line:
        taken = cell_len(text)
        if taken > room:
            kept.append((set_cell_size(text, max(0, room)).rstrip(), style))
            break
        kept.append((text, style))
        room -= taken
    return [*kept, (_CUT, "dim")] if width > 0 else []


def cell(text: str, width: int) -> str:
    """Return text that takes exactly `width` cells, cut with a sign or filled with spaces."""
    if cell_len(text) > width:
        return set_cell_size(text, max(0, width - 1)) + _CUT[: max(0, width)]
    return set_cell_size(text, width)


def joined(parts: Iterable[Line], between: Piece) -> Line:
    """Return lines as one, with a piece between each two."""
    line: Line = []
    for part in parts:
        line += [between, *part] if line else part
    return line


def written(line: Line, *, colours: bool) -> str:
    """Return a line as a terminal takes it; without `colours` bold and dim are left."""
    return "".join([_piece(text, style, colours=colours) for text, style in line])


def _piece(text: str, style: str, *, colours: bool) -> str:
    codes: Sequence[str] = [_ATTRIBUTES.get(word) or (_COLOURS[word] if colours else "") for word in style.split()]
    parameters = ";".join(code for code in codes if code)
    return f"\x1b[{parameters}m{text}\x1b[0m" if parameters else text
