"""Packages of environments at this farm: brought from upstreams, submitted where the farm knows how to build them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence

from coordinator.api.limits import kept_text
from coordinator.api.requests import RootRequest, SubmitRequest
from coordinator.defaults import OPERATOR
from coordinator.environments.coverage import PackageStanding
from coordinator.environments.model import Environment, EnvironmentRevision
from coordinator.environments.submitted import SubmittedContent
from coordinator.errors import ConflictError, CoordinatorError
from coordinator.intake.submissions import Submissions
from coordinator.readmodel.rows import StepRow, SubmissionRow
from coordinator.stores.derivations import DerivationStore
from coordinator.wishes.model import WishedPaths, WishList
from infra.cache.cache import Cache
from infra.nix.store_path import base_name_of
from infra.objects.errors import CacheError

_log = logging.getLogger(__name__)

#: Has store paths from upstreams as far as they have them whole.
Pull = Callable[[Collection[str]], Awaitable[object]]
#: Finds how each package stands.
Judge = Callable[[WishList], Awaitable[Sequence[PackageStanding]]]


class FarmPackages:
    """`PackageSource` of a farm."""

    def __init__(  # noqa: PLR0917 - collaborators, named by their types
        self,
        cache: Cache,
        derivations: DerivationStore,
        submissions: Submissions,
        submitted: SubmittedContent,
        pull: Pull,
        judge: Judge,
    ) -> None:
        self._cache = cache
        self._derivations = derivations
        self._submissions = submissions
        self._submitted = submitted
        self._pull = pull
        self._judge = judge
        #: Called with an environment's name when what was submitted for it has ended.
        self.on_end: Callable[[str], None] = lambda _name: None

    async def bring(self, environment: Environment, revision: EnvironmentRevision, content: WishList) -> None:
        """Have what upstreams have, and submit the rest as far as the farm knows its derivations.

        What fails is logged, and is done again with the next look.
        """
        try:
            absent = await self._cache.missing(await asyncio.to_thread(lambda: content.paths))
            if absent:
                await self._pull(absent)
                absent = await self._cache.missing(absent)
            if absent:
                await self._submit(environment, revision, content)
        except (CoordinatorError, CacheError) as error:
            _log.warning("not all of %s@%d could be brought: %s", environment.name, revision.number, error)

    async def standings(self, content: WishList) -> Sequence[PackageStanding]:
        """Return how each package stands on its system."""
        return await self._judge(content)

    async def resolved(self, content: WishList) -> WishList:
        """Return the wishes with the store paths of derivations. Raises `EnvironmentSourceError`."""
        return await self._submitted.resolved(content)

    async def _submit(self, environment: Environment, revision: EnvironmentRevision, content: WishList) -> None:
        """Submit all of a revision that the farm can build; the same again is the same submission."""
        wanted = await asyncio.to_thread(buildable, content)
        unknown = set(await self._derivations.unknown(list(wanted)))
        roots = tuple(root for name, root in wanted.items() if name not in unknown)
        if not roots:
            return
        owner = environment.owners[0] if environment.owners else OPERATOR
        wish = await asyncio.to_thread(
            SubmitRequest,
            roots=roots,
            label=f"environment {environment.name}",
            idempotency_key=f"environment/{environment.name}/{revision.number}/{revision.digest[:16]}",
        )
        try:
            row = await self._submissions.submit(wish, owner)
        except ConflictError:
            # Derivations have come since it was submitted; they came with a submission of their own.
            return
        if not row.ended and not any(isinstance(each, _EndListener) for each in row.watchers):
            row.watchers.append(_EndListener(row, lambda: self.on_end(environment.name)))


class _EndListener:
    """Listener of a submission that waits for its end alone; it goes with its row."""

    def __init__(self, row: SubmissionRow, on_end: Callable[[], None]) -> None:
        self._row = row
        self._on_end = on_end

    def step_changed(self, row: StepRow) -> None:
        """Do nothing."""

    def bytes_moved(self, row: StepRow, now: float) -> None:
        """Do nothing."""

    def submission_changed(self) -> None:
        """Report the end."""
        if self._row.ended:
            self._on_end()


def buildable(content: WishList) -> dict[str, RootRequest]:
    """Return what names its derivation, by the derivation's base name; slow for large contents."""
    found = {}
    for wish in content.wishes:
        if isinstance(wish.target, WishedPaths) and wish.target.derivation:
            path = wish.target.derivation
            found[base_name_of(path)] = RootRequest(attr=kept_text(wish.name), drv=path)
    return found
