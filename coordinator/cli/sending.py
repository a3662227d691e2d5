"""Sending of a closure to the coordinator: what it lacks of the derivations and sources that a submission stands on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from coordinator.api.models import IntakeMissing, StepView
from coordinator.cli.printing import size
from coordinator.cli.screen import Screen
from coordinator.client.api_client import ApiClient
from coordinator.client.bodies import MembersBody, StageBody
from coordinator.client.closure import (
    Closure,
    LocalStore,
    describe_sources,
    find_maker,
    read_closure,
    refuse_lost_references,
)
from coordinator.client.closure_walk import ClosureWalk
from coordinator.client.errors import RefusedError
from coordinator.errors import CoordinatorError, MissingMemberError
from infra.nix.store_path import base_name_of
from infra.records import record

if TYPE_CHECKING:
    from coordinator.api.sent_streams import SourceHeader

#: Seconds after the client has sent what the farm lost before it looks again: each look sends the whole graph.
SEND_AGAIN_EVERY_S = 10.0

_Taken = TypeVar("_Taken")


class ClientStages:
    """Times of what the client does before it submits, one after the other, for the submission's trace."""

    def __init__(self) -> None:
        self.taken: tuple[StageBody, ...] = ()
        self._since = time.time()

    def ended(self, name: Literal["evaluate", "closure", "upload"]) -> None:
        """Note a stage that began when the one before it ended."""
        begin, self._since = self._since, time.time()
        self.taken = (*self.taken, StageBody(name=name, begin=begin, end=max(begin, self._since)))


@record(slots=True)
class SentParts:
    """Parts of a closure that have been sent, or were there: full paths."""

    derivations: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    #: What the derivations make.
    outputs: set[str] = field(default_factory=set)


async def send_closure(
    client: ApiClient,
    store: LocalStore,
    drvs: Sequence[str],
    screen: Screen | None,
    stages: ClientStages,
    *,
    sent_before: SentParts | None = None,
    whole: bool = False,
) -> tuple[str, ...]:
    """Send what the coordinator lacks of the closure of `drvs` (full paths), in one stream each.

    What it knows is not read, and its sources are not asked about: `taken_after_sending` sends those that it has lost,
    or the caller does that asks for the `whole`. What was `sent_before` is neither read nor asked about again; what is
    sent now is added to it. Returns the derivations of built paths among the sources that the farm must build first.
    """
    before = (None if whole else sent_before) or SentParts()
    looked = await _look(client, store, drvs, before, whole=whole)
    stages.ended("closure")
    if looked.derivations or looked.sources:
        sized = f" ({size(sum(header.nar_size for header in looked.sources))})" if looked.sources else ""
        told = screen.status if screen is not None else _say_nothing
        told(
            f"sending {len(looked.derivations)} of {looked.asked} derivations and "
            f"{len(looked.sources)} of {looked.asked_sources} sources{sized}"
        )
        await _send(client, store, looked)
    if sent_before is not None:
        sent_before.derivations.update(looked.known)
        sent_before.derivations.update(looked.closure.derivations)
        sent_before.outputs.update(looked.closure.outputs)
        sent_before.sources.update(looked.closure.sources)
    stages.ended("upload")
    return looked.makers


async def _send(client: ApiClient, store: LocalStore, looked: _Looked) -> None:
    from coordinator.api import sent_streams as streams  # noqa: PLC0415 - loads zstd, and the farm may lack nothing

    if looked.derivations:
        members = ((base_name_of(drv), store.read(drv)) for drv in looked.derivations)
        await client.send_derivations(streams.in_thread(streams.encode_derivations(members)))
    if looked.sources:
        nars = ((header, _nar(store, header)) for header in looked.sources)
        await client.send_sources(streams.in_thread(streams.encode_sources(nars)))


async def taken_after_sending(
    send: Callable[[bool], Awaitable[tuple[str, ...]]], take: Callable[[tuple[str, ...]], Awaitable[_Taken]]
) -> _Taken:
    """Send with `send`, then let `take` submit with the makers that it returns.

    Where the coordinator lacks something of what it knew (a source that was collected, a database that was restored),
    all is looked at and sent once more, `send(True)`.
    """
    try:
        return await take(await send(False))
    except RefusedError as error:
        if error.reason != MissingMemberError.code:
            raise
    return await take(await send(True))


