"""Sending of a closure to the coordinator: what it lacks of the derivations and sources that a submission stands on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from coordinator.api.models import StepView
from coordinator.api.requests import ClientStage, IntakeQuery
from coordinator.api.streams import SourceHeader, encode_derivations, encode_sources, in_thread
from coordinator.cli.rendering import size
from coordinator.cli.screen import Screen
from coordinator.client.api_client import ApiClient
from coordinator.client.closure import (
    Closure,
    LocalStore,
    describe_sources,
    find_maker,
    read_closure,
    refuse_lost_references,
)
from coordinator.errors import CoordinatorError
from infra.nix.store_path import base_name_of

#: Seconds after the client has sent what the farm lost before it looks again: each look sends the whole graph.
SEND_AGAIN_EVERY_S = 10.0


class ClientStages:
    """Times of what the client does before it submits, one after the other, for the submission's trace."""

    def __init__(self) -> None:
        self.taken: tuple[ClientStage, ...] = ()
        self._since = time.time()

    def ended(self, name: Literal["evaluate", "closure", "upload"]) -> None:
        """Note a stage that began when the one before it ended."""
        begin, self._since = self._since, time.time()
        self.taken = (*self.taken, ClientStage(name=name, begin=begin, end=max(begin, self._since)))


@dataclass(slots=True)
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
) -> tuple[str, ...]:
    """Send what the coordinator lacks of the closure of `drvs` (full paths), in one stream each.

    What was `sent_before` is neither read nor asked about again; what is sent now is added to it.
    Returns the derivations of built paths among the sources that the farm must build first.
    """
    makers: dict[str, None] = {}
    before = sent_before or SentParts()
    while True:
        closure: Closure = await asyncio.to_thread(read_closure, store, [*drvs, *makers], before.derivations)
        outputs = closure.outputs | before.outputs
        found = await describe_sources(store, [path for path in closure.sources if path not in before.sources])
        headers = found.headers
        built = tuple(map(base_name_of, found.built))
        query = IntakeQuery(
            store_dir=store.store_dir,
            derivations=tuple(base_name_of(drv) for drv in closure.derivations),
            sources=(*(header.path for header in headers), *built),
            built=built,
        )
        missing = await client.missing(query)
        absent = set(missing.sources)
        sent = [header for header in headers if header.path in absent]
        refuse_lost_references(store, sent, absent.intersection(built), missing.trouble)
        unbuilt = [path for path in found.built if base_name_of(path) in absent and path not in outputs]
        if not unbuilt:
            break
        # Each goes into the next closure, so that this ends.
        for path in unbuilt:
            makers[await asyncio.to_thread(find_maker, store, path, found.built[path], missing.trouble)] = None
    stages.ended("closure")
    if missing.derivations or missing.sources:
        lacking = set(missing.sources)
        sources = [header for header in headers if header.path in lacking]
        sized = f" ({size(sum(header.nar_size for header in sources))})" if sources else ""
        told = screen.status if screen is not None else _say_nothing
        told(
            f"sending {len(missing.derivations)} of {len(query.derivations)} derivations and "
            f"{len(sources)} of {len(headers)} sources{sized}"
        )
        if missing.derivations:
            names = set(missing.derivations)
            members = (
                (base_name_of(drv), store.read(drv)) for drv in closure.derivations if base_name_of(drv) in names
            )
            await client.send_derivations(in_thread(encode_derivations(members)))
        if sources:
            nars = ((header, _nar(store, header)) for header in sources)
            await client.send_sources(in_thread(encode_sources(nars)))
    before.derivations.update(closure.derivations)
    before.outputs.update(closure.outputs)
    before.sources.update(closure.sources)
    stages.ended("upload")
    return tuple(makers)


@asynccontextmanager
async def sending_again(
    send: Callable[[], Awaitable[object]], screen: Screen
) -> AsyncIterator[Callable[[StepView], None]]:
    """Send what the farm lacks again whenever a step waits for a lost input, as long as the block runs.

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
                await send()
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
