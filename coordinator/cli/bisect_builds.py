"""Builds of a bisection on the farm: what it knows, what it has room for, and what becomes of a derivation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from coordinator.api.models import Ended, RootView, StepChanged, StepStatus, SubmissionState, SubmissionView
from coordinator.api.requests import PairsQuery
from coordinator.api.sent_streams import encode_derivations, in_thread
from coordinator.bisect.verdicts import REFUSED, Origin, Outcome, Until
from coordinator.cli.screen import Screen
from coordinator.cli.sending import ClientStages, send_closure, sending_again, taken_after_sending
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import MembersBody, RootBody, SubmitBody
from coordinator.client.closure import LocalStore, read_closure
from coordinator.client.errors import RefusedError
from coordinator.errors import CoordinatorError
from coordinator.evaluation.model import EvaluatedRoot
from infra.nix import aterm
from infra.nix.derivation import Derivation, DerivationKind, classify, options
from infra.nix.store_path import StoreDir, base_name_of
from infra.nix.variant import variant_of
from infra.nix.verify import Verifier

#: Failures that hold for the limits of one submission only, so that the farm builds again.
_NOT_KNOWN: Final = frozenset({"timeout", "silence", "log_limit", "output_size"})
#: Outputs that are to be asked for again.
_UNREAD: Final = "unread"
#: Codes of refusals of a graph for what it is; they would be the same again.
_REFUSALS: Final = frozenset({"bad_derivation", "bad_source", "too_large"})


class FarmBuilds:
    """Builds on the farm that `client` is connected to, of derivations in a local store."""

    def __init__(self, client: ApiClient, store: LocalStore, screen: Screen, *, until: Until, label: str) -> None:
        self._client = client
        self._store = store
        self._screen = screen
        self._until = until
        self._label = label
        #: Submission of each derivation.
        self._submissions: dict[str, str] = {}
        #: One closure at a time is read and sent.
        self._sending = asyncio.Lock()
        self._comparing = asyncio.Lock()

    async def slots(self, root: EvaluatedRoot) -> int:
        """Return how many builds of this kind the farm has room for now."""
        derivation = self._read(root)
        wanted = set(options(derivation).required_system_features)
        return sum(
            max(0, worker.slots - len(worker.leases))
            for worker in await self._client.workers()
            if worker.state == "online" and derivation.system in worker.systems and wanted <= set(worker.features)
        )

    async def settled(self, roots: Sequence[EvaluatedRoot]) -> set[str]:
        """Return the derivations of `roots` whose outputs the farm has, or that it knows to fail."""
        outputs = {root.drv: self._outputs(root) for root in roots}
        names = tuple(sorted({name for each in outputs.values() for name in each}))
        query = MembersBody(store_dir=self._store.store_dir, derivations=(), sources=names, built=names)
        absent = set((await self._client.missing(query)).sources)
        found = {drv for drv, each in outputs.items() if absent.isdisjoint(each)}
        unknown = [root.drv for root in roots if root.drv not in found]
        known = await asyncio.gather(*map(self._is_known_to_fail, unknown))
        return found | {drv for drv, fails in zip(unknown, known, strict=True) if fails}

    async def _is_known_to_fail(self, drv: str) -> bool:
        try:
            step = await self._client.step(base_name_of(drv))
        except RefusedError as error:
            if error.reason != "not_found":
                raise
            return False
        if step.state is StepStatus.FAILED:
            return step.failure is not None and step.failure.kind not in _NOT_KNOWN
        return step.state is StepStatus.DOOMED

    async def outcome(self, root: EvaluatedRoot, commit: str) -> Outcome:
        """Have a derivation built, unless the farm has its outcome."""
        try:
            return await self._build(root, commit)
        except CoordinatorError as error:
            if getattr(error, "reason", error.code) not in _REFUSALS:
                raise
            return Outcome(Origin.BUILT, "", "", REFUSED, f"the farm builds no such thing: {error}")

    async def _build(self, root: EvaluatedRoot, commit: str) -> Outcome:
        stages = ClientStages()

        async def send(whole: bool) -> tuple[str, ...]:
            async with self._sending:
                return await send_closure(self._client, self._store, [root.drv], self._screen, stages, whole=whole)

        wish = RootBody(attr=root.attr, drv=root.drv, outputs=root.outputs, limits=root.limits)
        label = f"{self._label} at {commit[:12]}"
        request = SubmitBody(roots=(wish,), label=label)

        async def take(makers: tuple[str, ...]) -> SubmissionView:
            nonlocal request
            request = replace(request, makers=makers, stages=stages.taken)
            return await self._client.submit(request)

        outcome = await self._outcome_of(await self._ended(root.drv, await taken_after_sending(send, take), send))
        if self._until is Until.SLOWER and outcome.is_built and outcome.seconds is None:
            return replace(outcome, seconds=await self._measured(root, request, send))
        return outcome

    async def _ended(self, drv: str, view: SubmissionView, send: Callable[[bool], Awaitable[object]]) -> SubmissionView:
        """Return the submission of a derivation at its end."""
        self._submissions[drv] = view.id
        async with sending_again(send, self._screen) as on_step:
            async for event in self._client.watch(view.id):
                if isinstance(event, StepChanged):
                    on_step(event.step)
                if isinstance(event, Ended):
                    view = event.submission
        return view

    async def _measured(
        self, root: EvaluatedRoot, request: SubmitBody, send: Callable[[bool], Awaitable[object]]
    ) -> float | None:
        """Return how long a derivation takes whose outputs the farm has and never built, by building a variant of it.

        None where there is no other place for its outputs, as for a fixed one, or where the variant fails.
        """
        derivation = self._read(root)
        if classify(derivation.outputs) is not DerivationKind.INPUT_ADDRESSED:
            return None
        hashes = await asyncio.to_thread(self._input_hashes, root)
        store_dir = StoreDir(self._store.store_dir)
        drv, data = variant_of(root.drv, derivation, hashes, store_dir, b"duration")
        self._screen.status(f"{base_name_of(root.drv)} was never built here; building a variant to measure it")
        await self._client.send_derivations(in_thread(encode_derivations([(base_name_of(drv), data)])))
        wish = replace(request.roots[0], drv=drv)
        view = await self._client.submit(replace(request, roots=(wish,)))
        view = await self._ended(drv, view, send)
        if view.state is not SubmissionState.SUCCEEDED:
            return None
        return await self._seconds(view.roots[0].step)

    def _input_hashes(self, root: EvaluatedRoot) -> dict[str, str]:
        """Return the hash modulo of each derivation below a root."""
        verifier = Verifier(StoreDir(self._store.store_dir))
        closure = read_closure(self._store, [root.drv]).derivations
        return {drv: verifier.add(drv, self._store.read(drv)).hash_modulo for drv in closure}

    async def likeness(self, good: Outcome, outcome: Outcome) -> dict[str, str]:
        """Return how alike each output is to that of good; one that only one of them has is different."""
        names = sorted(good.outputs.keys() & outcome.outputs.keys())
        found: dict[str, str] = dict.fromkeys(good.outputs.keys() ^ outcome.outputs.keys(), "different")
        # A question reads at least one pair, so that this ends.
        for _ in names:
            left = [name for name in names if found.get(name, _UNREAD) == _UNREAD]
            if left:
                before, after = (tuple(each.outputs[name] for name in left) for each in (good, outcome))
                async with self._comparing:
                    compared = await self._client.compare_outputs(PairsQuery(before=before, after=after))
                found.update(zip(left, (each.likeness for each in compared.outputs), strict=True))
        return found

    async def withdraw(self, root: EvaluatedRoot) -> None:
        """End the build of a derivation; what another submission wants of it goes on."""
        submission = self._submissions.pop(root.drv, "")
        if submission:
            # It may have ended by itself.
            with suppress(RefusedError):
                await self._client.cancel(submission)

    async def _outcome_of(self, view: SubmissionView) -> Outcome:
        root = view.roots[0]
        if view.state is SubmissionState.CANCELLED:
            return Outcome(
                Origin.BUILT, root.step, view.id, "cancelled", f"its submission {view.id} was cancelled on the farm"
            )
        if view.state is SubmissionState.FAILED:
            return await self._failure_of(view, root)
        step = await self._client.step(root.step)
        origin = Origin.BUILT if step.attempt and step.ended_at >= view.created_at else Origin.CACHED
        seconds = await self._seconds(step.key) if self._until is Until.SLOWER else None
        return Outcome(origin, root.step, view.id, seconds=seconds, outputs=root.outputs)

    async def _failure_of(self, view: SubmissionView, root: RootView) -> Outcome:
        failure = root.failure
        if failure is None:
            return Outcome(Origin.BUILT, root.step, view.id, "unknown", "the farm does not say why it failed")
        step = await self._client.step(failure.step)
        origin = Origin.BUILT if step.ended_at >= view.created_at else Origin.KNOWN
        return Outcome(
            origin,
            root.step,
            view.id,
            failure.kind,
            failure.message.partition("\n")[0].rstrip(";"),
            failed_name=failure.name,
            failed_step=failure.step,
        )

    async def _seconds(self, step: str) -> float | None:
        """Return how long the newest successful build of a step took."""
        attempts = await self._client.timeline(step)
        measured = [each.build_s for each in attempts if each.outcome == "done" and each.build_s is not None]
        return measured[-1] if measured else None

    def _outputs(self, root: EvaluatedRoot) -> list[str]:
        return [
            base_name_of(each.path)
            for each in self._read(root).outputs
            if each.path and (not root.outputs or each.name in root.outputs)
        ]

    def _read(self, root: EvaluatedRoot) -> Derivation:
        return aterm.parse(self._store.read(root.drv))
