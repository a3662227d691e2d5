"""The HTTP API from the client's side: typed answers, typed errors, a watch that survives a broken connection."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qs, urlsplit

import orjson

from coordinator.api import capacity_routes, environment_routes, evaluation_routes, mirror_routes, plan_routes, routes
from coordinator.api.demand_routes import DEMAND, DemandView
from coordinator.api.models import (
    Ended,
    Snapshot,
    StepStatus,
    SubmissionState,
)
from coordinator.api.route import Route
from coordinator.api.source_routes import SOURCES, SourceView
from coordinator.client import transport
from coordinator.client.decoding import decode, decode_event, decode_list
from coordinator.client.errors import RefusedError, UnreachableError
from coordinator.client.event_reader import EventReader
from coordinator.client.transport import ANSWER_S, Transport
from coordinator.errors import UnavailableError
from infra.exchange import Answer

if TYPE_CHECKING:
    from coordinator.api.cache_models import CacheRootView, CacheView, CollectView, ResignView, VerifyView, WhyView
    from coordinator.api.difference_models import DifferenceView
    from coordinator.api.environments import CoverageView, EnvironmentView
    from coordinator.api.estimates import SubmissionEtaView
    from coordinator.api.evaluations import EvaluationView
    from coordinator.api.mirroring import KnownDerivationsView, MirrorView
    from coordinator.api.models import (
        AttemptOutcome,
        FarmView,
        IntakeMissing,
        RetryView,
        RootView,
        StepView,
        SubmissionView,
        WatchEvent,
        WorkerState,
        WorkerView,
    )
    from coordinator.api.plan_models import PlanView
    from coordinator.api.questions import ActivityView, CompletionsView, StepReasonsView
    from coordinator.api.rebuild_models import ComparedOutputsView, ForecastView, RebuildCausesView
    from coordinator.api.requests import (
        ForecastQuery,
        GrowRequest,
        IntakeQuery,
        KnownDerivationsQuery,
        MirrorRequest,
        PairsQuery,
        PinRequest,
        PlanQuery,
        PushSubmissionRequest,
        RemoteEvaluationRequest,
        Request,
        RollbackRequest,
        SealRequest,
        SubmitRequest,
        TrackRequest,
    )
    from coordinator.api.timeline_models import AttemptView, HistoryView
    from coordinator.client.bodies import GrowBody, MembersBody, SealBody, SubmitBody
    from infra.retry import RetryBudget

#: Seconds of silence on a stream before it is taken for broken.
SILENCE_S = 60.0
#: Rows of one request for a list.
PAGE_ROWS = 1000
#: The steps that a snapshot names.
_SHOWN = (StepStatus.RUNNING, StepStatus.PUBLISHING, StepStatus.FAILED)
_NEXT = re.compile(r'<([^<>]*)>; *rel="?next"?')
_Answer = TypeVar("_Answer")


class ApiClient(Transport):
    """The coordinator's routes as methods.

    Every method raises `UnreachableError` where the coordinator does not answer and `RefusedError` where it refuses.
    """

    async def missing(self, query: IntakeQuery | MembersBody) -> IntakeMissing:
        """Ask once which members of a closure must be sent."""
        return await self._one(routes.MISSING, data=_json(query))

    async def send_derivations(self, stream: AsyncIterator[bytes]) -> None:
        """Send the derivations stream of `coordinator.api.streams`."""
        async with self.stream(routes.PUT_DERIVATIONS, {}, data=stream):
            pass

    async def send_sources(self, stream: AsyncIterator[bytes]) -> None:
        """Send the sources stream of `coordinator.api.streams`."""
        async with self.stream(routes.PUT_SOURCES, {}, data=stream):
            pass

    async def send_tree(self, name: str, stream: AsyncIterator[bytes]) -> None:
        """Send a tree of `coordinator.api.trees`."""
        async with self.stream(evaluation_routes.PUT_TREE, {"tree": name}, data=stream):
            pass

    async def evaluate(self, request: RemoteEvaluationRequest) -> EvaluationView:
        """Begin a remote evaluation."""
        return await self._one(evaluation_routes.EVALUATE, data=_json(request))

    async def evaluation(self, name: str, seen: str = "") -> EvaluationView:
        """Return a remote evaluation; while its state is the one `seen`, the answer waits for a while."""
        return await self._one(evaluation_routes.EVALUATION, {"id": name}, params={"seen": seen} if seen else {})

    async def cancel_evaluation(self, name: str) -> EvaluationView:
        """End a remote evaluation; a repeat is a no-op."""
        return await self._one(evaluation_routes.CANCEL_EVALUATION, {"id": name})

    async def mirror(self, request: MirrorRequest) -> MirrorView:
        """Begin to have paths from the farm's upstreams."""
        return await self._one(mirror_routes.MIRROR, data=_json(request))

    async def mirroring(self, name: str, seen: str = "") -> MirrorView:
        """Return a run of mirroring; while its state is the one `seen`, the answer waits for a moment."""
        return await self._one(mirror_routes.MIRRORING, {"id": name}, params={"seen": seen} if seen else {})

    async def cancel_mirroring(self, name: str) -> MirrorView:
        """End a run of mirroring; a repeat is a no-op."""
        return await self._one(mirror_routes.CANCEL_MIRRORING, {"id": name})

    async def known_derivations(self, query: KnownDerivationsQuery) -> KnownDerivationsView:
        """Return which derivations the coordinator has, and which make some paths."""
        return await self._one(mirror_routes.KNOWN_DERIVATIONS, data=_json(query))

    async def submit(self, request: SubmitRequest | SubmitBody) -> SubmissionView:
        """Submit derivations that the coordinator has.

        The idempotency key, made here where the request has none, makes it one submission however often it is sent.
        """
        key = request.idempotency_key or os.urandom(16).hex()
        body = orjson.loads(_json(request)) | {"idempotency_key": key}
        return await self._one(routes.SUBMIT, data=orjson.dumps(body))

    async def grow(self, submission: str, request: GrowRequest | GrowBody) -> SubmissionView:
        """Give an open submission further roots; a repeat is a no-op."""
        return await self._one(routes.GROW, {"id": submission}, data=_json(request))

    async def seal(self, submission: str, request: SealRequest | SealBody) -> SubmissionView:
        """End the growth of an open submission; a repeat is a no-op."""
        return await self._one(routes.SEAL, {"id": submission}, data=_json(request))

    async def submissions(
        self, newest: int | None = None, filters: Mapping[str, str] | None = None
    ) -> list[SubmissionView]:
        """Return the submissions, newest first, all or some, with their first few roots.

        `filters` are by the names of `coordinator.api.submission_filters`.
        """
        return await self._pages(routes.SUBMISSIONS, query=filters, most=newest)

    async def whole(self, view: SubmissionView) -> SubmissionView:
        """Return the view with all its roots, requested again where some are missing."""
        if len(view.roots) >= view.root_count:
            return view
        return replace(view, roots=tuple(await self.roots(view.id)))

    async def submission(self, submission: str) -> SubmissionView:
        """Return one submission."""
        return await self._one(routes.SUBMISSION, {"id": submission})

    async def cancel(self, submission: str) -> SubmissionView:
        """Withdraw a submission; a repeat is a no-op."""
        return await self._one(routes.CANCEL, {"id": submission})

    async def bump(self, submission: str, priority: int | None = None) -> SubmissionView:
        """Give a submission another priority, by default one above all that wait of its owner."""
        return await self._one(routes.BUMP, {"id": submission}, data=orjson.dumps({"priority": priority}))

    async def retry(self, submission: str) -> SubmissionView:
        """Let a submission run again where it failed; a repeat is a no-op."""
        return await self._one(routes.RETRY, {"id": submission})

    async def retry_step(self, key: str) -> RetryView:
        """Build a failed step again; `key` may be any unique part of its key."""
        return await self._one(routes.RETRY_STEP, {"key": key})

    async def steps(self, submission: str, states: Sequence[StepStatus] = ()) -> list[StepView]:
        """Return the steps of a submission, those in `states` or all."""
        query = {"state": ",".join(states)} if states else {}
        return await self._pages(routes.STEPS, {"id": submission}, query)

    async def step(self, key: str) -> StepView:
        """Return one step; `key` may be any unique part of its key."""
        return await self._one(routes.STEP, {"key": key})

    async def timeline(self, key: str) -> list[AttemptView]:
        """Return the attempts of a step, the first one first."""
        return await self._pages(routes.TIMELINE, {"key": key})

    async def submission_timeline(
        self, submission: str, *, outcomes: Sequence[AttemptOutcome] = (), worker: str = ""
    ) -> list[AttemptView]:
        """Return the attempts of a submission's steps since it came, all or those that ended so, on that worker."""
        query = {"outcome": ",".join(outcomes)} if outcomes else {}
        if worker:
            query["worker"] = worker
        return await self._pages(routes.SUBMISSION_TIMELINE, {"id": submission}, query)

    async def roots(self, submission: str, states: Sequence[StepStatus] = ()) -> list[RootView]:
        """Return the roots of a submission, all or those in `states`."""
        return await self._pages(routes.ROOTS, {"id": submission}, {"state": ",".join(states)} if states else {})

    async def history(self, name: str, system: str = "") -> HistoryView:
        """Return the history of a package, on one system or all."""
        query = {"system": system} if system else {}
        return await self._one(routes.HISTORY, {"name": name}, params=query)

    async def workers(self, states: Sequence[WorkerState] = (), system: str = "") -> list[WorkerView]:
        """Return the workers, all or those in `states`, those that build for a system."""
        query = {"state": ",".join(states)} if states else {}
        if system:
            query["system"] = system
        return await self._pages(routes.WORKERS, query=query)

    async def drain(self, worker: str, *, on: bool) -> None:
        """Give a worker no new leases while `on`."""
        await self.ask(routes.DRAIN, {"name": worker}, data=orjson.dumps({"on": on}))

    async def farm(self) -> FarmView:
        """Return how to use the farm's cache."""
        return await self._one(routes.FARM)

    async def cache(self, name: str) -> CacheView:
        """Return what a cache holds; the one at /cache is `default`."""
        return await self._one(routes.CACHE, {"cache": name})

    async def cache_roots(self, name: str, kind: str = "") -> list[CacheRootView]:
        """Return the roots of a cache, all or those of one kind."""
        return await self._pages(routes.CACHE_ROOTS, {"cache": name}, {"kind": kind} if kind else {})

    async def cache_why(self, name: str, path: str) -> WhyView:
        """Return what keeps a store path."""
        return await self._one(routes.CACHE_WHY, {"cache": name}, params={"path": path})

    async def pin(self, name: str, pin: str, request: PinRequest) -> None:
        """Keep paths under a name."""
        data = _json(request)
        await self.ask(routes.PIN, {"cache": name, "pin": pin}, data=data)

    async def unpin(self, name: str, pin: str) -> None:
        """Forget a pin."""
        await self.ask(routes.UNPIN, {"cache": name, "pin": pin})

    async def collect(self, name: str, *, dry_run: bool) -> CollectView:
        """Collect garbage; takes as long as it takes."""
        data = orjson.dumps({"dry_run": dry_run})
        return await self._one(routes.COLLECT, {"cache": name}, data, answer_s=None)

    async def verify(self, name: str, *, full: bool, repair: bool) -> VerifyView:
        """Check a cache; takes as long as it takes."""
        data = orjson.dumps({"full": full, "repair": repair})
        return await self._one(routes.VERIFY, {"cache": name}, data, answer_s=None)

    async def resign(self, name: str) -> ResignView:
        """Sign everything in a cache anew; takes as long as it takes."""
        return await self._one(routes.RESIGN, {"cache": name}, answer_s=None)

    async def environments(self) -> list[EnvironmentView]:
        """Return the tracked environments, with the newest revision of each."""
        return await self._pages(environment_routes.ENVIRONMENTS)

    async def environment(self, name: str) -> EnvironmentView:
        """Return one environment with its revisions."""
        return await self._one(environment_routes.ENVIRONMENT, {"environment": name})

    async def track(self, name: str, request: TrackRequest) -> EnvironmentView:
        """Track an environment, or give one another source; its source is read before the answer comes."""
        return await self._one(environment_routes.TRACK, {"environment": name}, data=_json(request), answer_s=None)

    async def forget_environment(self, name: str) -> None:
        """Forget an environment and all that is kept for it."""
        await self.ask(environment_routes.FORGET_ENVIRONMENT, {"environment": name})

    async def look(self, name: str) -> EnvironmentView:
        """Have the source of an environment looked at now."""
        return await self._one(environment_routes.LOOK, {"environment": name}, answer_s=None)

    async def push_content(self, name: str, data: bytes, params: Mapping[str, str]) -> EnvironmentView:
        """Send what an environment consists of; `params` are the queries of the route."""
        parts = {"environment": name}
        return await self._one(environment_routes.PUSH_CONTENT, parts, data, params=params, answer_s=None)

    async def push_submission(self, name: str, request: PushSubmissionRequest) -> EnvironmentView:
        """Let an environment consist of the roots of a submission."""
        return await self._one(environment_routes.PUSH_SUBMISSION, {"environment": name}, data=_json(request))

    async def roll_back(self, name: str, request: RollbackRequest) -> EnvironmentView:
        """Move `stable` of an environment back."""
        parts = {"environment": name}
        return await self._one(environment_routes.ROLL_BACK, parts, data=_json(request), answer_s=None)

    async def coverages(self) -> list[CoverageView]:
        """Return the coverage of all environments, with few gaps of each."""
        return await self._pages(environment_routes.COVERAGES)

    async def coverage(self, name: str) -> CoverageView:
        """Return the coverage of an environment with its gaps and its past."""
        return await self._one(environment_routes.COVERAGE, {"environment": name})

    async def why(self, key: str) -> StepReasonsView:
        """Return why a step waits, failed or ran, and who wants it."""
        return await self._one(routes.WHY, {"key": key})

    async def difference(self, key: str, other: str = "") -> DifferenceView:
        """Return what differs between a step and the last build of its name, or another one."""
        return await self._one(routes.DIFFERENCE, {"key": key}, params={"with": other} if other else {})

    async def eta(self, submission: str) -> SubmissionEtaView:
        """Return when a submission ends, what bounds that, and what has bounded it so far."""
        return await self._one(routes.ETA, {"id": submission})

    async def capacity(self) -> capacity_routes.CapacityView:
        """Return the slots and hours that the farm's open work could use."""
        return await self._one(capacity_routes.CAPACITY)

    async def plan(self, query: PlanQuery) -> PlanView:
        """Ask what each package and system of a wish list could be fetched from, or would be built as."""
        return await self._one(plan_routes.PLAN, data=_json(query), answer_s=None)

    async def forecast(self, query: ForecastQuery) -> ForecastView:
        """Return the size of a submission of derivations that the coordinator has; takes as long as it takes."""
        return await self._one(routes.FORECAST, data=_json(query), answer_s=None)

    async def compare_outputs(self, query: PairsQuery) -> ComparedOutputsView:
        """Return how alike outputs are; takes as long as it takes."""
        return await self._one(routes.COMPARE_OUTPUTS, data=_json(query), answer_s=None)

    async def rebuild_causes(self, query: PairsQuery) -> RebuildCausesView:
        """Return what changed derivations follow from; takes as long as it takes."""
        return await self._one(routes.REBUILD_CAUSES, data=_json(query), answer_s=None)

    async def activity(self) -> ActivityView:
        """Return what the farm does now."""
        return await self._one(routes.ACTIVITY)

    async def completions(self, of: Sequence[str], beginning: str) -> CompletionsView:
        """Return names of `steps`, `submissions` or `workers` that begin so."""
        return await self._one(routes.COMPLETIONS, params={"of": ",".join(of), "beginning": beginning})

    async def demand(self, most: int | None = None) -> list[DemandView]:
        """Return what people wait for, the most wanted first."""
        return await self._pages(DEMAND, most=most)

    async def sources(self, troubles: Sequence[str] = ()) -> list[SourceView]:
        """Return the sources that the farm could not do without, all or those with some troubles."""
        return await self._pages(SOURCES, query={"trouble": ",".join(troubles)} if troubles else {})

    async def log(self, key: str, *, attempt: int | None = None, follow: bool = False) -> AsyncIterator[bytes]:
        """Yield the log of a step's latest or another attempt as raw bytes; with `follow` until it has ended."""
        query = {"follow": "1"} if follow else {}
        if attempt is not None:
            query["attempt"] = str(attempt)
        async with self.stream(routes.LOG, {"key": key}, params=query) as response:
            async for chunk in self.chunks(response):
                yield chunk

    async def watch(
        self, submission: str, on_lost: Callable[[str], None] = lambda _why: None
    ) -> AsyncIterator[WatchEvent]:
        """Yield a submission's events up to and with `Ended`.

        After a break it goes on behind what has come, or begins again with a new snapshot. Where the coordinator has no
        stream free, the client polls snapshots instead: too many watchers fail no build.
        `on_lost` receives the reason, once for each time that the connection breaks.

        Raises:
            UnreachableError: nothing but failures for `RECONNECT_GIVE_UP_S`, or the very first connection failed.
        """
        budget: RetryBudget | None = None
        seen = False
        reader = EventReader()
        while True:
            reader = EventReader(reader.last_id)
            try:
                async for event in self._events(submission, reader, on_lost):
                    seen, budget = True, None
                    yield event
                    if isinstance(event, Ended):
                        return
                why = "the stream ended early"
            except UnreachableError as error:
                if not seen:
                    raise
                why = str(error)
            if budget is None:
                budget = self.budget()
                on_lost(why)
            if not await budget.pause():
                raise UnreachableError(self.url, f"for {transport.RECONNECT_GIVE_UP_S:.0f} s")

    async def _events(
        self, submission: str, reader: EventReader, on_lost: Callable[[str], None]
    ) -> AsyncIterator[WatchEvent]:
        """Yield the events of a stream, and where none is free what it would begin with, again and again."""
        try:
            async for event in self._watch_once(submission, reader):
                yield event
        except RefusedError as refusal:
            if refusal.reason != UnavailableError.code:
                raise (UnreachableError(self.url, str(refusal)) if refusal.is_passing else refusal) from None
            reader.last_id = ""
            on_lost(str(refusal))
        else:
            return
        while True:
            for event in await self._look(submission):
                yield event
            await asyncio.sleep(transport.RECONNECT_LONGEST_S)

    async def _look(self, submission: str) -> list[WatchEvent]:
        """Ask for a snapshot, and the end where there is one. Raises `UnreachableError` while not even that is had."""
        try:
            # The state first: once it has ended, the steps that are requested after it are the last ones.
            view = await self.submission(submission)
            snapshot = Snapshot(submission=view, steps=tuple(await self.steps(submission, _SHOWN)))
        except RefusedError as refusal:
            if refusal.reason != UnavailableError.code:
                raise
            raise UnreachableError(self.url, str(refusal)) from None
        return [snapshot] if view.state is SubmissionState.RUNNING else [snapshot, Ended(submission=view)]

    async def _watch_once(self, submission: str, reader: EventReader) -> AsyncIterator[WatchEvent]:
        headers = {"Last-Event-ID": reader.last_id} if reader.last_id else {}
        async with self.stream(routes.EVENTS, {"id": submission}, headers=headers, silence_s=SILENCE_S) as response:
            async for chunk in self.chunks(response):
                for data in reader.feed(chunk):
                    yield decode_event(data, self.url)

    async def _one(
        self,
        route: Route[_Answer],
        parts: Mapping[str, str] | None = None,
        data: bytes | None = None,
        *,
        params: Mapping[str, str] | None = None,
        answer_s: float | None = ANSWER_S,
    ) -> _Answer:
        """Return the answer of a route that answers with one model."""
        answer = await self.ask(route, parts or {}, data=data, params=params, answer_s=answer_s)
        return decode(route, answer.body, self.url)

    async def _pages(
        self,
        route: Route[_Answer],
        parts: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        *,
        most: int | None = None,
    ) -> list[_Answer]:
        """Follow the pages of a list to its end, or until there are `most`."""
        found: list[_Answer] = []
        params = {**(query or {}), "limit": str(min(most or PAGE_ROWS, PAGE_ROWS))}
        while True:
            answer = await self.ask(route, parts or {}, params=params)
            found += decode_list(route, answer.body, self.url)
            following = _next_cursor(answer)
            if not following or (most is not None and len(found) >= most):
                return found[:most]
            params["after"] = following


def _json(body: object) -> bytes:
    """Return a body of `coordinator.client.bodies`, or a model of `coordinator.api.requests`, as JSON."""
    return orjson.dumps(body, default=_dumped)


def _dumped(model: Request) -> dict[str, object]:
    return model.model_dump(mode="json")


def _next_cursor(answer: Answer) -> str:
    """Return the cursor of the next page, "" on the last one."""
    found = _NEXT.search(answer.headers.get("link", ""))
    return parse_qs(urlsplit(found[1]).query).get("after", [""])[0] if found else ""
