"""`drover populate`: has a wish list's paths from upstreams, builds the rest, proves that a client can fetch them.

In this order: read the lists; ask the farm which derivations it knows; look for drift; pull; evaluate what a lock can
be evaluated for and nothing has; build; prove; report. Each step that is cut leaves what it has, and the same command
goes on from there.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Final

import click

from coordinator.api.mirroring import MirroredPathView, MirrorState, MirrorView
from coordinator.api.models import FarmView, StepStatus, StepView, SubmissionView
from coordinator.api.requests import KnownDerivationsQuery, MirrorRequest, PairsQuery
from coordinator.cli import exit_status
from coordinator.cli.evaluation import inputs_of, show_messages
from coordinator.cli.follow import follow
from coordinator.cli.populate_text import PopulateReport, populate_lines, populate_markdown
from coordinator.cli.printing import print_json, size
from coordinator.cli.proof import ProofMeans, chosen, empty_directory, prove
from coordinator.cli.screen import Screen
from coordinator.cli.sending import ClientStages, send_closure, taken_after_sending
from coordinator.cli.status import write_report
from coordinator.cli.wish_reading import WishRequest, wishes_of
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import RootBody, SubmitBody
from coordinator.client.closure import ClosureError, LocalStore, local_store
from coordinator.client.errors import ClientError, RefusedError
from coordinator.errors import CoordinatorError, NotFoundError
from coordinator.evaluation.wished import evaluated
from coordinator.populate.model import (
    DerivationFacts,
    Drift,
    PopulatedWish,
    PopulateOutcome,
    PopulateTarget,
    Proof,
    ProofState,
)
from coordinator.populate.steps import changed, derivations_of, drift_of, judged, refusal_to_build, targets_of, to_pull
from coordinator.wishes.model import Wish, WishedAttribute, WishedDerivation, WishedPaths, WishList, WishSource
from infra.nix import aterm
from infra.nix.errors import FormatError
from infra.nix.store_path import drv_name_of
from infra.records import record

#: Paths of one run of mirroring, and times that one is begun because the coordinator has started anew.
PULLED_AT_ONCE: Final = 10_000
BEGUN_AT_MOST: Final = 5
#: Pairs of derivations whose difference is asked for.
MAX_DIFFERENCES: Final = 100
#: Seconds between two lines about a run of mirroring.
SHOWN_EVERY_S: Final = 10.0


@record(frozen=True, slots=True)
class PopulateRequest:
    """Arguments of the command."""

    wishes: WishRequest
    #: Of two lists only what is new in the second.
    old: WishRequest | None = None
    pull: bool = True
    build: bool = True
    #: Evaluate every entry of a lock that can be, and compare, also where its paths are to be had.
    evaluate: bool = False
    proof: ProofMeans = ProofMeans.AUTO
    keep_as: str = ""
    wait_s: int | None = None
    retry: bool = False
    as_json: bool = False
    markdown: Path | None = None


@record(slots=True)
class PopulateRun:
    """One run of the command."""

    client: ApiClient
    request: PopulateRequest
    screen: Screen
    token: str
    store: LocalStore
    derivations: dict[str, DerivationFacts] = field(default_factory=dict)
    makers: dict[str, str] = field(default_factory=dict)
    #: Of wishes that were evaluated here, by key.
    evaluated: dict[tuple[str, str], str] = field(default_factory=dict)
    unevaluated: dict[tuple[str, str], str] = field(default_factory=dict)
    submissions: list[str] = field(default_factory=list)
    #: What goes on at the farm if this ends now: a run of mirroring, or a submission.
    under_way: str = ""

    async def run(self) -> PopulateReport:
        """Do all of it."""
        began = time.time()
        # First of all whether a coordinator answers: an evaluation can take minutes.
        farm = await self.client.farm()
        wishes, unchanged = await self._wishes()
        await self._learn(wishes.wishes)
        if self.request.evaluate:
            await self._evaluate(wishes.wishes)
        targets = self._targets(wishes)
        drifted = await self._drifted(targets)
        pulled = await self._pull(to_pull(targets, drifted), wishes)
        results = {target.wish.key: judged(target, pulled, drifted) for target in targets}
        if not self.request.evaluate:
            lacking = [
                target.wish
                for target in targets
                if target.derivation is None and not results[target.wish.key].outcome.is_had
            ]
            if lacking and await self._evaluate(lacking):
                targets = self._targets(wishes)
                looked_at = {wish.key for wish in lacking}
                drifted |= await self._drifted([each for each in targets if each.wish.key in looked_at])
                results = {target.wish.key: judged(target, pulled, drifted) for target in targets}
        await self._build(targets, results)
        means = chosen(self.request.proof)
        seconds = await self._prove(farm, results, means)
        found = tuple(results[target.wish.key] for target in targets)
        return PopulateReport(
            wishes.place,
            wishes.systems,
            found,
            unchanged=unchanged,
            notes=wishes.notes,
            submissions=tuple(self.submissions),
            proof=means,
            proof_s=seconds,
            seconds=time.time() - began,
        )

    async def _wishes(self) -> tuple[WishList, int]:
        wishes = await wishes_of(self.request.wishes, show_messages)
        if self.request.old is None:
            return wishes, 0
        old = await wishes_of(self.request.old, show_messages)
        new = changed(old, wishes)
        self.screen.status(f"{len(new)} of {len(wishes.wishes)} are new")
        return replace(wishes, wishes=new), len(wishes.wishes) - len(new)

    def _targets(self, wishes: WishList) -> list[PopulateTarget]:
        return targets_of(wishes.wishes, self.derivations, self.makers, self.evaluated, self.unevaluated)

    # What is known.

    async def _learn(self, wishes: Sequence[Wish]) -> None:
        """Ask the farm which derivations it has, and this machine's store for the others."""
        named = derivations_of(wishes)
        paths = tuple(dict.fromkeys(path for wish in wishes for path in _paths(wish)))
        known = await self.client.known_derivations(KnownDerivationsQuery(derivations=named, outputs=paths))
        for each in known.derivations:
            self.derivations[each.path] = DerivationFacts(each.path, each.outputs, each.system, at_farm=True)
        self.makers |= known.makers
        await asyncio.to_thread(self._learn_here, [drv for drv in named if drv not in self.derivations])

    def _learn_here(self, drvs: Iterable[str]) -> None:
        for drv in drvs:
            if not self.store.has(drv):
                continue
            try:
                derivation = aterm.parse(self.store.read(drv))
            except FormatError:
                continue
            outputs = {output.name: output.path for output in derivation.outputs}
            self.derivations[drv] = DerivationFacts(drv, outputs, derivation.system, at_farm=False)
            self.makers |= {path: drv for path in outputs.values() if path and path not in self.makers}

    async def _evaluate(self, wishes: Iterable[Wish]) -> bool:
        """Evaluate entries of locks, each source by itself; returns whether anything was."""
        groups: dict[str, list[Wish]] = {}
        for wish in wishes:
            if isinstance(wish.target, WishedPaths) and wish.target.installable:
                source, _, attribute = wish.target.installable.partition("#")
                asked = replace(wish, target=WishedAttribute(source, attribute), marks=frozenset())
                groups.setdefault(source, []).append(asked)
        asked_of = self.request.wishes
        _, means = inputs_of(asked_of.evaluation, asked_of.settings, asked_of.store, show_messages)
        flags = (*asked_of.settings, *self.store.flags)
        for source, members in groups.items():
            self.screen.status(f"evaluating {len(members)} of {source}")
            one = WishList(source, WishSource.FLAKE, tuple(members), ())
            try:
                found = await evaluated(one, means, flags=flags, read=self.store.read)
            except CoordinatorError as error:
                self.unevaluated.update((wish.key, f"it cannot be evaluated: {error}") for wish in members)
                continue
            made = {wish.key: drv for wish in found.wishes if (drv := _drv_of(wish))}
            self.evaluated |= made
            why = found.notes[0] if found.notes else f"{source} has no such package"
            self.unevaluated.update(
                (wish.key, f"it cannot be evaluated: {why}") for wish in members if wish.key not in made
            )
            fresh = [drv for drv in made.values() if drv not in self.derivations]
            await asyncio.to_thread(self._learn_here, fresh)
        return bool(groups)

    async def _drifted(self, targets: Iterable[PopulateTarget]) -> dict[tuple[str, str], Drift]:
        """Return the drifts, each with the first input in which its derivation differs."""
        found = {target.wish.key: drift for target in targets if (drift := drift_of(target, self.makers))}
        return {
            key: replace(drift, difference=await self._difference(drift, number))
            for number, (key, drift) in enumerate(found.items())
        }

    async def _difference(self, drift: Drift, number: int) -> str:
        if not drift.listed_by:
            return "no derivation of the listed path is known here: it was changed in the list, or never built here"
        if drift.listed_by == drift.derivation:
            return "the derivation is the same; the list names another path than it makes"
        if number >= MAX_DIFFERENCES:
            return "not compared: more than enough drifted"
        try:
            return await self._first_difference(drift)
        except (ClosureError, RefusedError) as error:
            return f"they could not be compared: {error}"

    async def _first_difference(self, drift: Drift) -> str:
        facts = [self.derivations[drv] for drv in (drift.listed_by, drift.derivation) if drv in self.derivations]
        local = [each.path for each in facts if not each.at_farm]
        if local:
            await send_closure(self.client, self.store, local, self.screen, ClientStages())
        pair = PairsQuery(before=(drift.listed_by,), after=(drift.derivation,))
        view = await self.client.rebuild_causes(pair)
        if not view.causes:
            return "no input differs that could be found"
        first = view.causes[0]
        name = first.names[0] if first.names else drv_name_of(first.drv)
        if first.uncompared or not first.changes:
            return f"the first differing input is {name}, of which the farm has one side only"
        change = first.changes[0]
        sides = " to ".join("nothing" if side is None else repr(side) for side in (change.before, change.after))
        return f"the first differing input is {name}: {' '.join(filter(None, (change.field, change.name)))}, {sides}"

    # Pulling.

    async def _pull(self, paths: Sequence[str], wishes: WishList) -> dict[str, MirroredPathView]:
        """Have paths from the farm's upstreams; with `--no-pull` they are only looked for in the cache."""
        found: dict[str, MirroredPathView] = {}
        name = self.request.keep_as or f"{Path(wishes.place).name or 'list'}-{wishes.digest[:12]}"
        kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)
        for start in range(0, len(paths), PULLED_AT_ONCE):
            part = tuple(paths[start : start + PULLED_AT_ONCE])
            numbered = f"{kept.lstrip('.-_')[:180]}-{start // PULLED_AT_ONCE}" if start else kept.lstrip(".-_")[:180]
            request = MirrorRequest(paths=part, keep_as=numbered, pull=self.request.pull)
            view = await self._mirrored(request)
            found.update((each.path, each) for each in view.paths)
        return found

    async def _mirrored(self, request: MirrorRequest) -> MirrorView:
        for _ in range(BEGUN_AT_MOST):
            view = await self.client.mirror(request)
            self.under_way = view.id
            self.screen.status(f"upstreams: {len(request.paths)} paths to look for ({view.id})")
            shown = time.monotonic()
            try:
                while not view.state.ended:
                    view = await self.client.mirroring(view.id, view.state)
                    if time.monotonic() - shown >= SHOWN_EVERY_S:
                        shown = time.monotonic()
                        self.screen.status(_progress(view))
            except RefusedError as error:
                if error.reason != NotFoundError.code:
                    raise
                self.screen.status("the coordinator has started anew; what came before stays, the rest is asked again")
                continue
            if view.state is not MirrorState.DONE:
                raise ClientError(view.error or f"the run {view.id} was cancelled; what came before stays")
            self.under_way = ""
            self.screen.status(_progress(view))
            return view
        raise ClientError("the coordinator starts anew again and again; see its log")

    # Building.

    async def _build(self, targets: Sequence[PopulateTarget], results: dict[tuple[str, str], PopulatedWish]) -> None:
        """Build what is not had and can be, in one submission for what is sent and one for what the farm has."""
        missing = [
            target
            for target in targets
            if not results[target.wish.key].outcome.is_had
            and results[target.wish.key].outcome is not PopulateOutcome.DRIFT
            and target.derivation is not None
        ]
        if not missing or not self.request.build:
            return
        workers = await self.client.workers()
        systems = {name for each in workers if each.state != "gone" for name in (*each.systems, *each.emulated)}
        wanted: dict[bool, list[PopulateTarget]] = {False: [], True: []}
        for target in missing:
            refusal = refusal_to_build(target, systems)
            if refusal is not None:
                outcome, reason = refusal
                before = results[target.wish.key]
                reason = "; ".join(filter(None, (before.reason, reason)))
                results[target.wish.key] = replace(before, outcome=outcome, reason=reason)
            elif target.derivation is not None:
                wanted[target.derivation.at_farm and not self.store.has(target.derivation.path)].append(target)
        for at_farm, members in wanted.items():
            if members:
                await self._submit(members, results, at_farm=at_farm)

    async def _submit(
        self,
        members: Sequence[PopulateTarget],
        results: dict[tuple[str, str], PopulatedWish],
        *,
        at_farm: bool,
    ) -> None:
        roots = tuple(_root(target) for target in members)
        drvs = list(dict.fromkeys(root.drv for root in roots))
        stages = ClientStages()

        async def send(whole: bool) -> tuple[str, ...]:
            return await send_closure(self.client, self.store, drvs, self.screen, stages, whole=whole)

        async def take(makers: tuple[str, ...]) -> SubmissionView:
            return await self.client.submit(
                SubmitBody(
                    roots=roots,
                    label="populate",
                    makers=makers,
                    retry_failed=self.request.retry,
                    wait_s=self.request.wait_s,
                    stages=stages.taken,
                )
            )

        try:
            view = await (take(()) if at_farm else taken_after_sending(send, take))
        except CoordinatorError as error:
            if not at_farm:
                raise
            # Its sources may be gone from the farm, and this machine has none to send.
            for target in members:
                before = results[target.wish.key]
                results[target.wish.key] = replace(before, outcome=PopulateOutcome.FAILED, reason=str(error))
            return
        self.submissions.append(view.id)
        self.under_way = view.id
        failed: dict[str, StepView] = {}
        view = await self.client.whole(await follow(self.client, view.id, self.screen, failed))
        self.under_way = ""
        ended = {root.attr: root for root in view.roots}
        for target, root in zip(members, roots, strict=True):
            before = results[target.wish.key]
            found = ended.get(root.attr)
            if found is not None and found.state is StepStatus.DONE:
                paths = target.paths or tuple(found.outputs.values())
                results[target.wish.key] = replace(
                    before, outcome=PopulateOutcome.BUILT, paths=paths, reason=before.reason, step=found.step
                )
            elif found is not None:
                why = found.failure
                reason = f"{why.name}: {why.message or why.kind}" if why else f"the submission is {view.state.value}"
                step = why.step if why else found.step
                results[target.wish.key] = replace(
                    before, outcome=PopulateOutcome.FAILED, reason=reason.strip(), step=step
                )

    # Proving.

    async def _prove(self, farm: FarmView, results: dict[tuple[str, str], PopulatedWish], means: ProofMeans) -> float:
        """Prove what is had, a system at a time; returns the seconds that it took."""
        began = time.monotonic()
        systems: dict[str, list[tuple[str, str]]] = {}
        for key, each in results.items():
            if each.outcome is PopulateOutcome.RECORDED:
                results[key] = replace(each, proof=Proof(ProofState.UPSTREAM))
            elif each.outcome.is_had and means is not ProofMeans.NONE:
                systems.setdefault(each.system, []).append(key)
        for system, keys in systems.items():
            paths = tuple(dict.fromkeys(path for key in keys for path in results[key].paths))
            self.screen.status(f"proving {len(paths)} paths for {system}")
            with empty_directory() as directory:
                report = await prove(farm, self.token, paths, means, Path(directory))
            for key in keys:
                fault = next((report.failed[path] for path in results[key].paths if path in report.failed), "")
                proof = Proof(ProofState.FAILED, fault) if fault else Proof(ProofState.PROVEN)
                results[key] = replace(results[key], proof=proof)
        return time.monotonic() - began


