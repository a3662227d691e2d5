"""Parser of terminal control sequences: passes text and colours on and drops what else a terminal would obey.

What builders print, and names and messages that come from afar, are written by strangers. A terminal obeys sequences
in them: they retitle windows, move the cursor, hide text, or ask the terminal to type. The states are those of the
VT500 (https://vt100.net/emu/dec_ansi_parser), which every emulator of today follows, with three differences:

- a newline ends every sequence, and so does a bound on its length, so that one without an end hides no line after it;
- of all sequences only colours pass (`_COLOURS`), and none outlives its line, so that no line hides the next;
- `ESC k` is a string, because screen and tmux take their window's title from it.

C1 controls count in their two-character and in their one-character form (U+0080 to U+009F), as in UTF-8 terminals. The
kept emulators (pyte) answer what a screen looks like, which costs a screen's memory and loses what scrolled away.
"""

from __future__ import annotations

import codecs
import re
from enum import Enum, auto
from typing import Final

#: Characters of a control string (a title, a picture) and of a control sequence; what is longer is none.
MAX_STRING_CHARS: Final = 4096
MAX_SEQUENCE_CHARS: Final = 64
#: Colour changes that pass in one line.
MAX_COLOURS: Final = 256
#: Ends every colour.
RESET: Final = "\x1b[0m"

#: Bold, italic, underlined, foreground colours, and their ends. No background, no black and no concealing: text stays
#: readable; no blinking.
_COLOURS: Final = frozenset({0, 1, 3, 4, 22, 23, 24, 39, *range(31, 38), *range(91, 98)})
#: These begin a palette or RGB colour, whose parameters follow.
_EXTENDED: Final = frozenset({38, 48, 58})
#: Characters that reorder what stands around them.
_BIDI: Final = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_TEXT: Final = re.compile(rf"[^\x00-\x08\x0a-\x1f\x7f-\x9f{_BIDI}]+")
_STRING_END: Final = re.compile("[\n\x07\x18\x1a\x1b\x9c]")
#: Second character of an escape -> the C1 control that it stands for.
_STRING_STARTS: Final = {"]": "\x9d", "P": "\x90", "X": "\x98", "^": "\x9e", "_": "\x9f", "k": "k"}
_OSC: Final = "\x9d"
_C1_STRINGS: Final = frozenset(_STRING_STARTS.values()) - {"k"}
_CSI: Final = "\x9b"
_CANCELS: Final = frozenset("\x18\x1a")


class _State(Enum):
    GROUND = auto()
    ESCAPE = auto()
    SEQUENCE = auto()
    STRING = auto()


