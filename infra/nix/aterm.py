"""The text of .drv files (infra/nix/FORMATS.md 2.1): strict reading, canonical writing.

Reading takes two roads to one result. The fast road splits the whole text at its quotes: the odd pieces are the
strings, the even ones, joined, are the punctuation, which one regular expression checks. Two-byte escapes are first
made safe to split by bytes of equal length, so every offset stays true. Whatever the fast road does not recognise
goes to the slow road, a reader that goes token by token, reads any text that follows the grammar, and alone decides
about errors and their offsets. Neither recurses or backtracks.

Reading is strict about syntax and lenient about order: Nix accepts any order too. `Scan.canonical_text` and
`Scan.in_order` show whether Nix would have written the same bytes; only then may hashes be computed from the bytes
instead of from a rendering.

Two narrowings against Nix: names, paths, hashes and the system may hold no escapes (no writer makes them), and the
system and the builder must be UTF-8. `DrvWithVersion` (dynamic derivations) is refused with an error of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import lt
from typing import Final

from infra.nix.derivation import Derivation, DerivationOutput
from infra.nix.errors import FormatError

#: Longest text for the slow road, which takes half a second for a megabyte of escapes.
SLOW_BYTES: Final = 4 * 1024 * 1024
#: Most quotes in a text longer than that: each string is an object.
MAX_QUOTES: Final = 4_000_000
#: Bytes of a long string that are unescaped at a time.
PIECE_BYTES: Final = 1024 * 1024
_SUBJECT: Final = "derivation"

# One quote stands for one whole string.
_OUTPUT: Final = rb'\(",",","\)'
_INPUT: Final = rb'\(",\[(?:"(?:,")*+)?+\]\)'
_STRINGS: Final = rb'(?:"(?:,")*+)?+'
_PAIR: Final = rb'\(","\)'
_SKELETON: Final = re.compile(
    rb"Derive\(\[(%b(?:,%b)*+)\],\[((?:%b(?:,%b)*+)?+)\],\[(%b)\],\",\",\[(%b)\],\[((?:%b(?:,%b)*+)?+)\]\)\Z"
    % (_OUTPUT, _OUTPUT, _INPUT, _INPUT, _STRINGS, _STRINGS, _PAIR, _PAIR)
)
_ODD_ESCAPE: Final = re.compile(rb"\\[^nrt\0\1]")
#: An expression finds it in a third of the time that `in` takes for two bytes.
_TWO_BACKSLASHES: Final = re.compile(rb"\\\\")
_STRING: Final = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
_ESCAPE: Final = re.compile(rb"\\(.)", re.DOTALL)
_ESCAPED: Final = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


@dataclass(frozen=True, slots=True)
class Scan:
    """A derivation together with what is needed to hash its original bytes.

    Attributes:
        derivation: What the text holds.
        inputs_start: Offset of the first byte inside the brackets of the input derivations.
        inputs_end: Offset of the bracket that closes them.
        canonical_text: Whether every string is escaped as Nix's writer escapes it.
    """

    derivation: Derivation
    inputs_start: int
    inputs_end: int
    canonical_text: bool

    def in_order(self) -> bool:
        """Return whether everything that Nix keeps sorted is sorted and unique, so that Nix would write these bytes."""
        drv = self.derivation
        if not self.canonical_text:
            return False
        keys = [key for key, _ in drv.env]
        return (
            _rising(keys)
            and (len(drv.outputs) == 1 or _rising([output.name for output in drv.outputs]))
            and _rising([path for path, _ in drv.input_drvs])
            and _rising(drv.input_srcs)
            and all(map(_rising, [names for _, names in drv.input_drvs if len(names) != 1]))
        )


def _rising(items: list[bytes] | list[str] | tuple[str, ...]) -> bool:
    """Return whether `items` strictly rise. For `str`, code points order as UTF-8 bytes do."""
    return all(map(lt, items, items[1:]))


def _pieces(text: bytes) -> Iterator[bytes]:
    """Cut a long text between escapes, so that no step of the fast road holds the interpreter for long."""
    at = 0
    while at < len(text):
        end = at + PIECE_BYTES
        piece = text[at:end]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            end += 1
            piece = text[at:end]
        yield piece
        at = end


def unescape_safe(text: bytes) -> bytes:
    """Undo the escapes of a fast-road string, where 0 stands for an escaped backslash, 1 for a quote."""
    return b"".join(map(_unescape_piece, _pieces(text))) if len(text) > PIECE_BYTES else _unescape_piece(text)


def _unescape_piece(text: bytes) -> bytes:
    text = text.replace(b"\\n", b"\n").replace(b"\\\1", b'"').replace(b"\\t", b"\t").replace(b"\\r", b"\r")
    return text.replace(b"\\\0", b"\\")


def _unescape_all(safe: bytes, strings: list[bytes]) -> None:
    """Undo the escapes in those of `strings` that have any, found by counting the quotes before each."""
    quotes = counted = 0
    at = safe.find(b"\\")
    while at >= 0:
        quotes += safe.count(b'"', counted, at)
        strings[quotes >> 1] = unescape_safe(strings[quotes >> 1])
        counted = safe.index(b'"', at)
        at = safe.find(b"\\", counted)


def _input_list(head: list[str], at: int, skeleton: bytes) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The input derivations: `skeleton` says how many of the strings from `head[at]` on belong to each."""
    inputs: list[tuple[str, tuple[str, ...]]] = []
    if skeleton:
        for item in skeleton.split(b"),("):
            upto = at + item.count(b'"')
            inputs.append((head[at], tuple(head[at + 1 : upto])))
            at = upto
    return tuple(inputs)


