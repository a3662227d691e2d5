"""PageRenderer of pages: Jinja templates with autoescape, rendered in slices that give the event loop back.

A template's blocks `live_NAME` are its parts: `parts` renders them alone, and the script replaces the content of
`id="live-NAME"` by each. They name no present time, so that a part is the same text for as long as nothing happens: the
script writes ages (`age` in `parts.html`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from coordinator.api.flakes import worker_sentence
from coordinator.http.web.assets import Assets
from coordinator.http.web.svg import bar
from coordinator.http.web.texts import age_text, bytes_text, date_text, end_text, number_text, seconds_text
from coordinator.terminal_controls import harmless
from infra.clock import Clock
from infra.slices import in_slices

_FOLDER: Final = Path(__file__).parent / "templates"
#: Prefix of the blocks that are parts.
_LIVE: Final = "live_"


class PageRenderer:
    """All templates; every page is rendered here."""

    def __init__(self, assets: Assets, clock: Clock) -> None:
        self._clock = clock
        self._environment = Environment(
            loader=FileSystemLoader(_FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
            finalize=_shown,
        )
        self._environment.filters.update(
            bytes=bytes_text,
            number=number_text,
            date=date_text,
            age=age_text,
            seconds=seconds_text,
            worker_sentence=worker_sentence,
            end=end_text,
        )
        self._environment.globals.update(asset=assets.address, bar=bar)
        self._compiled: dict[str, Template] = {}

    async def page(self, name: str, **context: object) -> bytes:
        """Return a whole page, in UTF-8."""
        await self._compile_apart(name)
        return (await in_slices(self.rendering(name, **context))).encode("utf-8", "replace")

    def rendering(self, name: str, **context: object) -> Generator[None, None, str]:
        """Do the work of `page`, with pauses."""
        return _joined(self._template(name).generate({"now": self._clock.now(), **context}))

    async def parts(self, name: str, **context: object) -> dict[str, str]:
        """Return the parts of a page by their names."""
        await self._compile_apart(name)
        template = self._template(name)
        values = {"now": 0.0, **context}
        return {
            block.removeprefix(_LIVE): await in_slices(_joined(_block(template, block, values)))
            for block in template.blocks
            if block.startswith(_LIVE)
        }

    async def _compile_apart(self, name: str) -> None:
        """Compile a template at its first use, in a thread: that takes longer than the loop may be held."""
        if name not in self._compiled:
            await asyncio.to_thread(self._template, name)

    def _template(self, name: str) -> Template:
        found = self._compiled.get(name)
        if found is None:
            # Blocks that are rendered alone see no import of their template.
            self._environment.globals["ui"] = self._environment.get_template("parts.html").module
            self._environment.get_template("base.html")
            found = self._compiled[name] = self._environment.get_template(name)
        return found


def _shown(value: object) -> object:
    """Return what a template prints of a value: of text, which a stranger may have written, what a terminal would show.

    It is escaped afterwards.
    """
    return harmless(value) if type(value) is str else value


def _block(template: Template, name: str, values: dict[str, object]) -> Iterable[str]:
    return template.blocks[name](template.new_context(values))


def _joined(chunks: Iterable[str]) -> Generator[None, None, str]:
    """Join what a template yields, with a pause after each piece."""
    pieces = []
    for chunk in chunks:
        pieces.append(chunk)
        yield
    return "".join(pieces)
