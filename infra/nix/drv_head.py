"""The head of a .drv file: outputs, input derivations and input sources, without what follows.

A walk through a closure needs no more, and what follows is most of the file. What is not written as Nix writes it is
read as a whole (`infra.nix.aterm`), with the same result. Nothing here says whether the rest of the file is sound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from infra.nix import aterm

_TEXT: Final = r'"[^"\\]*+"'
_HEAD: Final = re.compile(
    (
        rf"Derive\(\[((?:\({_TEXT},{_TEXT},{_TEXT},{_TEXT}\),?)*+)\],"
        rf"\[((?:\({_TEXT},\[(?:{_TEXT},?)*+\]\),?)*+)\],"
        rf"\[((?:{_TEXT},?)*+)\],"
    ).encode()
)
_OUTPUT_PATH: Final = re.compile(rb'\("[^"]*","([^"]*)"')
_INPUT_PATH: Final = re.compile(rb'\("([^"]*)"')
#: Between outputs, input derivations and input sources.
_LIST_END: Final = b")],["
_SOURCE: Final = re.compile(rb'"([^"]*)"')


@dataclass(frozen=True, slots=True)
class DrvHead:
    """Full store paths: what a derivation makes ("" where that is not known before), and what it is made from."""

    outputs: tuple[str, ...]
    input_drvs: tuple[str, ...]
    input_srcs: tuple[str, ...]


def read_head(data: bytes) -> DrvHead:
    """Return the head of the derivation in `data`, the whole content of a .drv file.

    Raises:
        FormatError: `data` does not follow the grammar, at the first byte that breaks it.
    """
    head = _HEAD.match(data)
    if head is not None:
        try:
            return DrvHead(_texts(_OUTPUT_PATH, head[1]), _texts(_INPUT_PATH, head[2]), _texts(_SOURCE, head[3]))
        except UnicodeDecodeError:
            pass
    derivation = aterm.parse(data)
    return DrvHead(
        tuple(output.path for output in derivation.outputs),
        tuple(path for path, _ in derivation.input_drvs),
        derivation.input_srcs,
    )


def input_names(data: bytes) -> list[str] | None:
    """Return the base names of the input derivations of a file that Nix wrote; None where they cannot be found.

    Half of the time of `read_head`, and for order alone: of any other file the answer may be wrong.
    """
    outputs_end = data.find(_LIST_END)
    start = outputs_end + len(_LIST_END)
    if outputs_end >= 0 and data.startswith(b"]", start):
        return []
    end = data.find(_LIST_END, start)
    if outputs_end < 0 or end < 0:
        return None
    try:
        inputs = data[start + len('("') : end].decode()
    except UnicodeDecodeError:
        return None
    return [each.partition('"')[0].rpartition("/")[2] for each in inputs.split('("')]


def _texts(pattern: re.Pattern[bytes], part: bytes) -> tuple[str, ...]:
    # One decoding for all: no text holds a quote.
    return tuple(b'"'.join(pattern.findall(part)).decode().split('"')) if part else ()
