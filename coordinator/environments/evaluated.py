"""Flakes of tracked git repositories, evaluated in the sandbox of remote evaluation where there is one.

The derivations that are found go through intake as any client's. Nothing is submitted here: what upstreams have is had
from them first, as for every environment. A revision of which a part cannot be evaluated is refused whole, because the
environment would seem whole without it.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Final, Protocol

from coordinator.api.evaluations import EvaluationState, EvaluationView
from coordinator.api.requests import RemoteEvaluationRequest, RootRequest
from coordinator.defaults import OPERATOR
from coordinator.environments.errors import EnvironmentSourceError
from coordinator.environments.model import SourceKind, TrackedSource
from coordinator.environments.reading import SourceContent, must_be_pushed, wishes_of
from coordinator.errors import CoordinatorError, NotFoundError
from coordinator.wishes.installables import OF_A_LOCK
from coordinator.wishes.model import Wish, WishedAttribute, WishedDerivation, WishList, WishSource, unique
from infra.nix.store_path import StoreDir

#: Seconds for which a look waits for an evaluation; a client waits for its answer a little longer.
WAITED_S: Final = 200.0
#: Evaluations that are remembered by what they evaluate, so that a later look takes what an earlier one began.
REMEMBERED: Final = 64
#: Words for an output that a flake does not have; it need not have all that are looked for.
_ABSENT: Final = re.compile(r"does not provide attribute|attribute '.*' (?:missing|in selection path .* not found)")
_FLAKE: Final = "flake.nix"
#: Forms whose attributes are of the repository itself, and not of another flake that is named there.
_OWN: Final = frozenset({WishSource.FLAKE_LOCK, WishSource.FLAKE})


class Evaluations(Protocol):
    """Remote evaluation, as far as it is used here."""

    off: str

    def begin(self, ask: RemoteEvaluationRequest, owner: str, *, submits: bool = True) -> EvaluationView:
        """See `coordinator.remote_evaluation.evaluations.RemoteEvaluations.begin`."""

    async def view(self, name: str, may_see: Callable[[str], bool], seen: str = "") -> EvaluationView:
        """See `coordinator.remote_evaluation.evaluations.RemoteEvaluations.view`."""

    def found(self, name: str) -> Sequence[RootRequest]:
        """See `coordinator.remote_evaluation.evaluations.RemoteEvaluations.found`."""


class EvaluatedSources:
    """Wishes of what sources have, evaluated where they must be."""

    def __init__(self, evaluations: Evaluations, store_dir: StoreDir) -> None:
        self._evaluations = evaluations
        self._store_dir = store_dir
        #: (repository, commit, what of it) -> its evaluation, oldest first.
        self._begun: OrderedDict[tuple[str, str, str], str] = OrderedDict()

    async def wishes(self, source: TrackedSource, content: SourceContent) -> WishList:
        """Return what a source wishes for, as store paths or derivations that the farm has.

        Raises:
            WishListError: It cannot be read.
            EnvironmentSourceError: It must be evaluated, and is not, or wishes for nothing.
        """
        if PurePosixPath(content.name).name == _FLAKE:
            wishes = _of_flake(content.name, source.system)
        else:
            wishes = await asyncio.to_thread(wishes_of, content, self._store_dir, source.system, evaluates=True)
        asked = [wish for wish in wishes.wishes if isinstance(wish.target, WishedAttribute)]
        if not asked:
            return wishes
        if source.kind is not SourceKind.GIT or wishes.source not in _OWN:
            raise must_be_pushed(content.name)
        if self._evaluations.off:
            raise must_be_pushed(content.name, self._evaluations.off)
        found = [each for wish in asked for each in await self._evaluated(source, content.mark, wish)]
        if not found:
            raise EnvironmentSourceError(f"{content.name} names no package, so the environment stays as it is.")
        made, repeats = unique(content.name, found)
        return replace(wishes, wishes=made, notes=(*wishes.notes, *repeats))

    async def _evaluated(self, source: TrackedSource, commit: str, wish: Wish) -> list[Wish]:
        """Return what one attribute stands for, nothing where a flake does not have it."""
        target = wish.target
        if not isinstance(target, WishedAttribute):
            return [wish]
        file = f"{PurePosixPath(source.path).parent}#{target.attribute}"
        key = (source.url, commit, f"{file} {wish.system}")
        view = await self._ended(key, wish.system, file)
        if view.state is EvaluationState.FAILED and _ABSENT.search(view.error):
            return []
        if view.state is not EvaluationState.DONE or view.failed_count:
            first = f"{view.failed[0].attr}: {view.failed[0].error}" if view.failed else view.error
            raise EnvironmentSourceError(f"{file} of {source.url} cannot be evaluated: {first or view.state.value}.")
        return [
            Wish(root.attr, wish.system, WishedDerivation(root.drv, tuple(root.outputs)))
            for root in self._evaluations.found(view.id)
        ]

    async def _ended(self, key: tuple[str, str, str], system: str, file: str) -> EvaluationView:
        """Return an evaluation that has ended, begun by this look or by an earlier one."""
        url, commit, _ = key
        view = await self._known(key)
        if view is None:
            ask = RemoteEvaluationRequest(git=url, rev=commit, file=file, systems=(system,))
            try:
                view = self._evaluations.begin(ask, OPERATOR, submits=False)
            except CoordinatorError as error:
                raise EnvironmentSourceError(str(error)) from None
            self._begun[key] = view.id
            while len(self._begun) > REMEMBERED:
                self._begun.popitem(last=False)
        try:
            async with asyncio.timeout(WAITED_S):
                while not view.state.ended:
                    view = await self._evaluations.view(view.id, lambda _owner: True, view.state)
        except TimeoutError:
            raise EnvironmentSourceError(
                f"{file} of {url} is still being evaluated ({view.id}); a later look takes what is found."
            ) from None
        if view.state is not EvaluationState.DONE:
            # What failed may not fail again: a server was away, say.
            self._begun.pop(key, None)
        return view

    async def _known(self, key: tuple[str, str, str]) -> EvaluationView | None:
        if key not in self._begun:
            return None
        try:
            return await self._evaluations.view(self._begun[key], lambda _owner: True)
        except NotFoundError:
            del self._begun[key]
            return None


def _of_flake(name: str, system: str) -> WishList:
    """Return the wishes of a flake without a lock: what its lock would stand for."""
    wishes = tuple(Wish(output, system, WishedAttribute(".", f"{output}.{system}")) for output in OF_A_LOCK)
    return WishList(name, WishSource.FLAKE, wishes, (system,))
