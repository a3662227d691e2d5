"""Lookup of closures: this cache answers in batches, upstreams path by path, with bounds on what is waited for.

What an upstream said is remembered by it (`infra.cache.pulls.upstream`), so that a plan which ran out of time finds
more when it is made again.

What was recorded of an upstream when its path was populated (`infra.cache.pulls.recorded_paths`) is an answer too, as
long as that upstream is one of the farm's and answers others. A wished path is asked for first, because an upstream
deletes what is old, and its record counts where there was no time to ask. What it stands on is believed as recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from coordinator.api.plan_models import UpstreamPlan, UpstreamState
from coordinator.errors import IntakeError
from coordinator.plans.closures import HERE, ClosureSurvey, LocatedPath
from infra.cache.errors import ClosureTooLargeError
from infra.cache.pulls.recorded_paths import RecordedPath
from infra.nix.narinfo import NarInfo
from infra.nix.store_path import hash_part_of

#: Seconds that upstreams have together, and one of them for one piece of a question.
BUDGET_S: Final = 3.0
PATIENCE_S: Final = 2.0
#: Paths of one piece: at most four round trips, as an upstream takes sixteen questions at a time.
PIECE: Final = 64
#: Paths of one piece of an upstream that has answered the question for a closure: one round trip, or few.
PIECE_AT_ONCE: Final = 500
#: Paths of which this cache is asked at once.
ASKED_AT_ONCE: Final = 1_000
#: Paths of all closures together.
MAX_PATHS: Final = 200_000


class ClosureSource(Protocol):
    """The farm's cache, as far as it is asked here."""

    async def closure(
        self, store_paths: Iterable[str], *, recursive: bool = True, at_most: int | None = None
    ) -> tuple[list[bytes], list[str]]:
        """See `infra.cache.cache.Cache.closure`."""


class UpstreamSource(Protocol):
    """An upstream, as far as it is asked here."""

    @property
    def name(self) -> str:
        """Its address."""

    @property
    def is_away(self) -> bool:
        """True while it is left alone after a failure."""

    @property
    def answers_closures(self) -> bool:
        """True where many paths are best asked for at once."""

    async def narinfos(self, hash_parts: Collection[str]) -> dict[str, NarInfo]:
        """See `infra.cache.pulls.upstream.Upstream.narinfos`."""


class RecordSource(Protocol):
    """The records of upstreams, as far as they are asked here."""

    async def of(self, store_paths: Collection[str]) -> dict[str, RecordedPath]:
        """See `infra.cache.pulls.recorded_paths.RecordedPaths.of`."""


@dataclass(slots=True, eq=False)
class _Asked:
    """An upstream during one plan."""

    source: UpstreamSource
    place: int
    state: UpstreamState = "answered"
    found: int = 0


