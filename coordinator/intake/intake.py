"""Intake: takes a client's closure, verifies and stores it, and plans it as steps.

The three requests of a client, in order: `missing`, the two streams,
`submit`. Every error is an `IntakeError` whose sentence names the member that is at fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from dataclasses import asdict, replace

from coordinator.api.models import IntakeMissing
from coordinator.api.requests import IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.sent_streams import FramingError
from coordinator.api.streams import StreamLimits, read_derivations, read_sources
from coordinator.errors import IntakeError, MissingMemberError, UnavailableError
from coordinator.intake.errors import StoreDirError
from coordinator.intake.fixed_outputs import FixedOutputs
from coordinator.intake.graph import Graph, Planned, Works, add_nodes, add_recipes, cut, new_steps, no_works
from coordinator.intake.limits import IntakeLimits, require_within
from coordinator.intake.plan_memory import PlanMemory, RememberedPlan
from coordinator.intake.sources import SourceIntake
from coordinator.intake.taking import DerivationTaker, ended, settled
from coordinator.intake.verifier_pool import VerifierPool
from coordinator.journal.codec import RootNote
from coordinator.stores.derivation_records import Node
from coordinator.stores.derivations import DerivationStore
from coordinator.stores.path_leases import PathLeases
from infra.byte_budget import ByteBudget
from infra.cache.cache import Cache
from infra.cache.pulls.closure_pulls import ClosurePulls, Pulled
from infra.cache.pulls.content_offers import ContentOffers
from infra.heap import give_back_free_memory
from infra.nix.errors import FormatError
from infra.nix.store_path import StoreDir, parse_base_name
from infra.objects.store import ObjectStore
from infra.slices import free_in_slices
from infra.sqlite_driver import shrink_connections
from scheduler.model import StepKey
from scheduler.resource_limits import ResourceLimits

#: Bytes in memory for each byte of a derivation that is verified: itself inflated, parsed, rendered, compressed.
VERIFYING_COST = 6
#: Seconds without a byte after which a stream is given up: its place is wanted by others.
STREAM_IDLE_S = 60.0
#: Derivations to be sent from which on processes are started that verify them: to start these takes 0.08 s of a
#: processor each, as long as to verify 1,000.
PROCESSES_FROM = 2_000
#: Seconds without a stream or a plan after which large plans and their derivations are forgotten.
REST_AFTER_S = 20.0


class Intake:
    """Verifies and stores what clients send, and plans submissions."""

    def __init__(
        self,
        derivations: DerivationStore,
        cache: Cache,
        objects: ObjectStore,
        store_dir: StoreDir,
        limits: IntakeLimits | None = None,
        *,
        verifiers: VerifierPool | None = None,
        rest_after_s: float = REST_AFTER_S,
    ) -> None:
        """`verifiers` verify long streams side by side; without, all are verified in this process."""
        self.verifiers = verifiers
        self._rest_after_s = rest_after_s
        #: Fetches built paths from upstreams, which `coordinator.caches.opening` adds.
        self.pulls = ClosurePulls(cache)
        #: Gives fixed outputs what is here under another name.
        self.fixed = FixedOutputs(derivations, ContentOffers(cache))
        #: Expects works of steps; `coordinator.learning` says how.
        self.works: Works = no_works
        self._derivations = derivations
        self._cache = cache
        self._memory = PlanMemory()
        #: What keeps the paths that answers to clients call present.
        self.leases = PathLeases(cache)
        self._sources = SourceIntake(cache, objects, store_dir)
        self._store_dir = store_dir
        self._limits = limits or IntakeLimits()
        #: Memory for verifying large derivations, of all clients together.
        self.budget = ByteBudget(self._limits.verifying_bytes)
        self._streams = 0
        #: Recipe indexes are given out by one plan at a time.
        self._planning = asyncio.Lock()
        #: Streams and plans under way, and whether any ended since the last look.
        self._under_way = 0
        self._was_used = asyncio.Event()

    async def run(self) -> None:
        """Forget what is kept for speed alone once nothing was taken or planned for a while, until cancelled."""
        while True:
            await self._was_used.wait()
            while self._under_way or self._was_used.is_set():
                self._was_used.clear()
                await asyncio.sleep(self._rest_after_s)
            for kept in (self._memory, self._derivations):
                await free_in_slices(kept.rest())
            await shrink_connections()
            await asyncio.to_thread(give_back_free_memory)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._was_used.set()

    async def missing(self, query: IntakeQuery) -> IntakeMissing:
        """Return the part of the query that must be sent. Built paths come from upstreams where these have them.

        Raises:
            IntakeError: The store directories differ, there are too many names, or one is none.
        """
        if query.store_dir != self._store_dir.path:
            raise StoreDirError(
                f"the client's store is {query.store_dir}, the farm's is {self._store_dir.path}; they must be the same"
            )
        require_within(len(query.derivations), self._limits.max_derivations, "derivations")
        require_within(len(query.sources), self._limits.max_sources, "sources")
        await asyncio.to_thread(self._check_names, (*query.derivations, *query.sources, *query.built))
        derivations = await self._derivations.unknown(query.derivations)
        if self.verifiers is not None and len(derivations) >= PROCESSES_FROM:
            # A long stream is to come, while its sender goes on reading.
            self.verifiers.start()
        absent = await self.leases.ask([self._store_dir.full(name) for name in query.sources])
        pulled = await self.pulls.pull(absent.intersection(self._store_dir.full(name) for name in query.built))
        absent -= pulled.paths
        return IntakeMissing(
            derivations=tuple(derivations),
            sources=tuple(name for name in query.sources if self._store_dir.full(name) in absent),
            trouble=pulled.trouble,
        )

    async def add_derivations(self, body: AsyncIterable[bytes], client: str = "") -> int:
        """Verify and store a derivations stream (coordinator.api.streams); returns how many it held.

        Of a stream with a fault at most whole pieces of `taking.PIECE_BYTES` before it are stored: each derivation is
        true by itself and stands behind its inputs. Between clients the room for large ones is shared fairly.

        Raises:
            IntakeError: The stream is damaged, or the sentence names the member that is at fault.
            UnavailableError: Too many streams are being taken.
        """
        limits = StreamLimits(
            self._limits.max_derivations, self._limits.max_derivation_bytes, self._limits.max_derivations_bytes
        )
        with self._stream():
            batches = read_derivations(_lively(body), limits, lambda size: self._room_for(client, size))
            taker = DerivationTaker(self._derivations, self._store_dir, self.verifiers, self.fixed.learn)
            async with aclosing(batches), taker:
                async for batch in batches:
                    await taker.take(batch)
                    batch.clear()
                await taker.finish()
        return taker.count

    def _room_for(self, client: str, size: int) -> AbstractAsyncContextManager[None]:
        return self.budget.acquire(client, size * VERIFYING_COST)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """Count a stream for as long as the block runs. Raises `UnavailableError`."""
        if self._streams >= self._limits.max_streams:
            raise UnavailableError(
                f"{self._limits.max_streams} streams are being taken, the limit; send it again in a moment."
            )
        self._streams += 1
        try:
            with self._in_use():
                yield
        finally:
            self._streams -= 1

    async def add_sources(self, body: AsyncIterable[bytes]) -> int:
        """Verify, upload and publish a sources stream, in order; returns how many it held.

        What stands before a fault in the stream has been published: each source is true by itself.

        Raises:
            IntakeError: The stream is damaged, or the sentence names the source that is at fault.
            UnavailableError: Too many streams are being taken.
        """
        limits = StreamLimits(self._limits.max_sources, self._limits.max_source_bytes, self._limits.max_sources_bytes)
        with self._stream():
            return await self._sources.add(read_sources(_lively(body), limits))

    async def submit(
        self, request: SubmitRequest, *, sources_may_lack: bool = False, known: Collection[str] = frozenset()
    ) -> Planned:
        """Plan a submission of derivations that are stored: steps, and which of them the cache holds.

        The caller gives the plan's `leases` back or attaches them to the submission that it becomes. With
        `sources_may_lack` steps are planned whose sources the cache has lost: they wait for these. Derivations that are
        `known` (base names) have been planned for the same submission: the graph ends there.

        Raises:
            IntakeError: A member is not known here, an output does not exist, or the graph is too large.
        """
        with self._in_use():
            return await self._submit(request, sources_may_lack=sources_may_lack, known=known)

    async def _submit(self, request: SubmitRequest, *, sources_may_lack: bool, known: Collection[str]) -> Planned:
        if not request.roots:
            return Planned((), (), (), ())
        # What walks the whole graph does so in a thread: a mass rebuild has some hundred thousand members.
        wishes = await asyncio.to_thread(lambda: [(root, self._drv_name(root.drv)) for root in request.roots])
        names = await asyncio.to_thread(lambda: list(dict.fromkeys(name for _, name in wishes)))
        makers = await asyncio.to_thread(lambda: dict.fromkeys(map(self._drv_name, request.makers)))
        is_ordinary = not known and not sources_may_lack
        key = (tuple(names), tuple(makers), self.fixed.offers is not None)
        remembered = self._memory.find(key) if is_ordinary else None
        recipe_changes = self._memory.recipe_changes
        leases: list[str] = []
        writing: list[asyncio.Task[int]] = []
        pulled = Pulled()
        try:
            while True:
                changes = self._cache.changes
                if remembered is not None:
                    graph, absent = remembered.graph, await self._absent(remembered, leases)
                    if absent == remembered.absent:
                        remembered.changes = changes
                        return await self._planned(remembered, wishes, leases)
                    remembered = None
                else:
                    graph, lease, absent = await self._leased_graph([*names, *makers], names, known, writing)
                    leases.append(lease)
                    absent -= await self.fixed.offer(await asyncio.to_thread(graph.lacking_fixed, absent))
                pulled = await self.pulls.pull(await asyncio.to_thread(graph.lacking, absent))
                absent -= pulled.paths
                # Built paths among the sources are made again by what made them for an earlier submission.
                lacking = await asyncio.to_thread(graph.lacking, absent)
                again = await self._makers(lacking)
                if makers.keys() >= again.keys():
                    break
                makers |= again
            planned = await self._plan(graph, absent, wishes, sources_may_lack=sources_may_lack)
            recipe_changes = await _last_of(writing, recipe_changes)
            # Without its roots, which are those of each submission.
            plan = RememberedPlan(graph, absent, leases[-1], changes, replace(planned, roots=()))
            if is_ordinary and not lacking and key[1] == tuple(makers):
                await free_in_slices(self._memory.keep(key, plan, recipe_changes))
            return await self._planned(plan, wishes, leases)
        except MissingMemberError as error:
            self.leases.give_back(leases)
            if pulled.trouble:
                raise MissingMemberError(f"{error}, or try again later: {pulled.trouble}") from None
            raise
        except BaseException:
            self.leases.give_back(leases)
            raise
        finally:
            await settled(writing)

    async def _plan(
        self, graph: Graph, absent: set[str], wishes: Sequence[tuple[RootRequest, str]], *, sources_may_lack: bool
    ) -> Planned:
        roots = await asyncio.to_thread(self._roots, wishes, graph.nodes)
        store_dir = self._store_dir.path
        planned = await asyncio.to_thread(graph.plan, roots, absent, store_dir, sources_may_lack=sources_may_lack)
        to_do = await asyncio.to_thread(lambda: {spec.key for spec in planned.steps})
        unfetched = await asyncio.to_thread(graph.lacking_fixed, absent)
        return replace(planned, lacking=self.fixed.lacking([node for node in unfetched if node.step in to_do]))

    async def _absent(self, plan: RememberedPlan, leases: list[str]) -> set[str]:
        """Return the paths of a plan that the cache lacks now, and add the lease of all of them to `leases`."""
        if self._cache.changes == plan.changes:
            lost = await self.leases.take_again(plan.lease, await asyncio.to_thread(plan.present))
            if lost is not None:
                leases.append(plan.lease)
                return plan.absent | lost
        lease, absent = await self.leases.take(await asyncio.to_thread(plan.graph.paths))
        leases.append(lease)
        return absent - await self.fixed.offer(await asyncio.to_thread(plan.graph.lacking_fixed, absent))

    async def _planned(
        self, plan: RememberedPlan, wishes: Sequence[tuple[RootRequest, str]], leases: list[str]
    ) -> Planned:
        roots = await asyncio.to_thread(self._roots, wishes, plan.graph.nodes)
        leases += await self.leases.answered(await asyncio.to_thread(plan.graph.sources))
        # Anew for each submission: a plan is remembered, and what is expected changes with every build.
        planned = replace(plan.planned, roots=roots, leases=tuple(leases))
        steps = await asyncio.to_thread(planned.expecting, self.works)
        sizes = await asyncio.to_thread(planned.held_sizes, self.works)
        return replace(planned, steps=steps, held_bytes=sizes)

    async def look(self, drvs: Sequence[str]) -> Graph:
        """Return the graph of derivations that are stored, full paths, as `submit` would plan it; stores nothing.

        Raises:
            IntakeError: As `submit`.
        """
        names = await asyncio.to_thread(lambda: list(dict.fromkeys(map(self._drv_name, drvs))))
        nodes, members = await self._load(names, ())
        graph = await asyncio.to_thread(Graph.build, names, nodes, members, self._limits.max_recipes)
        require_within(len(graph.own), self._limits.max_derivations, "derivations")
        return graph

    async def _leased_graph(
        self, drvs: Sequence[str], names: Sequence[str], known: Collection[str], writing: list[asyncio.Task[int]]
    ) -> tuple[Graph, str, set[str]]:
        """Return the graph of `names` among all that `drvs` need, the lease of its paths, and which are absent.

        Its recipes are written by a task that is added to `writing`: a plan is made meanwhile, and is none before all
        of them are done. Each returns the changes of recipes that the graph has seen.
        """
        await self._planning.acquire()
        try:
            nodes, members = await self._load(drvs, known)
            graph = await asyncio.to_thread(Graph.build, names, nodes, members, self._limits.max_recipes, known)
            require_within(len(graph.own), self._limits.max_derivations, "derivations")
            paths = await asyncio.to_thread(graph.paths)
        except BaseException:
            self._planning.release()
            raise
        writing.append(asyncio.create_task(self._write_recipes(graph.recipes.new)))
        return graph, *await self.leases.take(paths)

    async def _write_recipes(self, new: Sequence[tuple[StepKey, int, str]]) -> int:
        """Write recipes, and then let others plan; returns the changes of recipes up to now."""
        try:
            try:
                await self._derivations.add_members(new)
            finally:
                # Also where they may have been written although this failed.
                gone = self._memory.forget_steps({step for step, _, _ in new})
            recipe_changes = self._memory.recipe_changes
            await free_in_slices(gone)
            return recipe_changes
        finally:
            self._planning.release()

    async def _makers(self, sources: Sequence[str]) -> dict[str, None]:
        """Return the derivations that made one of these paths for an earlier submission, by whichever output."""
        return dict.fromkeys((await self._derivations.makers(sources)).values()) if sources else {}

    def _roots(self, wishes: Sequence[tuple[RootRequest, str]], nodes: Mapping[str, Node]) -> tuple[RootNote, ...]:
        return tuple(self._root(root, nodes[name]) for root, name in wishes)

    def _root(self, root: RootRequest, node: Node) -> RootNote:
        outputs = dict(node.outputs)
        for name in root.outputs:
            if name not in outputs:
                raise IntakeError(f"{root.drv} has no output {name}; it has {', '.join(outputs)}")
        wanted = node.outputs
        if root.outputs:
            wanted = tuple([(name, path) for name, path in wanted if name in root.outputs])
        limits = ResourceLimits(**asdict(root.limits)) if root.limits else None
        drv = self._store_dir.full(node.drv)
        # A submission may have 100,000 roots that are named by their derivations: what is equal is one.
        return RootNote(drv if root.attr == drv else root.attr, drv, node.step, wanted, limits)

    async def _load(
        self, roots: Sequence[str], known: Collection[str]
    ) -> tuple[dict[str, Node], dict[StepKey, list[str]]]:
        """Load the closure of `roots` and of all members of its fixed-output steps, down to what is `known`."""
        nodes: dict[str, Node] = {}
        members: dict[StepKey, list[str]] = {}
        frontier = list(roots)
        # The closure of every member of a step is bounded too: fallbacks bring graphs of earlier submissions in.
        limit = self._limits.max_derivations * 2
        while frontier:
            fresh: list[Node] = []
            while True:
                if not known:
                    frontier = await asyncio.to_thread(self._derivations.walk, frontier, nodes, fresh)
                if not frontier:
                    break
                found = await self._derivations.nodes(frontier)
                found = {name: cut(node) if name in known else node for name, node in found.items()}
                frontier = await asyncio.to_thread(add_nodes, nodes, frontier, found)
                fresh += [node for name, node in found.items() if name not in known]
                require_within(len(nodes), limit, "derivations")
            steps = await asyncio.to_thread(new_steps, fresh, members)
            places = await self._derivations.members(steps)
            frontier = await asyncio.to_thread(add_recipes, nodes, members, fresh, steps, places)
        return nodes, members

    def _drv_name(self, drv: str) -> str:
        prefix = f"{self._store_dir.path}/"
        if not drv.startswith(prefix):
            raise StoreDirError(f"{drv} does not lie in the farm's store, {self._store_dir.path}")
        name = drv.removeprefix(prefix)
        self._check_name(name)
        return name

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            self._check_name(name)

    @staticmethod
    def _check_name(name: str) -> None:
        try:
            parse_base_name(name)
        except FormatError as error:
            raise IntakeError(f"{name[:300]!r} is no store path name: {error.message}") from None


async def _last_of(tasks: Iterable[asyncio.Task[int]], result: int) -> int:
    """Return what the last of some tasks returns once all have ended, `result` where there are none."""
    for task in tasks:
        result = await ended(task)
    return result


async def _lively(body: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Pass a stream on, and give it up where nothing comes any more. Raises `FramingError`."""
    chunks = aiter(body)
    while True:
        try:
            async with asyncio.timeout(STREAM_IDLE_S):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise FramingError(f"nothing of the stream came for {STREAM_IDLE_S:.0f} s; send it again") from None
        yield chunk
