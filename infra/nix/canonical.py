"""Derivations as verification reads them: what stands before the environment, and the few variables that it looks at.

`aterm.scan` makes an object of each string. Most strings are values of the environment, and verification reads less
than ten of these; for all others it must only know that Nix would have written them so. `read_canonical` finds that
out for the whole text at once: one regular expression reads what stands before the environment, and the environment is
split at its quotes and its punctuation counted. It takes a text only where it is sure that Nix would have written the
same bytes. Any other text, also a canonical one with rare traits, goes the long way, which alone decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import lt
from typing import Final

from infra.nix import aterm
from infra.nix.derivation import OPTION_KEYS, DerivationOutput

#: Longest text that is read here; a longer one goes the way that cuts it into pieces.
MAX_BYTES: Final = 1024 * 1024

#: A string without escapes, whatever else stands in it.
_PLAIN: Final = rb'"[^"\\]*+"'
_OUTPUT: Final = rb"\(%b,%b,%b,%b\)" % (_PLAIN, _PLAIN, _PLAIN, _PLAIN)
_INPUT: Final = rb"\(%b,\[%b(?:,%b)*+\]\)" % (_PLAIN, _PLAIN, _PLAIN)
#: All up to the environment.
_HEAD: Final = re.compile(
    rb"Derive\(\[(%b(?:,%b)*+)\],\[((?:%b(?:,%b)*+)?+)\],\[((?:%b(?:,%b)*+)?+)\],(%b,%b),\[(?:%b(?:,%b)*+)?+\],\["
    % (_OUTPUT, _OUTPUT, _INPUT, _INPUT, _PLAIN, _PLAIN, _PLAIN, _PLAIN, _PLAIN, _PLAIN)
)
#: Bytes that Nix escapes, and those that stand for escapes while a text is split.
_FOREIGN: Final = (b"\n", b"\t", b"\r", b"\0", b"\1")


@dataclass(frozen=True, slots=True)
class CanonicalDrv:
    """A derivation that Nix would have written with the same bytes.

    Attributes:
        outputs: As in `Derivation`, as are the next four.
        env: Values of `OPTION_KEYS` and of the variables named after outputs, as far as they are there.
        inputs_start: Offset of the first byte inside the brackets of the input derivations.
        inputs_end: Offset of the bracket that closes them.
    """

    outputs: tuple[DerivationOutput, ...]
    input_drvs: tuple[tuple[str, tuple[str, ...]], ...]
    input_srcs: tuple[str, ...]
    system: str
    builder: str
    env: Mapping[bytes, bytes]
    inputs_start: int
    inputs_end: int


def of_scan(scan: aterm.Scan) -> CanonicalDrv:
    """Return what was scanned; the caller has asked whether it is in order."""
    drv = scan.derivation
    return CanonicalDrv(
        drv.outputs,
        drv.input_drvs,
        drv.input_srcs,
        drv.system,
        drv.builder,
        dict(drv.env),
        scan.inputs_start,
        scan.inputs_end,
    )


def read_canonical(data: bytes) -> CanonicalDrv | None:
    """Return the derivation in `data`; None where `aterm.scan` must say whether it is one and canonical."""
    head = _HEAD.match(data) if len(data) <= MAX_BYTES and not _has_foreign(data) else None
    if head is None:
        return None
    try:
        outputs_text, inputs_text, sources_text, programs = b"\n".join(head.groups()).decode().split("\n")
    except UnicodeDecodeError:
        return None
    outputs = tuple([DerivationOutput(*each.split('","')) for each in outputs_text[2:-2].split('"),("')])
    inputs = _inputs(inputs_text)
    sources = tuple(sources_text[1:-1].split('","')) if sources_text else ()
    if inputs is None or not (_rising([output.name for output in outputs]) and _rising(sources)):
        return None
    env = _environment(data[head.end() :], outputs)
    if env is None:
        return None
    system, builder = programs[1:-1].split('","')
    return CanonicalDrv(outputs, inputs, sources, system, builder, env, head.start(2), head.end(2))


def _has_foreign(data: bytes) -> bool:
    # Five searches for one byte are faster than one for a set of bytes.
    for byte in _FOREIGN:  # noqa: SIM110 - a generator takes as long as all the searches
        if byte in data:
            return True
    return False


def _rising(items: Sequence[str] | Sequence[bytes]) -> bool:
    """Return whether `items` strictly rise. For `str`, code points order as UTF-8 bytes do."""
    return all(map(lt, items, items[1:]))


def _inputs(text: str) -> tuple[tuple[str, tuple[str, ...]], ...] | None:
    """Return the input derivations of a text that has the form; None where they do not rise."""
    inputs: list[tuple[str, tuple[str, ...]]] = []
    for each in text[2:-3].split('"]),("') if text else ():
        path, _, names = each.partition('",["')
        if '"' in names:
            several = tuple(names.split('","'))
            if not _rising(several):
                return None
            inputs.append((path, several))
        else:
            inputs.append((path, (names,)))
    return tuple(inputs) if _rising([path for path, _ in inputs]) else None


def _environment(text: bytes, outputs: Sequence[DerivationOutput]) -> dict[bytes, bytes] | None:
    """Return the variables that verification reads; None where `text` is not the canonical rest of a derivation."""
    has_escapes = b"\\" in text
    if has_escapes:
        safe = aterm.safe_escapes(text)
        if safe is None:
            return None
        text = safe
    # Behind each quote now stands a string, or what stands between two.
    parts = text.split(b'"')
    keys = parts[1::4]
    count = len(keys)
    is_written_so = (
        len(parts) == 4 * count + 1
        and parts[0] == b"("
        and parts[-1] == b")])"
        and parts[2::4].count(b",") == count
        and parts[4:-1:4].count(b"),(") == count - 1
    )
    if not is_written_so or not _rising(keys):
        return None
    if has_escapes and b"\\" in b"".join(keys):
        # Escaped keys order otherwise than the keys themselves.
        return None
    wanted = [output.name.encode() for output in outputs]
    if not OPTION_KEYS.isdisjoint(keys):
        wanted += OPTION_KEYS
    env = {key: parts[4 * keys.index(key) + 3] for key in wanted if key in keys}
    return {key: aterm.unescape_safe(value) for key, value in env.items()} if has_escapes else env