def _input_offsets(parts: list[bytes], outputs_end: int, inputs_end: int, skeleton: bytes) -> tuple[int, int]:
    """Offsets of the text between the brackets of the input derivations; the arguments count strings."""
    # Between two parts lies one quote; the punctuation after the outputs begins with `)],[`.
    start = sum(map(len, parts[: 2 * outputs_end])) + 2 * outputs_end + 4
    if inputs_end == outputs_end:
        return start, start
    between = parts[2 * outputs_end + 1 : 2 * inputs_end]
    # `("` comes before these strings; a quote and `])`, or `,[])` if the last input names no output, after them.
    closing = 3 if skeleton.endswith(b'"])') else 5
    return start, start + 2 + sum(map(len, between)) + len(between) - 1 + closing


def safe_escapes(data: bytes) -> bytes | None:
    """The text with its escapes made safe to split by bytes of equal length; None where that cannot be."""
    if b"\0" in data or b"\1" in data:
        return None
    pieces = []
    for piece in _pieces(data):
        safe = piece.replace(b"\\\\", b"\\\0") if _TWO_BACKSLASHES.search(piece) else piece
        safe = safe.replace(b'\\"', b"\\\1")
        if _ODD_ESCAPE.search(safe):
            return None
        pieces.append(safe)
    return b"".join(pieces)


def scan_canonical(data: bytes) -> Scan | None:
    """The scan of a text as Nix writes it, or None for the slow road."""
    escapes = b"\\" in data
    safe = safe_escapes(data) if escapes else data
    if safe is None or (len(data) > SLOW_BYTES and safe.count(b'"') > MAX_QUOTES):
        return None
    parts = safe.split(b'"')
    skeleton = _SKELETON.match(b'"'.join(parts[::2]))
    # An even number of pieces: a string that does not end stands behind the last bracket.
    if skeleton is None or len(parts) % 2 == 0:
        return None
    outputs_text, inputs_text, sources_text, args_text, _ = skeleton.groups()
    strings = parts[1::2]
    outputs_end = (len(outputs_text) + 1) // 10 * 4
    inputs_end = outputs_end + inputs_text.count(b'"')
    sources_end = inputs_end + (len(sources_text) + 1) // 2
    # One decoding for all the strings before the builder: they hold no quotes.
    head_bytes = b'"'.join(strings[: sources_end + 1])
    if escapes:
        if b"\\" in head_bytes:
            return None
        _unescape_all(safe, strings)
    try:
        head_text = head_bytes.decode()
        builder = strings[sources_end + 1].decode()
    except UnicodeDecodeError:
        return None
    head = head_text.split('"')
    tail = strings[sources_end + 2 :]
    args_end = (len(args_text) + 1) // 2
    derivation = Derivation(
        tuple(map(DerivationOutput, *(head[i:outputs_end:4] for i in range(4)))),
        _input_list(head, outputs_end, inputs_text),
        tuple(head[inputs_end:sources_end]),
        head[sources_end],
        builder,
        tuple(tail[:args_end]),
        tuple(zip(tail[args_end::2], tail[args_end + 1 :: 2], strict=True)),
    )
    raw = b"\n" in data or b"\t" in data or b"\r" in data
    return Scan(derivation, *_input_offsets(parts, outputs_end, inputs_end, inputs_text), not raw)


