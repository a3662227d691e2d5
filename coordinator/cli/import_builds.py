"""Builds of what an evaluation imports from derivations, made by the farm.

Each derivation is a root of one submission, however many attributes import it; its outputs are fetched into the
client's store, with the signatures of the farm's cache verified by Nix. Many are built at one time. A derivation that
could not be built is an error of each attribute that imports it, and is not tried again within the evaluation.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Self

from coordinator.api.models import FarmView, RootView, StepStatus, SubmissionView
from coordinator.cli.fetching import realise
from coordinator.cli.screen import Screen
from coordinator.cli.sending import ClientStages, send_closure, taken_after_sending
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import RootBody, SubmitBody
from coordinator.client.closure import LocalStore, local_store
from coordinator.errors import CoordinatorError
from infra.nix import aterm
from infra.nix.errors import NixError
from infra.nix.store_path import drv_name_of
from infra.process import ProcessError

#: Seconds that the farm may take for what one attribute imports, and to give such a build up.
IMPORT_S: Final = 6 * 3600.0
CANCEL_S: Final = 5.0
#: Such builds that the farm has at one time, of one evaluation; further ones wait here.
MAX_AT_ONCE: Final = 64
#: Seconds that such a build waits for a worker that can make it, where `--wait` says nothing.
WAIT_S: Final = 600
#: Lines of a failed build's log that stand in the attribute's error.
LOG_LINES: Final = 10
_DRV: Final = re.compile(r"(/.+\.drv)(?:[!^].*)?")


class FarmImports:
    """Builds for one evaluation."""

    def __init__(
        self,
        client: ApiClient,
        farm: FarmView,
        screen: Screen,
        settings: Sequence[str],
        store: str | None,
        *,
        wait_s: int | None,
    ) -> None:
        self._client = client
        self._farm = farm
        self._screen = screen
        self._settings = settings
        self._store = store
        self._wait_s = WAIT_S if wait_s is None else wait_s
        self._room = asyncio.Semaphore(MAX_AT_ONCE)
        #: Full path of a derivation -> its build, which returns the error or None.
        self._builds: dict[str, asyncio.Task[str | None]] = {}

    async def are_there(self, paths: Sequence[str]) -> bool:
        """Return whether the client's store has `PATH.drv!out`, as far as derivations say where that is."""
        drvs = _drvs_of(paths)
        try:
            return not drvs or await asyncio.to_thread(_are_there, local_store(self._store, drvs[0]), drvs)
        except (CoordinatorError, NixError, OSError):
            # The build says what is wrong.
            return False

    async def build(self, paths: Sequence[str], attr: str) -> str | None:
        """Have `PATH.drv!out` built and fetched; returns None, or the error for an attribute that imports them."""
        drvs = _drvs_of(paths)
        if not drvs:
            return None
        store = local_store(self._store, drvs[0])
        lacking = [drv for drv in drvs if drv not in self._builds]
        if lacking:
            task = asyncio.create_task(self._make(lacking, store, attr), name="builds of an import")
            self._builds |= dict.fromkeys(lacking, task)
        errors = [await asyncio.shield(self._builds[drv]) for drv in drvs]
        return next((error for error in errors if error), None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give up builds that are not done."""
        tasks = set(self._builds.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self, drvs: Sequence[str], store: LocalStore, attr: str) -> str | None:
        names = ", ".join(map(drv_name_of, drvs[:3])) + (" and more" if len(drvs) > len(drvs[:3]) else "")
        try:
            if await asyncio.to_thread(_are_there, store, drvs):
                return None
            async with self._room, asyncio.timeout(IMPORT_S):
                return await self._submit(drvs, store, attr, names)
        except TimeoutError:
            return f"the farm did not build {names} within {IMPORT_S:g} s, which the evaluation imports"
        except (CoordinatorError, NixError, ProcessError, OSError) as error:
            return f"the farm could not build {names}, which the evaluation imports: {error}"

    async def _submit(self, drvs: Sequence[str], store: LocalStore, attr: str, names: str) -> str | None:
        async def send(whole: bool) -> tuple[str, ...]:
            return await send_closure(self._client, store, drvs, self._screen, ClientStages(), whole=whole)

        async def take(makers: tuple[str, ...]) -> SubmissionView:
            return await self._client.submit(
                SubmitBody(
                    roots=tuple(RootBody(attr=drv_name_of(drv), drv=drv) for drv in drvs),
                    label=f"imported by the evaluation of {attr or 'the file'}"[:200],
                    makers=makers,
                    wait_s=self._wait_s,
                )
            )

        view = await taken_after_sending(send, take)
        self._screen.status(f"the evaluation of {attr or 'the file'} imports {names}; the farm builds it ({view.id})")
        try:
            async for _ in self._client.watch(view.id):
                pass
        except BaseException:
            with suppress(CoordinatorError, OSError, TimeoutError):
                async with asyncio.timeout(CANCEL_S):
                    await self._client.cancel(view.id)
            raise
        roots = await self._client.roots(view.id)
        failed = next((root for root in roots if root.state is not StepStatus.DONE), None)
        if failed is not None:
            return await self._failure(failed)
        await realise(
            self._farm, sorted({path for root in roots for path in root.outputs.values()}), store, self._settings
        )
        return None

    async def _failure(self, root: RootView) -> str:
        begin = f"the farm could not build {root.attr}, which the evaluation imports"
        if root.failure is None:
            return f"{begin}: it was cancelled"
        step = await self._client.step(root.failure.step)
        of = "" if root.failure.name == root.attr else f"{root.failure.name}: "
        tail = "".join(f"\n> {line}" for line in step.log_tail.splitlines()[-LOG_LINES:])
        return f"{begin}: {of}{root.failure.message}{tail}"


def _drvs_of(paths: Sequence[str]) -> list[str]:
    return sorted({match[1] for path in paths if (match := _DRV.fullmatch(path))})


def _are_there(store: LocalStore, drvs: Sequence[str]) -> bool:
    """Return whether the store has all outputs of derivations that say where these are."""
    for drv in drvs:
        for output in aterm.parse(store.read(drv)).outputs:
            if not output.path or not store.has(output.path):
                return False
    return True
