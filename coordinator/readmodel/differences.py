"""Differences of builds: finds the last build of a name, and compares two builds down to the first causes.

The last build of a step is the newest other step of the same package and system that an attempt ended for before this
step's last one began; where no timing has one, the step of that name that the farm knew before this one. One with
the same outputs is preferred.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from coordinator.api.difference_models import CauseView, ChangeView, ComparedView, DifferenceView
from coordinator.errors import NotFoundError
from coordinator.readmodel.comparisons import WHOLE, Comparisons
from coordinator.readmodel.rows import StepRow
from coordinator.readmodel.views import Views, without_outputs
from coordinator.stores.derivations import DerivationStore, StepInfo
from coordinator.stores.timings import AttemptTiming, TimingsError, TimingStore
from infra.nix.causes import Bounds, Cause
from infra.nix.errors import FormatError
from infra.nix.store_path import base_name_of, drv_name_of, package_of, parse_base_name
from infra.slices import in_slices
from scheduler.model import StepKey

#: Earlier attempts of a package that are looked at.
EARLIER: Final = 64
#: Steps looked at between two pauses.
_PIECE: Final = 500
_HASH_AND_DASH: Final = 33
_FULL_PATH: Final = re.compile(r"/[!-~]+/[!-.0-~]+")


@dataclass(frozen=True, slots=True)
class _Build:
    """A step with the recipe that was or would be built; `timings` are its attempts."""

    info: StepInfo
    #: Base name.
    drv: str
    timings: Sequence[AttemptTiming]

    def view(self) -> ComparedView:
        """Render it."""
        ended = next((each for each in reversed(self.timings) if each.ended_at is not None), None)
        return ComparedView(
            step=self.info.key,
            name=self.info.name,
            system=self.info.system,
            drv=self.drv,
            outcome=(ended.outcome or "") if ended else "",
            ended_at=(ended.ended_at or 0.0) if ended else 0.0,
        )


class Differences:
    """Answers what differs. `flush` has timings written that are not yet."""

    def __init__(
        self, views: Views, derivations: DerivationStore, timings: TimingStore, flush: Callable[[], Awaitable[None]]
    ) -> None:
        self._views = views
        self._derivations = derivations
        self._timings = timings
        self._flush = flush
        self._comparisons = Comparisons(derivations)

    async def between(self, text: str, other: str, bounds: Bounds = WHOLE) -> DifferenceView:
        """Compare two builds by what people call them, after a flush; `other` "" is the last build of the name.

        Raises `NotFoundError`, also for a step that is forgotten unless it is given by its whole key or path.
        """
        await self.refresh()
        build = await self._find(text)
        if not other:
            return await self._against_last(build, bounds)
        return await self._compared(build, await self._find(other), bounds)

    async def refresh(self) -> None:
        """Have the newest timings written where their store takes them."""
        with contextlib.suppress(TimingsError):
            await self._flush()

    async def against_last(self, row: StepRow, bounds: Bounds) -> DifferenceView:
        """Compare a step with the last build of its name."""
        return await self._against_last(await self._build_of(row.key), bounds)

    async def _against_last(self, build: _Build, bounds: Bounds) -> DifferenceView:
        trouble = ""
        try:
            last, trouble = await self._last_attempted(build)
        except TimingsError as error:
            trouble, last = str(error), None
        last = last or await self._last_known(build)
        if last is None:
            package, system = package_of(build.info.name), build.info.system
            note = f"no earlier build of {package or build.info.key} on {system or 'any system'} is remembered"
            return DifferenceView(step=build.view(), note="; ".join(filter(None, (note, trouble))))
        found = await self._compared(build, last, bounds)
        return replace(found, note="; ".join(filter(None, (found.note, trouble))))

    # Builds.

    async def _find(self, text: str) -> _Build:
        """Return the build that a person means: a derivation's own path first, then as `Views.step` has it."""
        name = base_name_of(without_outputs(text))
        is_path = _is_base_name(name)
        if is_path and name.endswith(".drv") and (node := (await self._derivations.nodes([name])).get(name)):
            return await self._build_of(node.step, name)
        try:
            return await self._build_of(self._views.step(text).key)
        except NotFoundError:
            if not is_path:
                raise
            # Its submissions are forgotten; derivations are kept.
            paths = [text] if _FULL_PATH.fullmatch(text) else []
            drv = (await self._derivations.makers(paths)).get(text)
            node = (await self._derivations.nodes([drv])).get(drv) if drv else None
            key = StepKey(name) if node is None else node.step
            if key not in await self._derivations.steps([key]):
                raise
            return await self._build_of(key)

    async def _build_of(self, key: StepKey, drv: str = "") -> _Build:
        """Return a step with the recipe of its last attempt, or with `drv`."""
        info = (await self._derivations.steps([key])).get(key) or self._info(key)
        try:
            timings = await self._timings.of_steps([key])
        except TimingsError:
            timings = []
        if not drv:
            members = (await self._derivations.members([key])).get(key, [])
            recipe = next((each.recipe for each in reversed(timings) if each.recipe is not None), 0)
            drv = members[recipe] if recipe < len(members) else base_name_of(info.drv)
        return _Build(info, drv, timings)

    def _info(self, key: StepKey) -> StepInfo:
        """Return what the read model knows of a step whose derivation the farm no longer has."""
        row = self._views.row_of(key)
        if row is None:
            return StepInfo(key, "", "", (), "", ())
        view = self._views.step_view(row)
        return StepInfo(key, view.name, view.system, view.features, view.drv, tuple(view.outputs.items()))

    async def _last_attempted(self, build: _Build) -> tuple[_Build | None, str]:
        """Return the newest earlier build of the package that timings have, and what is missing.

        Raises `TimingsError`.
        """
        info = build.info
        if not info.name:
            return None, ""
        since = build.timings[-1].leased_at if build.timings else None
        earlier = await self._timings.last_verdicts(package_of(info.name), info.system, info.key, since, EARLIER)
        keys = [StepKey(key) for key in dict.fromkeys(each.step for each in earlier)]
        infos = await self._derivations.steps(keys)
        names = [name for name, _ in info.outputs]
        alike = (key for key in keys if key in infos and [name for name, _ in infos[key].outputs] == names)
        key = next(alike, keys[0] if keys else None)
        if key is None:
            return None, ""
        gone = key != keys[0] and keys[0] not in infos
        note = f"the farm no longer has the derivation of the last one, step {keys[0]}" if gone else ""
        return await self._build_of(key), note

    async def _last_known(self, build: _Build) -> _Build | None:
        """Return the step of the package that became known last before this one."""
        key = await in_slices(known_before(self._views, build.info)) if build.info.name else None
        return None if key is None else await self._build_of(key)

    # Comparing.

    async def _compared(self, build: _Build, other: _Build, bounds: Bounds) -> DifferenceView:
        causes = await self._comparisons.causes(other.drv, build.drv, bounds)
        note = ""
        if other.drv == build.drv:
            note = "both are the same derivation"
        elif not causes.count and not causes.unfollowed:
            note = "nothing that an output depends on differs"
        return DifferenceView(
            step=build.view(),
            other=other.view(),
            causes=tuple(map(_cause_view, causes.causes)),
            cause_count=causes.count,
            compared=causes.compared,
            unfollowed=causes.unfollowed,
            note=note,
        )


def known_before(views: Views, info: StepInfo) -> Generator[None, None, StepKey | None]:
    """Return the step of the package and system that became known last before this one, with pauses."""
    package = package_of(info.name)
    found: StepKey | None = None
    for count, row in enumerate(views.step_rows(), 1):
        if row.key == info.key:
            return found
        if row.key.startswith(package, _HASH_AND_DASH):
            name, system = views.named(row.key) or ("", "")
            if system == info.system and package_of(name) == package:
                found = row.key
        if not count % _PIECE:
            yield
    return found


def _is_base_name(text: str) -> bool:
    try:
        parse_base_name(text)
    except FormatError:
        return False
    return True


def _cause_view(cause: Cause) -> CauseView:
    return CauseView(
        name=drv_name_of(cause.pair.after),
        previous_name=drv_name_of(cause.pair.before),
        drv=base_name_of(cause.pair.after),
        previous_drv=base_name_of(cause.pair.before),
        way=cause.way,
        changes=tuple(
            [
                ChangeView(field=each.field.value, name=each.name, before=each.before, after=each.after)
                for each in cause.changes
            ]
        ),
        change_count=cause.change_count,
        alike=cause.alike,
        uncompared=cause.uncompared.value if cause.uncompared else "",
    )