def scan_by_token(data: bytes) -> Scan:
    """Scan by the slow road. Raises `FormatError` as `scan` does."""
    return _Reader(data).scan()


class _Reader:
    """The slow road: one token after the other, with true offsets."""

    __slots__ = ("canonical", "data", "pos")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0
        self.canonical = not (b"\n" in data or b"\t" in data or b"\r" in data)

    def expect(self, token: bytes) -> None:
        """Step over `token`.

        Raises:
            FormatError: At the first byte that differs from it.
        """
        if self.data.startswith(token, self.pos):
            self.pos += len(token)
            return
        for index, byte in enumerate(token):
            at = self.pos + index
            if at >= len(self.data):
                raise FormatError(f"the text ends where {token.decode()!r} is due", offset=at, subject=_SUBJECT)
            if self.data[at] != byte:
                raise FormatError(f"{token.decode()!r} is due", offset=at, subject=_SUBJECT)

    def skip(self, token: bytes) -> bool:
        """Step over `token` if it is next."""
        if self.data.startswith(token, self.pos):
            self.pos += len(token)
            return True
        return False

    def raw_string(self) -> bytes:
        match = _STRING.match(self.data, self.pos)
        if match is None:
            self.expect(b'"')
            raise FormatError("a string does not end", offset=self.pos - 1, subject=_SUBJECT)
        self.pos = match.end()
        return match[1]

    def string(self) -> bytes:
        """A string with its escapes undone: backslash and any byte but n, r, t is that byte."""
        text = self.raw_string()
        if b"\\" not in text:
            return text
        for escape in _ESCAPE.finditer(text):
            if escape[1] not in b'nrt"\\':
                self.canonical = False
        return _ESCAPE.sub(lambda escape: _ESCAPED.get(escape[1], escape[1]), text)

    def text(self) -> str:
        """A string that is UTF-8."""
        start = self.pos
        try:
            return self.string().decode()
        except UnicodeDecodeError:
            raise FormatError("not UTF-8", offset=start, subject=_SUBJECT) from None

    def plain(self) -> str:
        """A UTF-8 string that is written without escapes."""
        start = self.pos
        text = self.text()
        escape = self.data.find(b"\\", start, self.pos)
        if escape >= 0:
            raise FormatError("an escape in a name, path, hash or system", offset=escape, subject=_SUBJECT)
        return text

    def items(self) -> Iterable[None]:
        """One step for each item of a bracketed list, which the caller reads; brackets and commas are read here."""
        self.expect(b"[")
        if self.skip(b"]"):
            return
        yield
        while not self.skip(b"]"):
            self.expect(b",")
            yield

    def output(self) -> DerivationOutput:
        self.expect(b"(")
        fields = [self.plain()]
        for _ in range(3):
            self.expect(b",")
            fields.append(self.plain())
        self.expect(b")")
        return DerivationOutput(*fields)

    def input(self) -> tuple[str, tuple[str, ...]]:
        self.expect(b"(")
        path = self.plain()
        self.expect(b",")
        names = tuple(self.plain() for _ in self.items())
        self.expect(b")")
        return path, names

    def pair(self) -> tuple[bytes, bytes]:
        self.expect(b"(")
        key = self.string()
        self.expect(b",")
        value = self.string()
        self.expect(b")")
        return key, value

    def scan(self) -> Scan:
        if self.data.startswith(b"DrvWithVersion("):
            raise FormatError("derivations with dynamic inputs are not supported", offset=0, subject=_SUBJECT)
        self.expect(b"Derive(")
        outputs = tuple(self.output() for _ in self.items())
        self.expect(b",")
        inputs_start = self.pos + 1
        input_drvs = tuple(self.input() for _ in self.items())
        inputs_end = self.pos - 1
        self.expect(b",")
        input_srcs = tuple(self.plain() for _ in self.items())
        self.expect(b",")
        system = self.plain()
        self.expect(b",")
        builder = self.text()
        self.expect(b",")
        args = tuple(self.string() for _ in self.items())
        self.expect(b",")
        env = tuple(self.pair() for _ in self.items())
        self.expect(b")")
        if self.pos != len(self.data):
            raise FormatError("bytes after the end", offset=self.pos, subject=_SUBJECT)
        derivation = Derivation(outputs, input_drvs, input_srcs, system, builder, args, env)
        return Scan(derivation, inputs_start, inputs_end, self.canonical)


