"""Contents of environments that were submitted: the roots of a submission, and derivations by their output paths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from coordinator.environments.errors import EnvironmentSourceError
from coordinator.readmodel.views import Views
from coordinator.stores.derivation_records import Node
from coordinator.stores.derivations import DerivationStore
from coordinator.wishes.model import (
    Wish,
    WishedAttribute,
    WishedDerivation,
    WishedOutput,
    WishedPaths,
    WishList,
    WishSource,
    unique,
)
from infra.nix.store_path import base_name_of


class SubmittedContent:
    """Reads submissions and derivations."""

    def __init__(self, views: Views, derivations: DerivationStore) -> None:
        self._views = views
        self._derivations = derivations

    async def content(self, submission: str, system: str) -> tuple[WishList, str]:
        """Return the roots of a submission as wishes, and the commit that its client named.

        `system` is that of the list where it has no root.

        Raises:
            NotFoundError: There is no such submission.
            EnvironmentSourceError: It has no roots, or takes more still.
        """
        row = self._views.submission(submission)
        note = self._views.note(row.id)
        if row.is_open or not note.roots:
            raise EnvironmentSourceError(
                f"submission {row.id} {'is still evaluated' if row.is_open else 'has no root'}; push it when all its "
                "roots are there: `drover status` says when."
            )
        nodes = await self._derivations.nodes([base_name_of(root.drv) for root in note.roots])
        found = [
            Wish(
                root.attr or nodes[base_name_of(root.drv)].drv,
                nodes[base_name_of(root.drv)].system,
                WishedPaths(tuple(WishedOutput(name, path) for name, path in root.outputs), root.drv),
            )
            for root in note.roots
            if base_name_of(root.drv) in nodes
        ]
        place = f"submission {row.id}"
        wishes, notes = unique(place, found)
        systems = tuple(dict.fromkeys(wish.system for wish in wishes)) or (system,)
        return WishList(place, WishSource.EVAL_JOBS, wishes, systems, notes=notes), note.origin.commit

    async def resolved(self, content: WishList) -> WishList:
        """Return the wishes with the outputs of their derivations.

        Raises:
            EnvironmentSourceError: The farm does not have one of them.
        """
        wanted = [
            base_name_of(wish.target.path) for wish in content.wishes if isinstance(wish.target, WishedDerivation)
        ]
        if not wanted:
            return content
        nodes = await self._derivations.nodes(wanted)
        wishes, _ = unique(content.place, _with_paths(content.wishes, nodes))
        systems = tuple(dict.fromkeys((*content.systems, *(wish.system for wish in wishes))))
        return replace(content, wishes=wishes, systems=systems)


def _with_paths(wishes: Iterable[Wish], nodes: dict[str, Node]) -> Iterable[Wish]:
    for wish in wishes:
        target = wish.target
        if isinstance(target, WishedAttribute):
            raise EnvironmentSourceError(f"{wish.name} must be evaluated first: push what that gives.")
        if isinstance(target, WishedPaths):
            yield wish
            continue
        node = nodes.get(base_name_of(target.path))
        if node is None:
            raise EnvironmentSourceError(
                f"this farm does not have {target.path}, so its outputs are not known; submit it first with "
                "`drover build`, then push the submission."
            )
        outputs = tuple(
            WishedOutput(name, path) for name, path in node.outputs if not target.outputs or name in target.outputs
        )
        yield replace(wish, system=node.system, target=WishedPaths(outputs, target.path))
