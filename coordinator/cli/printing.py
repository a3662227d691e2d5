"""Lines, JSON and sizes on standard output; quick to import."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import orjson

from coordinator.cli.ci import defused
from coordinator.terminal_controls import harmless

_LATE_CONTROLS = re.compile("[\x7f-\x9f]")


def print_lines(lines: Sequence[str]) -> None:
    """Print lines, without what a terminal would obey; what its encoding lacks becomes `?`."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        sys.stdout.write(_encoded(defused(harmless(line))).decode(encoding) + "\n")


def _encoded(text: str) -> bytes:
    return text.encode(sys.stdout.encoding or "utf-8", "replace")


def print_json(document: object) -> None:
    """Print a record or a mapping as one line of JSON, whose texts hold no control character as it stands."""
    text = orjson.dumps(document).decode()
    # JSON itself asks this of the controls below U+0020 only; terminals obey these too.
    sys.stdout.write(_LATE_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def size(count: int) -> str:
    """Return a number of bytes as `512 B`, `1.5 KiB`, ..."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