def populate(connect: Callable[[], ApiClient], token: str, request: PopulateRequest) -> int:
    """Run `drover populate`; returns the exit status."""
    runs: list[PopulateRun] = []

    async def run() -> int:
        screen = Screen.choose(as_json=request.as_json)
        async with connect() as client:
            client.on_lost = lambda why: screen.status(f"{why}; trying again")
            runs.append(PopulateRun(client, request, screen, token, local_store(request.wishes.store)))
            report = await runs[0].run()
        for line in populate_lines(report):
            screen.line(line)
        if request.as_json:
            print_json(report.document())
            sys.stdout.flush()
        if request.markdown is not None:
            await asyncio.to_thread(write_report, request.markdown, populate_markdown(report))
        return report.status

    try:
        return asyncio.run(run())
    except KeyboardInterrupt:
        click.echo("\ndrover: interrupted; what was had stays. The same command goes on from there.", err=True)
        if runs and runs[0].under_way:
            click.echo(f"drover: the farm goes on; end that: drover cancel {runs[0].under_way}", err=True)
        return exit_status.INTERRUPTED


def _progress(view: MirrorView) -> str:
    looked = view.here + view.found + view.nowhere
    more = f", {view.recorded} recorded" if view.recorded else ""
    return (
        f"upstreams: {looked} paths looked for, {view.here} here, {view.found} found ({size(view.nar_bytes)}), "
        f"{view.taken} taken ({size(view.fetched_bytes)} fetched){more}"
    )


def _paths(wish: Wish) -> tuple[str, ...]:
    return wish.target.paths if isinstance(wish.target, WishedPaths) else ()


def _drv_of(wish: Wish) -> str:
    match wish.target:
        case WishedPaths(derivation=str(path)) | WishedDerivation(path):
            return path
        case _:
            return ""


def _root(target: PopulateTarget) -> RootBody:
    if target.derivation is None:
        raise AssertionError("what has no derivation is not built")
    names = tuple(name for name, path in target.derivation.outputs.items() if path in target.paths)
    attr = f"{target.wish.name} ({target.wish.system})"
    return RootBody(attr=attr[:1024], drv=target.derivation.path, outputs=names)
