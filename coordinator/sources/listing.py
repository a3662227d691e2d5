"""Listing of the sources that a farm could not do without, from what is known of its steps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Final

from coordinator.api.models import StepStatus
from coordinator.api.source_routes import SourceTrouble, SourceView
from coordinator.intake.fixed_outputs import MAX_DERIVATION_BYTES, FixedOutputs
from coordinator.readmodel.rows import StepRow
from coordinator.readmodel.views import Views
from coordinator.sources.room import SourceRoom
from coordinator.stores.derivations import DerivationStore
from infra.nix import aterm
from infra.nix.derivation import STRUCTURED_ATTRS_KEY
from infra.nix.errors import FormatError
from infra.slices import in_slices
from scheduler.model import FailureKind
from workers.wire.messages import NETWORK_FEATURE

_TROUBLES: Final = {
    FailureKind.SOURCE_GONE: SourceTrouble.GONE,
    FailureKind.TRANSIENT: SourceTrouble.UNREACHABLE,
    FailureKind.HASH_MISMATCH: SourceTrouble.MISMATCH,
}
#: Addresses that are shown of one derivation, and characters of each.
URLS_SHOWN: Final = 8
URL_CHARACTERS: Final = 500


class SourceListing:
    """Answers; reads only."""

    def __init__(self, views: Views, derivations: DerivationStore, fixed: FixedOutputs, sources: SourceRoom) -> None:
        self._views = views
        self._derivations = derivations
        self._fixed = fixed
        self._sources = sources

    async def rows(self, troubles: Collection[str]) -> list[tuple[StepRow, SourceTrouble]]:
        """Return the steps, those that ended last first, all or those with some troubles."""
        found = await in_slices(self._gathering(troubles))
        found.sort(key=lambda pair: pair[0].life.ended_at, reverse=True)
        return found

    async def views(self, rows: Sequence[tuple[StepRow, SourceTrouble]]) -> list[SourceView]:
        """Return what people see of some steps. Raises `DerivationsError`."""
        members = await self._derivations.members([row.key for row, _ in rows])
        first = {row.key: members[row.key][0] for row, _ in rows if members.get(row.key)}
        nodes = await self._derivations.nodes(list(first.values()))
        contents = await self._fixed.contents(list(nodes.values()))
        sizes = await self._derivations.stored(nodes)
        texts = await self._derivations.texts(
            name for name, stored in sizes.items() if stored.size <= MAX_DERIVATION_BYTES
        )
        urls = await asyncio.to_thread(lambda: {name: urls_of(text) for name, text in texts.items()})
        made = []
        for row, trouble in rows:
            node = nodes.get(first.get(row.key, ""))
            path = node.outputs[0][1] if node else ""
            content, search = contents.get(path), self._sources.search_of(row.key)
            failure = row.life.failure
            made.append(
                SourceView(
                    step=row.key,
                    name=self._views.name_of(row),
                    trouble=trouble,
                    path=path,
                    content=content.address if content else "",
                    urls=urls.get(node.drv, ()) if node else (),
                    state=row.state.value,
                    message=failure.message if failure else row.life.trouble,
                    answers=search.answers if search else (),
                    at=row.life.ended_at,
                )
            )
        return made

    def _gathering(self, troubles: Collection[str]) -> Generator[None, None, list[tuple[StepRow, SourceTrouble]]]:
        found = []
        for row in self._views.rows():
            yield
            if NETWORK_FEATURE not in row.requires.features:
                continue
            trouble = self._trouble(row)
            if trouble is not None and (not troubles or trouble in troubles):
                found.append((row, trouble))
        return found

    def _trouble(self, row: StepRow) -> SourceTrouble | None:
        failure = row.life.failure
        if row.state is StepStatus.FAILED and failure is not None:
            return _TROUBLES.get(failure.kind, SourceTrouble.FAILED)
        search = self._sources.search_of(row.key)
        if row.state in {StepStatus.READY, StepStatus.RUNNING} and search is not None and search.asked_at:
            return SourceTrouble.NETWORK_ONLY
        return None


def urls_of(derivation: bytes) -> tuple[str, ...]:
    """Return the addresses that a derivation says it fetches from."""
    try:
        env: Mapping[bytes, bytes] = dict(aterm.parse(derivation).env)
    except FormatError:
        return ()
    words: list[str] = []
    if STRUCTURED_ATTRS_KEY in env:
        try:
            attrs = json.loads(env[STRUCTURED_ATTRS_KEY])
        except (ValueError, RecursionError):
            return ()
        for name in ("url", "urls"):
            value = attrs.get(name) if isinstance(attrs, dict) else None
            listed = value if isinstance(value, list) else [value]
            words += [each for each in listed if isinstance(each, str)]
    else:
        for key in (b"url", b"urls"):
            words += env.get(key, b"").decode("utf-8", "replace").split()
    return tuple(dict.fromkeys(word[:URL_CHARACTERS] for word in words))[:URLS_SHOWN]
