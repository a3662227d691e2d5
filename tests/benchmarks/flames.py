"""Small flame graphs, from what `py-spy record --format raw` wrote: `python -m tests.benchmarks.flames RAW SVG`.

py-spy's own SVG has a script and each frame that was ever seen, a megabyte of a farm. Here frames below a share of all
samples are left out, threads of one process are one, and the title of a frame says its share.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 1200
ROW: Final = 17
#: Pixels of a letter, about.
LETTER: Final = 6.6
#: Frames of the interpreter and the libraries below which nothing of this farm differs.
_GROUND: Final = re.compile(
    r"_run_module_as_main|_run_code|<module> \(tests|Runner\.run|Thread\._bootstrap|Thread\.run|_WorkItem\.run"
    r"|_worker \(concurrent|thread \(|_fix_request_current_app|BaseEventLoop\.run|Handle\._run|_run_once"
)


@dataclass(slots=True)
class Frame:
    """Samples with a frame on the stack, and those above it."""

    samples: int = 0
    above: dict[str, Frame] = field(default_factory=dict)


def read(lines: Iterable[str]) -> Frame:
    """Merge stacks, `a;b;c COUNT` each, bottom first."""
    root = Frame()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frame = root
        frame.samples += int(count)
        for name in stack.split(";"):
            if not _GROUND.search(name):
                frame = frame.above.setdefault(_shown(name), Frame())
                frame.samples += int(count)
    return root


def _shown(name: str) -> str:
    """Return a function without its line, so that it is one frame, and a process without its arguments."""
    if name.startswith("process "):
        return "process that verifies" if "verifier_child" in name else "process"
    return re.sub(r":\d+\)$", ")", name)


def boxes(frame: Frame, least: float, scale: float, at: float = 0.0, depth: int = 0) -> Iterator[str]:
    """Yield the elements of what is above a frame, the largest at the left."""
    for name, above in sorted(frame.above.items(), key=lambda item: -item[1].samples):
        width = above.samples * scale
        if width < least:
            return
        share = 100 * width / WIDTH
        shown = escape(name[: int(width / LETTER)]) if width > 4 * LETTER else ""
        hue = 20 + sum(name.encode()) % 35
        yield (
            f'<g><title>{escape(name)} {share:.1f} %</title><rect x="{at:.1f}" y="{depth * ROW}" width="{width:.1f}" '
            f'height="{ROW - 1}" fill="hsl({hue},80%,65%)"/>'
            + (f'<text x="{at + 2:.1f}" y="{depth * ROW + 12}">{shown}</text>' if shown else "")
            + "</g>"
        )
        yield from boxes(above, least, scale, at, depth + 1)
        at += width


def depth_of(frame: Frame, least: int) -> int:
    return max([1 + depth_of(above, least) for above in frame.above.values() if above.samples >= least], default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="make a small flame graph")
    parser.add_argument("raw", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument(
        "--least", type=float, default=0.003, help="share of a frame that is shown (default: %(default)s)"
    )
    options = parser.parse_args()
    root = read(options.raw.read_text().splitlines())
    height = ROW * depth_of(root, int(options.least * root.samples))
    elements = "\n".join(boxes(root, options.least * WIDTH, WIDTH / root.samples))
    options.svg.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="monospace" font-size="11">\n{elements}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
