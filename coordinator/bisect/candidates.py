"""Evaluation of one attribute at commits of a repository, each from files of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.bisect.errors import BisectError
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.import_store import ImportBuilds
from coordinator.evaluation.inputs import Inputs, evaluation_of
from coordinator.evaluation.model import EvaluatedRoot, some
from coordinator.evaluation.pool_limits import PoolLimits
from coordinator.evaluation.revisions import Checkout, Repository

#: Characters that are kept of why a commit does not evaluate.
ERROR_CHARS: Final = 500


@dataclass(frozen=True, slots=True)
class BisectedAttr:
    """The attribute that is bisected."""

    #: Path of the file or the flake from the top of the repository.
    file: str
    attr: str
    is_flake: bool = False
    system: str = ""
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that people call it by."""
        return f"{self.file}#{self.attr}" if self.is_flake else self.attr or self.file

    def inputs(self, top: Path) -> Inputs:
        """Return what is evaluated below the directory that holds a commit's files."""
        systems = (self.system,) if self.system else ()
        place = top / self.file
        if self.is_flake:
            return Inputs((f"path:{place}#{self.attr}",), systems=systems, flags=self.flags)
        attrs = (self.attr,) if self.attr else ()
        return Inputs((str(place),), attrs=attrs, systems=systems, flags=self.flags)


class Candidates:
    """Evaluates commits side by side, within what the machine has, from checkouts below `directory`."""

    def __init__(
        self,
        repository: Repository,
        asked: BisectedAttr,
        directory: Path,
        limits: PoolLimits,
        imports: ImportBuilds | None = None,
    ) -> None:
        """`imports` makes what commits import from derivations; None: Nix does, in the client's own store."""
        self._repository = repository
        self._asked = asked
        self._directory = directory
        self._each = PoolLimits(1, limits.memory_bytes // limits.evaluators, limits.timeout_s)
        self._places = asyncio.Semaphore(limits.evaluators)
        self._imports = imports

    async def evaluate(self, revision: str, env: Mapping[str, str] = os.environ) -> EvaluatedRoot | str:
        """Return the derivation of the attribute at a commit, or the sentence that says why there is none.

        Raises:
            EvaluationError: The files of the commit cannot be had.
        """
        async with self._places, self._repository.checkout(revision, self._directory) as checkout:
            return await self._root(checkout, env)

    async def _root(self, checkout: Checkout, env: Mapping[str, str]) -> EvaluatedRoot | str:
        top = checkout.directory
        try:
            inputs = self._asked.inputs(top)
            found = await evaluation_of(
                inputs, self._each, env=env, on_messages=lambda _text: None, imports=self._imports
            )
        except EvaluationError as error:
            text = str(error).removesuffix(" (Nix's whole message is above)")
            if checkout.submodules:
                text += f" (its submodules are not checked out: {some(checkout.submodules)})"
            for place in (f"{top}/", str(top)):
                text = text.replace(place, "")
            return " ".join(text.split())[:ERROR_CHARS]
        if len(found.wanted) != 1 or found.failed:
            names = [*(each.attr for each in found.wanted), *(each.attr for each in found.failed)]
            return f"{self._asked.name} is a set of several derivations ({some(names)}); name one of them"
        return found.wanted[0]


async def asked_of(repository: Repository, file: str, attr: str, system: str, flags: tuple[str, ...]) -> BisectedAttr:
    """Return what a person means by a file or a flake's output, and an attribute.

    Raises:
        BisectError: The file is not in the repository, or nothing is chosen of it.
    """
    is_flake = "#" in file
    reference, _, output = file.partition("#")
    path = (await asyncio.to_thread(Path(reference or ".").absolute)).resolve()
    if not path.is_relative_to(repository.root.resolve()):
        raise BisectError(f"{reference} is not in the repository {repository.root}; name a file of it")
    inside = str(path.relative_to(repository.root.resolve()))
    if not is_flake:
        return BisectedAttr(inside, attr, False, system, flags)
    if attr:
        raise BisectError("-A chooses from a file; name a flake's output after its #")
    if not output:
        raise BisectError(f"{file} names no output; write one after its #, as .#hello")
    return BisectedAttr(inside, output, True, system, flags)
