"""Lines of a log as HTML: colours become spans with classes, everything else that a terminal obeys is dropped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from markupsafe import Markup, escape

from coordinator.stores.log_lines import NumberedLine
from coordinator.terminal_controls import ControlFilter

#: Characters of the HTML of one page: what lies beyond it stands on the next.
PAGE_CHARS: Final = 700_000
_COLOUR: Final = re.compile("\x1b\\[([0-9;]*)m")
#: Parameters that begin and end a face.
_FACES: Final = {1: "bold", 3: "italic", 4: "underline"}
_ENDS: Final = {22: "bold", 23: "italic", 24: "underline"}
_SPAN: Final = Markup('<span class="{}">{}</span>')
_LINE: Final = Markup(
    '<li id="L{0}"><a class="number" href="#L{0}" aria-label="Line {0}">{0}</a><span>{1}{2}</span></li>'
)
_CUT: Final = Markup(' <em class="cut">… {:,} more bytes of this line are left out</em>')


def line_html(line: NumberedLine) -> Markup:
    """Return the list item of one line."""
    control = ControlFilter(colours=True)
    text = control.feed_bytes(line.data) + control.finish()
    return _LINE.format(line.number, _coloured(text), _CUT.format(line.cut) if line.cut else "")


def lines_html(lines: Sequence[NumberedLine]) -> tuple[Markup, int]:
    """Return the items of lines, and how many lines that are: fewer where a page is full.

    For threads: lines that are nothing but control sequences take a quarter of a second.
    """
    items: list[Markup] = []
    chars = 0
    for line in lines:
        item = line_html(line)
        chars += len(item)
        if items and chars > PAGE_CHARS:
            break
        items.append(item)
    return Markup("").join(items), len(items)


def _coloured(text: str) -> Markup:
    """Return text whose colour sequences became spans; all of them end with the text."""
    # Text and parameters in turn.
    parts = _COLOUR.split(text)
    if len(parts) == 1:
        return escape(text)
    pieces = [escape(parts[0])]
    faces: set[str] = set()
    colour = ""
    for parameters, piece in zip(parts[1::2], parts[2::2], strict=True):
        for number in (int(each or "0") for each in parameters.split(";")):
            if number == 0:
                faces.clear()
                colour = ""
            elif number in _FACES:
                faces.add(_FACES[number])
            elif number in _ENDS:
                faces.discard(_ENDS[number])
            else:
                # 39 is the usual colour; the others are one of sixteen.
                colour = "" if number == 39 else f"colour-{number}"
        classes = " ".join(sorted(faces | {colour} - {""}))
        if piece:
            pieces.append(_SPAN.format(classes, piece) if classes else escape(piece))
    return Markup("").join(pieces)
