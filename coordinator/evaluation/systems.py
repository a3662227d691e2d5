"""Names of systems, as people write lists of them."""

from __future__ import annotations

import re
from typing import Final

LINUX: Final = ("x86_64-linux", "aarch64-linux")
DARWIN: Final = ("x86_64-darwin", "aarch64-darwin")
#: Words for several systems.
GROUPS: Final = {"all": (*LINUX, *DARWIN), "linux": LINUX, "darwin": DARWIN}
_SYSTEM: Final = re.compile(r"[a-z0-9_]+-[a-z0-9_]+")


def parse_systems(text: str) -> tuple[str, ...]:
    """Read `x86_64-linux,aarch64-darwin`, `all`, `linux` or `darwin`, separated by commas or spaces.

    Raises:
        ValueError: A word names no system.
    """
    found: dict[str, None] = {}
    for word in re.split(r"[\s,]+", text.strip()):
        if word not in GROUPS and not _SYSTEM.fullmatch(word):
            raise ValueError(f"{word!r} is no system; write such as x86_64-linux,aarch64-darwin, or all, linux, darwin")
        found.update(dict.fromkeys(GROUPS.get(word, (word,))))
    return tuple(found)