def scan(data: bytes) -> Scan:
    """The derivation in `data`, with the offsets that hashing needs.

    Raises:
        FormatError: If `data` does not follow the grammar, at the first byte that breaks it.
    """
    found = scan_canonical(data)
    if found is None and len(data) > SLOW_BYTES:
        raise FormatError(
            f"more than {SLOW_BYTES} bytes that are not written as Nix writes them", offset=0, subject=_SUBJECT
        )
    return found or scan_by_token(data)


def parse(data: bytes) -> Derivation:
    """The derivation in `data`, the whole content of a .drv file.

    Raises:
        FormatError: If `data` does not follow the grammar, at the first byte that breaks it.
    """
    return scan(data).derivation


def _escaped(text: bytes) -> bytes:
    if b"\\" in text:
        text = text.replace(b"\\", b"\\\\")
    text = text.replace(b'"', b'\\"').replace(b"\n", b"\\n").replace(b"\r", b"\\r").replace(b"\t", b"\\t")
    return b'"%b"' % text


def _plain(text: str) -> bytes:
    if '"' in text or "\\" in text:
        raise FormatError("a quote or backslash in a name, path, hash or system", offset=0, subject=_SUBJECT)
    return b'"%b"' % text.encode()


def _strings(items: Iterable[bytes]) -> bytes:
    return b"[%b]" % b",".join(items)


def render_inputs(inputs: Iterable[tuple[str, Iterable[str]]]) -> bytes:
    """The input derivations between their brackets: equal names merged, everything sorted."""
    merged: dict[str, set[str]] = {}
    for path, names in inputs:
        merged.setdefault(path, set()).update(names)
    return b",".join(
        b"(%b,%b)" % (_plain(path), _strings(map(_plain, sorted(merged[path])))) for path in sorted(merged)
    )


def render(drv: Derivation, *, mask_outputs: bool = False, input_hashes: Mapping[str, str] | None = None) -> bytes:
    """The text of `drv` as Nix writes it: sorted, canonically escaped.

    Args:
        drv: The derivation; of keys that appear twice, the last counts, as in Nix.
        mask_outputs: Blank the output paths and the environment values named after outputs.
        input_hashes: Replace each input derivation by the base16 hash found here; those with equal hashes are merged.

    Raises:
        FormatError: If a field that is written without escapes would need one, or an input has no hash.
    """
    outputs = [
        (
            _plain(output.name),
            _plain("" if mask_outputs else output.path),
            _plain(output.hash_algo),
            _plain(output.hash),
        )
        for output in sorted(drv.outputs, key=lambda output: output.name)
    ]
    inputs = drv.input_drvs
    if input_hashes is not None:
        for path, _ in inputs:
            if path not in input_hashes:
                raise FormatError(f"no hash for input {path}", offset=0, subject=_SUBJECT)
        inputs = tuple((input_hashes[path], names) for path, names in inputs)
    env = dict(drv.env)
    if mask_outputs:
        env.update((key, b"") for output in drv.outputs if (key := output.name.encode()) in env)
    return b"Derive(%b,[%b],%b,%b,%b,%b,%b)" % (
        _strings(b"(%b)" % b",".join(fields) for fields in outputs),
        render_inputs(inputs),
        _strings(_plain(path) for path in sorted(set(drv.input_srcs))),
        _plain(drv.system),
        _escaped(drv.builder.encode()),
        _strings(map(_escaped, drv.args)),
        _strings(b"(%b,%b)" % (_escaped(key), _escaped(env[key])) for key in sorted(env)),
    )