class ControlFilter:
    """Makes a stream of text harmless, piece by piece; holds at most one sequence.

    A lone carriage return becomes `carriage`: a newline, so that nothing is overwritten.
    """

    def __init__(self, *, colours: bool, carriage: str = "\n") -> None:
        self._colours = colours
        self._carriage = carriage
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state = _State.GROUND
        #: Of the present sequence: its characters so far; of a string how many there were, and its introducer.
        self._sequence = ""
        self._string_chars = 0
        self._introducer = ""
        #: A carriage return came last; it belongs to a newline or stands alone.
        self._returned = False
        #: Colours that are on, and that passed in this line.
        self._coloured = False
        self._passed = 0

    def feed(self, text: str) -> str:
        """Return what of `text` may be shown."""
        out: list[str] = []
        at = 0
        while at < len(text):
            at = self._step(text, at, out)
        return "".join(out)

    def feed_bytes(self, data: bytes) -> str:
        """Return what of UTF-8 `data` may be shown; bytes that are none become U+FFFD."""
        return self.feed(self._decoder.decode(data))

    def finish(self) -> str:
        """Return what is left to be written at the end; the terminal is then as it was before."""
        out = [self.feed(self._decoder.decode(b"", final=True))]
        self._state = _State.GROUND
        self._settle_return(out)
        self._end_line(out)
        return "".join(out)

    def _step(self, text: str, at: int, out: list[str]) -> int:
        """Take one character or a run of them; returns where the next one is."""
        if self._state is _State.STRING:
            return self._string(text, at)
        char = text[at]
        if self._returned and char not in "\r\n":
            self._settle_return(out)
        if self._state is _State.GROUND and (run := _TEXT.match(text, at)):
            out.append(run[0])
            return run.end()
        if char == "\n":
            self._state, self._returned = _State.GROUND, False
            self._end_line(out)
            out.append("\n")
        elif char < " " or "\x7f" <= char <= "\x9f":
            self._control(char)
        elif self._state is _State.ESCAPE:
            self._escape(char)
        elif self._state is _State.SEQUENCE:
            return self._part(char, at, out)
        return at + 1

    def _control(self, char: str) -> None:
        """Take a control character, which counts within a sequence too."""
        if char == "\x1b":
            self._enter(_State.ESCAPE)
        elif char == _CSI:
            self._enter(_State.SEQUENCE)
        elif char in _C1_STRINGS:
            self._begin_string(char)
        elif char in _CANCELS or char >= "\x80":
            self._state = _State.GROUND
        elif char == "\r" and self._state is _State.GROUND:
            self._returned = True

    def _enter(self, state: _State) -> None:
        self._state, self._sequence = state, ""

    def _begin_string(self, introducer: str) -> None:
        self._state, self._introducer, self._string_chars = _State.STRING, introducer, 0

    def _escape(self, char: str) -> None:
        if " " <= char <= "/" and len(self._sequence) < MAX_SEQUENCE_CHARS:
            self._sequence += char
        elif not self._sequence and char == "[":
            self._enter(_State.SEQUENCE)
        elif not self._sequence and char in _STRING_STARTS:
            self._begin_string(_STRING_STARTS[char])
        else:
            self._state = _State.GROUND

    def _part(self, char: str, at: int, out: list[str]) -> int:
        """Take a character of a control sequence."""
        if " " <= char <= "?" and len(self._sequence) < MAX_SEQUENCE_CHARS:
            self._sequence += char
            return at + 1
        self._state = _State.GROUND
        if not "@" <= char <= "~":
            # Too long, or no character of a sequence: text again.
            return at
        if char == "m" and self._colours:
            self._colour(out)
        return at + 1

    def _string(self, text: str, at: int) -> int:
        room = at + MAX_STRING_CHARS - self._string_chars
        end = _STRING_END.search(text, at, room)
        if end is None:
            stop = min(len(text), room)
            self._string_chars += stop - at
            if self._string_chars >= MAX_STRING_CHARS:
                self._state = _State.GROUND
            return stop
        match end[0]:
            case "\n":
                self._state = _State.GROUND
                return end.start()
            case "\x1b":
                # The end of a string is an escape of its own (`ESC \`); any other one ends it too.
                self._enter(_State.ESCAPE)
            case "\x07" if self._introducer != _OSC:
                self._string_chars += end.end() - at
            case _:
                self._state = _State.GROUND
        return end.end()

    def _colour(self, out: list[str]) -> None:
        wanted: list[int] = []
        words = self._sequence.split(";")
        if not all(not word or (word.isascii() and word.isdecimal()) for word in words):
            # Private, or with subparameters.
            return
        numbers = iter([int(word or "0") for word in words])
        for number in numbers:
            if number in _EXTENDED:
                # Its own parameters are no colours: 5;N or 2;R;G;B.
                kind = next(numbers, 0)
                for _ in range({5: 1, 2: 3}.get(kind, 0)):
                    next(numbers, None)
            elif number in _COLOURS:
                wanted.append(number)
        if not wanted or self._passed >= MAX_COLOURS:
            return
        self._passed += 1
        self._coloured = wanted[-1] != 0
        out.append(f"\x1b[{';'.join(map(str, wanted))}m")

    def _settle_return(self, out: list[str]) -> None:
        if self._returned:
            self._returned = False
            if self._carriage == "\n":
                self._end_line(out)
            out.append(self._carriage)

    def _end_line(self, out: list[str]) -> None:
        if self._coloured:
            out.append(RESET)
        self._coloured, self._passed = False, 0


def harmless(text: str, *, colours: bool = False) -> str:
    """Return text without control characters but newlines and tabs, and without sequences but colours if wanted."""
    if _TEXT.fullmatch(text):
        return text
    shown = ControlFilter(colours=colours)
    return shown.feed(text) + shown.finish()