@record(frozen=True, slots=True)
class _Looked:
    """The part of a closure that the coordinator lacks, inputs and references first; how much it was asked about."""

    closure: Closure
    #: Full paths of .drv files.
    derivations: Sequence[str]
    sources: Sequence[SourceHeader]
    asked: int
    asked_sources: int
    #: Full paths of members that it knows, at which the closure ends.
    known: Collection[str]
    makers: tuple[str, ...]


async def _look(
    client: ApiClient, store: LocalStore, drvs: Sequence[str], before: SentParts, *, whole: bool
) -> _Looked:
    makers: dict[str, None] = {}
    while True:
        closure, asked, known = await _lacking(client, store, [*drvs, *makers], before, whole=whole)
        outputs = closure.outputs | before.outputs
        found = await describe_sources(store, [path for path in closure.sources if path not in before.sources])
        built = tuple(map(base_name_of, found.built))
        query = MembersBody(
            store_dir=store.store_dir,
            derivations=tuple(map(base_name_of, closure.derivations)) if whole else (),
            sources=(*(header.path for header in found.headers), *built),
            built=built,
        )
        if query.derivations or query.sources:
            missing = await client.missing(query)
        else:
            missing = IntakeMissing(derivations=(), sources=())
        absent = set(missing.sources)
        sources = [header for header in found.headers if header.path in absent]
        refuse_lost_references(store, sources, absent.intersection(built), missing.trouble)
        unbuilt = [path for path in found.built if base_name_of(path) in absent and path not in outputs]
        if not unbuilt:
            names = set(missing.derivations)
            lacking = [drv for drv in closure.derivations if not whole or base_name_of(drv) in names]
            counted = len(query.derivations) if whole else asked
            return _Looked(closure, lacking, sources, counted, len(found.headers), known, tuple(makers))
        if not whole:
            # What the farm knows may make it.
            whole, before = True, SentParts()
            continue
        # Each goes into the next closure, so that this ends.
        for path in unbuilt:
            makers[await asyncio.to_thread(find_maker, store, path, found.built[path], missing.trouble)] = None


async def _lacking(
    client: ApiClient, store: LocalStore, roots: Sequence[str], before: SentParts, *, whole: bool
) -> tuple[Closure, int, Collection[str]]:
    """Return what the coordinator lacks below `roots`, or the whole; how many it was asked about; those it knows."""
    if whole:
        return await asyncio.to_thread(read_closure, store, roots, before.derivations), 0, ()
    walk = ClosureWalk(store, roots, before.derivations)
    while walk.questions:
        names = {base_name_of(drv): drv for drv in walk.questions}
        missing = await client.missing(MembersBody(store_dir=store.store_dir, derivations=tuple(names), sources=()))
        await asyncio.to_thread(walk.learn, [names[name] for name in missing.derivations])
    return await asyncio.to_thread(walk.closure), walk.asked, walk.known


@asynccontextmanager
async def sending_again(
    send: Callable[[bool], Awaitable[object]], screen: Screen
) -> AsyncIterator[Callable[[StepView], None]]:
    """Send what the farm lacks of the whole again whenever a step waits for a lost input, as long as the block runs.

    Gives what takes each step that changes. Where what is lost cannot be sent, its step waits as before.
    """
    lost = asyncio.Event()

    def on_step(step: StepView) -> None:
        if step.lost_input:
            lost.set()

    async def run() -> None:
        while True:
            await lost.wait()
            lost.clear()
            try:
                await send(True)
            except (CoordinatorError, OSError) as error:
                screen.status(f"the farm lost an input, which could not be sent again: {error}")
            await asyncio.sleep(SEND_AGAIN_EVERY_S)

    sender = asyncio.create_task(run())
    try:
        yield on_step
    finally:
        sender.cancel()
        with suppress(asyncio.CancelledError):
            await sender


def _say_nothing(_text: str) -> None:
    pass


def _nar(store: LocalStore, header: SourceHeader) -> Callable[[], Any]:
    return lambda: store.dump(f"{store.store_dir}/{header.path}")
