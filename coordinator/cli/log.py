"""`drover log`: the log of one attempt, whole, followed, or those of its lines that contain a text."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Final, TextIO

import click

from coordinator.cli import exit_status
from coordinator.cli.ci import Ci, defused, detected
from coordinator.client.api_client import ApiClient
from coordinator.terminal_controls import ControlFilter

#: Bytes of one line that are held and shown, and characters around a text that is found behind them.
LINE_BYTES: Final = 64 * 1024
AROUND_CHARS: Final = 200


async def log(client: ApiClient, step: str, *, attempt: int | None, follow: bool, search: str) -> int:
    """Print a log: the very bytes; on a terminal, and for a CI runner, nothing that it would obey."""
    out = sys.stdout.buffer
    printer = Printer(sys.stdout, os.environ)
    silent = True
    try:
        chunks = client.log(step, attempt=attempt, follow=follow)
        async for chunk in _found(chunks, search) if search else chunks:
            silent = False
            out.write(printer.feed(chunk))
            out.flush()
    finally:
        # After an interruption too: the terminal is left as it was.
        out.write(printer.finish())
        out.flush()
    if silent:
        click.echo(f"drover: no line has {search!r}" if search else "drover: the build printed nothing", err=True)
    return exit_status.OK


class LineSearch:
    """Finds the lines that contain a text, upper and lower case alike.

    Holds the first `LINE_BYTES` of one line. Of a longer one what stands behind them is searched too, and where only
    that has the text, what stands around it is given.
    """

    def __init__(self, text: str) -> None:
        self._text = text.casefold()
        #: Bytes that a text that is found, and what stands before it, take at most as UTF-8.
        self._longest = 4 * (len(text) + AROUND_CHARS)
        self._line = bytearray()
        #: The last bytes of what stands behind the held ones, and a piece of it that has the text.
        self._behind = b""
        self._piece = ""
        self._number = 1

    @property
    def held_bytes(self) -> int:
        """Bytes of the line so far that are held."""
        return len(self._line)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each line that contains the text, with its number before it."""
        *whole, rest = data.split(b"\n")
        for part in whole:
            yield from self._end(part)
        self._take(rest)

    def finish(self) -> Iterator[bytes]:
        """Yield the last line if it contains the text and has no end."""
        if self._line:
            yield from self._end(b"")

    def _take(self, part: bytes) -> None:
        room = LINE_BYTES - len(self._line)
        self._line += part[:room]
        if len(part) <= room:
            return
        if self._piece:
            more = len(self._text) + 2 * AROUND_CHARS - len(self._piece)
            self._piece += part[: 4 * more].decode("utf-8", "replace")[:more]
            return
        window = (self._behind or bytes(self._line[-self._longest :])) + part[room:]
        text = window.decode("utf-8", "replace")
        if (at := text.casefold().find(self._text)) >= 0:
            self._piece = text[max(0, at - AROUND_CHARS) : at + len(self._text) + AROUND_CHARS]
        self._behind = window[-self._longest :]

    def _end(self, part: bytes) -> Iterator[bytes]:
        self._take(part)
        if self._text in self._line.decode("utf-8", "replace").casefold():
            yield b"%d: %b\n" % (self._number, bytes(self._line))
        elif self._piece:
            yield f"{self._number}: \u2026{self._piece}\n".encode()
        self._line.clear()
        self._behind, self._piece = b"", ""
        self._number += 1


async def _found(chunks: AsyncIterator[bytes], text: str) -> AsyncIterator[bytes]:
    search = LineSearch(text)
    async for chunk in chunks:
        for line in search.feed(chunk):
            yield line
    for line in search.finish():
        yield line


class Printer:
    """Makes of a log's bytes what standard output takes: as they are, unless a terminal or a runner reads them."""

    def __init__(self, stream: TextIO, environment: Mapping[str, str]) -> None:
        on_terminal = stream.isatty()
        self._encoding = stream.encoding or "utf-8"
        self._runner = not on_terminal and detected(environment) is not Ci.NONE and not _is_file(stream)
        self._filter = ControlFilter(colours=True) if on_terminal or self._runner else None
        #: The line so far, for runners: they look at its beginning.
        self._line = ""

    def feed(self, data: bytes) -> bytes:
        """Return what is written for a piece of the log."""
        if self._filter is None:
            return data
        return self._encoded(self._whole_lines(self._filter.feed_bytes(data)))

    def finish(self) -> bytes:
        """Return what is left to be written at the end."""
        if self._filter is None:
            return b""
        text = self._whole_lines(self._filter.finish())
        rest, self._line = defused(self._line), ""
        return self._encoded(text + rest)

    def _whole_lines(self, text: str) -> str:
        if not self._runner:
            return text
        whole, newline, self._line = (self._line + text).rpartition("\n")
        if len(self._line) > LINE_BYTES:
            whole, newline, self._line = whole + newline + self._line, "", ""
        return defused(whole) + newline

    def _encoded(self, text: str) -> bytes:
        return text.encode(self._encoding, "replace")


def _is_file(stream: TextIO) -> bool:
    """Return true if an output is a file, which no runner reads."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False