class Lookup:
    """Looks closures up in one cache and its upstreams. `now` gives seconds that only rise."""

    def __init__(
        self,
        cache: ClosureSource,
        upstreams: Sequence[UpstreamSource],
        records: RecordSource,
        store_dir: str,
        now: Callable[[], float],
    ) -> None:
        self._cache = cache
        self._upstreams = upstreams
        self._records = records
        self._prefix = f"{store_dir}/"
        self._now = now

    async def survey(self, paths: Iterable[str]) -> tuple[ClosureSurvey, list[UpstreamPlan]]:
        """Return where the closures of some full store paths are, and what became of each upstream.

        Raises:
            IntakeError: They have too many paths.
        """
        survey = ClosureSurvey()
        asked = [_Asked(source, place) for place, source in enumerate(self._upstreams, HERE + 1)]
        frontier = wished = set(paths)
        ends_at = self._now() + BUDGET_S
        while frontier:
            lacking = await self._here(survey, frontier)
            if len(survey.located) + len(lacking) > MAX_PATHS:
                raise IntakeError(f"the wishes stand on more than {MAX_PATHS} paths; plan them in parts.")
            records = await self._recorded(lacking, asked)
            frontier = self._take(survey, {path: each for path, each in records.items() if path not in wished}, asked)
            unknown = lacking - survey.located.keys()
            frontier |= await self._elsewhere(survey, unknown, asked, ends_at, records)
            frontier = survey.frontier(frontier)
        return survey, [UpstreamPlan(url=each.source.name, state=each.state, paths=each.found) for each in asked]

    async def _here(self, survey: ClosureSurvey, paths: Collection[str]) -> set[str]:
        """Take in what this cache has of some closures; return what it lacks of them."""
        ordered = sorted(paths)
        for start in range(0, len(ordered), ASKED_AT_ONCE):
            try:
                texts, _ = await self._cache.closure(ordered[start : start + ASKED_AT_ONCE])
            except ClosureTooLargeError:
                raise IntakeError("the wishes stand on too many paths; plan them in parts.") from None
            survey.located.update(await asyncio.to_thread(_located, texts, self._prefix, HERE))
        return await asyncio.to_thread(_lacking, survey, ordered)

    async def _recorded(self, paths: Collection[str], asked: Sequence[_Asked]) -> dict[str, LocatedPath]:
        """Return what is recorded of some paths, of upstreams that answer."""
        places = {each.source.name: each.place for each in asked if each.state == "answered"}
        records = await self._records.of(paths) if places and paths else {}
        found: dict[str, LocatedPath] = {}
        for name, place in places.items():
            texts = [record.narinfo for record in records.values() if record.upstream == name]
            found |= await asyncio.to_thread(_located, texts, self._prefix, place)
        return found

    @staticmethod
    def _take(survey: ClosureSurvey, found: Mapping[str, LocatedPath], asked: Sequence[_Asked]) -> set[str]:
        """Take in what upstreams have; return what that refers to."""
        survey.located.update(found)
        for each in found.values():
            asked[each.place - 1].found += 1
        return {reference for each in found.values() for reference in each.references}

    async def _elsewhere(
        self,
        survey: ClosureSurvey,
        paths: Collection[str],
        asked: Sequence[_Asked],
        ends_at: float,
        records: Mapping[str, LocatedPath],
    ) -> set[str]:
        """Ask upstreams for some paths; return the paths that what they have refers to."""
        in_use = [each for each in asked if each.state == "answered"]
        answers = await asyncio.gather(*(self._ask(each, sorted(paths), ends_at) for each in in_use))
        # What was found out just now.
        places = {each.place for each in asked if each.state == "answered"}
        taken: dict[str, LocatedPath] = {}
        for path in paths:
            info = next((found[path] for found, _ in answers if path in found), None)
            unasked = any(path in unasked for _, unasked in answers)
            if info is None and unasked and path in records and records[path].place in places:
                info = records[path]
            if info is not None:
                taken[path] = info
            elif unasked:
                survey.unasked.add(path)
            else:
                survey.absent.add(path)
        return self._take(survey, taken, asked)

    async def _ask(
        self, upstream: _Asked, paths: Sequence[str], ends_at: float
    ) -> tuple[dict[str, LocatedPath], frozenset[str]]:
        """Return what an upstream has, and what it was not asked for because the time for all was over.

        One that is silent, or fails, counts as having nothing.
        """
        found: dict[str, LocatedPath] = {}
        start = 0
        while start < len(paths):
            left_s = ends_at - self._now()
            if left_s <= 0:
                return found, frozenset(paths[start:])
            # One that has answered such a question is not silent because a larger one takes longer.
            at_once = upstream.source.answers_closures
            piece = {hash_part_of(path): path for path in paths[start : start + (PIECE_AT_ONCE if at_once else PIECE)]}
            patience_s = left_s if at_once else min(PATIENCE_S, left_s)
            try:
                async with asyncio.timeout(patience_s):
                    infos = await upstream.source.narinfos(piece)
            except TimeoutError:
                if patience_s == left_s:
                    return found, frozenset(paths[start:])
                upstream.state = "slow"
                return found, frozenset()
            start += len(piece)
            if upstream.source.is_away:
                upstream.state = "away"
                return found, frozenset()
            for part, info in infos.items():
                if info.store_path == piece[part]:
                    found[info.store_path] = self._placed(info, upstream.place)
        return found, frozenset()

    def _placed(self, info: NarInfo, place: int) -> LocatedPath:
        references = tuple(self._prefix + name for name in info.path.references)
        return LocatedPath(place, info.stored.file_size or info.path.nar_size, info.path.nar_size, references)


def _located(texts: Sequence[bytes], prefix: str, place: int) -> dict[str, LocatedPath]:
    """Read narinfos that were written here, as far as a plan needs them; a whole reader takes five times as long."""
    found = {}
    for text in texts:
        fields = dict(line.split(b": ", 1) for line in text.splitlines() if b": " in line)
        references = tuple(prefix + name for name in fields.get(b"References", b"").decode("ascii").split())
        nar_size = int(fields[b"NarSize"])
        path = fields[b"StorePath"].decode("ascii")
        found[path] = LocatedPath(place, int(fields.get(b"FileSize", nar_size)), nar_size, references)
    return found


def _lacking(survey: ClosureSurvey, paths: Sequence[str]) -> set[str]:
    """Return what this cache lacks of some paths and of what they reach."""
    reached: set[str] = set(paths)
    for each in survey.located.values():
        reached.update(each.references)
    return survey.frontier(reached)
