"""Fixed outputs of a graph that the cache lacks by their path and has by their content.

A derivation's content stands at the beginning of its text, so that derivations which were stored by earlier releases
count too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from coordinator.stores.derivation_records import Node, PackedDerivation
from coordinator.stores.derivations import DerivationStore
from infra.cache.pulls.content_offers import ContentOffers
from infra.nix.content import FixedContent
from scheduler.model import StepKey

#: Derivations that are read together, and the longest that is read at all; one that fetches something is short.
READ_AT_ONCE: Final = 512
MAX_DERIVATION_BYTES: Final = 256 * 1024
#: Contents in memory, some 200 bytes each; emptied when full.
REMEMBERED: Final = 100_000


@dataclass(frozen=True, slots=True)
class Lacking:
    """A fixed output that a plan lacks: its full path, and what it is to hold."""

    step: StepKey
    path: str
    content: FixedContent


class FixedOutputs:
    """Knows what stored derivations promise, and offers what is here; for the tasks of one event loop."""

    def __init__(self, derivations: DerivationStore, offers: ContentOffers) -> None:
        self._derivations = derivations
        #: None where a content is not to be given another name.
        self.offers: ContentOffers | None = offers
        #: Gets what submissions lack and would build, once they are known.
        self.on_lacking: Callable[[Sequence[Lacking]], None] = lambda _: None
        self._known: dict[str, FixedContent | None] = {}

    async def offer(self, nodes: Sequence[Node]) -> frozenset[str]:
        """Publish those outputs of fixed-output nodes whose content is here under another name; return their paths.

        Raises:
            DerivationsError: The derivations cannot be read.
            MetadataError: As all of `Cache`.
        """
        if self.offers is None or not nodes:
            return frozenset()
        return await self.offers.offer(await self.contents(nodes))

    def lacking(self, nodes: Iterable[Node]) -> tuple[Lacking, ...]:
        """Return what fixed-output nodes are to make, as far as their contents are known."""
        found = ((node, self._known.get(node.drv)) for node in nodes)
        return tuple(Lacking(node.step, node.outputs[0][1], content) for node, content in found if content is not None)

    async def contents(self, nodes: Sequence[Node]) -> dict[str, FixedContent]:
        """Return the content of each output (full path) as far as the derivations are known.

        Raises:
            DerivationsError: The derivations cannot be read.
        """
        unknown = [node.drv for node in nodes if node.drv not in self._known]
        for start in range(0, len(unknown), READ_AT_ONCE):
            await self._read(unknown[start : start + READ_AT_ONCE])
        found = {node.outputs[0][1]: self._known.get(node.drv) for node in nodes}
        return {path: content for path, content in found.items() if content is not None}

    def learn(self, verified: Iterable[PackedDerivation]) -> None:
        """Take what derivations promise that were just verified, so that they need not be read again."""
        for each in verified:
            if each.content:
                self._make_room(1)
                self._known[each.node.drv] = FixedContent.of_output(each.content)

    def _make_room(self, count: int) -> None:
        if len(self._known) + count > REMEMBERED:
            self._known.clear()

    async def _read(self, names: Collection[str]) -> None:
        sizes = await self._derivations.stored(names)
        short = [name for name, stored in sizes.items() if stored.size <= MAX_DERIVATION_BYTES]
        texts = await self._derivations.texts(short)
        read = await asyncio.to_thread(_contents, texts)
        self._make_room(len(names))
        self._known.update({name: read.get(name) for name in names})


def _contents(texts: Mapping[str, bytes]) -> dict[str, FixedContent | None]:
    return {name: FixedContent.of_derivation(text) for name, text in texts.items()}
