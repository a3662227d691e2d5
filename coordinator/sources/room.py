"""Sources: has fixed outputs from what is here, from upstreams and from mirrors, before a worker goes to the network.

Rules:
1. A start of a fixed-output build waits here while its output is looked for, HOLD_S at most; then the worker goes to
   the network. What is found later still ends the build (`ResultsHeld`).
2. What a plan lacks is looked for ahead of its turn, so that a farm whose workers have no network gets its sources too.
3. `sources.at_once` outputs are looked for at one time, those that a worker waits for first. A place that fails is
   asked again, TRIES times in all, and left alone for a while; one that does not have it is not asked again for KEPT_S.
4. Nothing is believed: upstreams by their keys, and both they and mirrors by the hash of what they send.
5. What one build has fetched, others that want the same content under another name have at once; they wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, Final, cast

from coordinator.api.models import StepStatus
from coordinator.engine.engine import Engine
from coordinator.errors import CoordinatorError, UnavailableError
from coordinator.intake.fixed_outputs import FixedOutputs, Lacking
from coordinator.readmodel.rows import ACTIVE, OPEN, StepRow
from coordinator.readmodel.views import Views
from coordinator.sources.mirror import Mirror, MirrorAnswer, MirrorOutcome, plain_file_nar
from coordinator.stores.derivations import DerivationStore
from infra.cache.cache import Cache
from infra.cache.publishing.claims import Rejected
from infra.cache.pulls.upstream import Upstream
from infra.clock import Clock
from infra.nix.content import ContentCheck, FixedContent
from infra.nix.errors import FormatError
from infra.nix.path_info import PathInfo
from infra.nix.store_path import hash_part_of
from infra.objects.errors import CacheError
from infra.objects.nar_encoder import UploadedNar
from infra.objects.nar_writer import upload_nar
from infra.retry import Backoff
from scheduler.effects import CancelBuild, Effect, StartBuild
from scheduler.events import ResultsHeld
from scheduler.model import Instant, StepKey
from workers.wire.messages import NETWORK_FEATURE

#: Seconds for which a start waits; less than after which the core sends it again (`policy.Limits.start_grace_s`).
HOLD_S: Final = 10.0
#: Starts that wait at one time; of more, workers go to the network at once.
MAX_HELD: Final = 1_000
#: Fixed outputs that are remembered, some 500 bytes each.
REMEMBERED: Final = 50_000
#: How often a place is asked for an output that fails, and how long its answer counts.
TRIES: Final = 3
KEPT_S: Final = 3600.0
#: Steps looked at between two pauses.
LOOKED_AT: Final = 2_000
#: Bytes of a file that wait in memory.
SPOOLED_BYTES: Final = 8 * 1024 * 1024

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Search:
    """State of the search for one fixed output that was lacking."""

    step: StepKey
    #: Full store path and content; None until the derivation was read, or where it cannot be.
    lacking: Lacking | None
    #: When all places were asked; 0 for not yet.
    asked_at: float = 0.0
    tries: int = 0
    #: Why no place had it, a sentence each.
    answers: tuple[str, ...] = ()


class SourceRoom:
    """The room; for the tasks of one event loop. `send` gives starts back that have waited."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        fixed: FixedOutputs,
        cache: Cache,
        derivations: DerivationStore,
        views: Views,
        engine: Engine,
        clock: Clock,
        send: Callable[[Sequence[Effect]], None],
        at_once: int,
    ) -> None:
        #: Both are filled once they are open.
        self.upstreams: list[Upstream] = []
        self.mirrors: list[Mirror] = []
        self._fixed = fixed
        self._cache = cache
        self._derivations = derivations
        self._views = views
        self._engine = engine
        self._clock = clock
        self._send = send
        self._at_once = at_once
        self._searches: OrderedDict[StepKey, Search] = OrderedDict()
        #: Steps by what they want; of those that are remembered.
        self._wanting: dict[FixedContent, set[StepKey]] = {}
        #: Those to look for, the first one next.
        self._waiting: OrderedDict[StepKey, None] = OrderedDict()
        self._filled = asyncio.Event()
        self._held: dict[StepKey, StartBuild] = {}

    def search_of(self, step: StepKey) -> Search | None:
        """Return what is known of a step's search."""
        return self._searches.get(step)

    def want(self, lacking: Iterable[Lacking]) -> None:
        """Look for what a plan lacks, ahead of its turn."""
        for each in lacking:
            self._search(each.step, each)
            if self.upstreams or self.mirrors:
                self._enqueue(each.step, first=False)

    def detour(self, effects: Sequence[Effect]) -> Sequence[Effect]:
        """Keep the starts whose outputs are to be looked for first, and return all other effects."""
        return [effect for effect in effects if not self._keeps(effect)]

    def published(self, step: StepKey) -> None:
        """Note that the outputs of a step may be there: others may want the same content."""
        search = self._searches.get(step)
        if search is None or search.lacking is None or self._fixed.offers is None:
            return
        for other in self._wanting.get(search.lacking.content, ()):
            if other != step and self._open_row(other) is not None:
                self._enqueue(other, first=True)

    async def run(self) -> None:
        """Serve until cancelled."""
        for count, row in enumerate(self._views.rows()):
            if not count % LOOKED_AT:
                await asyncio.sleep(0)
            if NETWORK_FEATURE in row.requires.features and row.state in OPEN:
                self._search(row.key, None)
                self._enqueue(row.key, first=False)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._at_once):
                group.create_task(self._serve())

    def _keeps(self, effect: Effect) -> bool:
        if isinstance(effect, CancelBuild):
            held = self._held.get(effect.lease.step)
            if held is not None and held.lease == effect.lease:
                del self._held[effect.lease.step]
            # The worker may have it all the same: a start that is repeated, by a coordinator that began anew say.
            return False
        if not isinstance(effect, StartBuild):
            return False
        step = effect.lease.step
        row = self._views.row_of(step)
        if row is None or NETWORK_FEATURE not in row.requires.features or len(self._held) >= MAX_HELD:
            return False
        search = self._search(step, None)
        if search.asked_at and self._clock.now() - search.asked_at < KEPT_S:
            return False
        self._held[step] = effect
        self._enqueue(step, first=True)
        asyncio.get_running_loop().call_later(HOLD_S, self._let_go, effect)
        return True

    def _let_go(self, effect: StartBuild) -> None:
        """Send a start to its worker that still waits here; one whose lease was lost meanwhile is dropped."""
        step = effect.lease.step
        if self._held.get(step) != effect:
            return
        del self._held[step]
        row = self._views.row_of(step)
        if row is not None and row.state is StepStatus.RUNNING and row.life.attempt == effect.lease.attempt:
            self._send([effect])

    def _search(self, step: StepKey, lacking: Lacking | None) -> Search:
        search = self._searches.get(step)
        if search is None:
            search = self._searches[step] = Search(step, None)
            if len(self._searches) > REMEMBERED:
                _, oldest = self._searches.popitem(last=False)
                if oldest.lacking is not None:
                    self._unlink(oldest.step, oldest.lacking.content)
        if lacking is not None and search.lacking is None:
            search.lacking = lacking
            self._wanting.setdefault(lacking.content, set()).add(step)
        return search

    def _unlink(self, step: StepKey, content: FixedContent) -> None:
        steps = self._wanting.get(content, set())
        steps.discard(step)
        if not steps:
            self._wanting.pop(content, None)

    def _is_on_its_way(self, step: StepKey) -> bool:
        """Return whether a worker fetches what this step wants for another one; its end is worth waiting for."""
        if self._fixed.offers is None:
            return False
        search = self._searches.get(step)
        others = self._wanting.get(search.lacking.content, ()) if search and search.lacking else ()
        rows = (self._views.row_of(other) for other in others if other != step and other not in self._held)
        return any(row is not None and row.state in ACTIVE for row in rows)

    def _enqueue(self, step: StepKey, *, first: bool) -> None:
        self._waiting.setdefault(step)
        if first:
            self._waiting.move_to_end(step, last=False)
        self._filled.set()

    def _open_row(self, step: StepKey) -> StepRow | None:
        row = self._views.row_of(step)
        return row if row is not None and row.state in OPEN else None

    async def _serve(self) -> None:
        while True:
            await self._filled.wait()
            if not self._waiting:
                self._filled.clear()
                continue
            step, _ = self._waiting.popitem(last=False)
            found = False
            try:
                found = self._open_row(step) is not None and await self._find(self._search(step, None))
                if found:
                    # Ends the lease too, if there is one: a start that waits here is dropped with it.
                    await self._engine.offer(ResultsHeld((step,), Instant(self._clock.now())))
                    self.published(step)
            except UnavailableError:
                return
            except (CacheError, CoordinatorError) as error:
                _log.warning("the source %s was not looked for: %s", step, error)
            if not found:
                # What came to wait meanwhile would find out the same.
                self._waiting.pop(step, None)
            if (held := self._held.get(step)) is not None and not self._is_on_its_way(step):
                self._let_go(held)

    async def _find(self, search: Search) -> bool:
        """Have an output from where it is; return whether it is published now."""
        lacking = search.lacking or await self._read(search)
        if lacking is None:
            search.asked_at = self._clock.now()
            return False
        if self._fixed.offers is not None and await self._fixed.offers.offer({lacking.path: lacking.content}):
            return True
        answers = await self._ask_upstreams(lacking)
        if answers is None:
            return True
        away = False
        for mirror in self.mirrors if lacking.content.is_flat else ():
            answer = await self._ask_mirror(mirror, lacking)
            if answer.outcome is MirrorOutcome.FOUND:
                return True
            away = away or answer.outcome is MirrorOutcome.AWAY
            answers.append(answer.sentence)
        search.answers, search.tries = tuple(answers), search.tries + 1
        search.asked_at = self._clock.now()
        if away and search.tries < TRIES:
            pause_s = Backoff(5.0, 60.0).next_s() * search.tries
            asyncio.get_running_loop().call_later(pause_s, lambda: self._enqueue(search.step, first=False))
        return False

    async def _read(self, search: Search) -> Lacking | None:
        """Find out the content of a step by its first recipe."""
        members = (await self._derivations.members([search.step])).get(search.step, ())
        nodes = list((await self._derivations.nodes(members[:1])).values())
        for path, content in (await self._fixed.contents(nodes)).items():
            return self._search(search.step, Lacking(search.step, path, content)).lacking
        return None

    async def _ask_upstreams(self, lacking: Lacking) -> list[str] | None:
        """Have an output from an upstream that signs it; None where that is done, else why not."""
        answers = []
        for upstream in self.upstreams:
            part = hash_part_of(lacking.path)
            info = (await upstream.narinfos([part])).get(part)
            if info is None or info.store_path != lacking.path or info.path.references:
                answers.append(f"{upstream.url} does not {'answer' if upstream.is_away else 'have it'}")
                continue
            check = ContentCheck(lacking.content)
            try:
                chunks = await upstream.nar(info)
                if chunks is None:
                    answers.append(f"{upstream.url} does not have it any more")
                    continue
                uploaded = await upload_nar(self._cache.objects, _checked(chunks, check), self._cache.compression)
                if not check.holds():
                    answers.append(f"{upstream.url} sent something else than {lacking.content.address}")
                    continue
            except (CacheError, FormatError) as error:
                answers.append(str(error)[:300])
                continue
            why = await self._publish(lacking, uploaded)
            if not why:
                return None
            answers.append(why)
        return answers

    async def _ask_mirror(self, mirror: Mirror, lacking: Lacking) -> MirrorAnswer:
        with SpooledTemporaryFile(max_size=SPOOLED_BYTES) as spool:
            file = cast("IO[bytes]", spool)
            try:
                answer = await mirror.fetch(lacking.content, file)
                if answer.outcome is not MirrorOutcome.FOUND:
                    return answer
                file.seek(0)
                archive = plain_file_nar(file, answer.size)
                uploaded = await upload_nar(self._cache.objects, archive, self._cache.compression)
            except OSError as error:
                why = f"there is no room for what {mirror.url} sent: {error.strerror}"
                return MirrorAnswer(MirrorOutcome.AWAY, why)
        why = await self._publish(lacking, uploaded)
        return MirrorAnswer(MirrorOutcome.AWAY, why) if why else answer

    async def _publish(self, lacking: Lacking, uploaded: UploadedNar) -> str:
        """Publish what was had; return why that was refused, "" where it was not."""
        info = PathInfo(lacking.path, "", 0, ca=lacking.content.address)
        (outcome,) = await self._cache.publish([uploaded.narinfo(info)])
        return outcome.message if isinstance(outcome, Rejected) else ""


async def _checked(chunks: AsyncGenerator[bytes, None], check: ContentCheck) -> AsyncIterator[bytes]:
    async with aclosing(chunks):
        async for chunk in chunks:
            await asyncio.to_thread(check.feed, chunk)
            yield chunk
