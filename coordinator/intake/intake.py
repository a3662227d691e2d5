"""From a client's closure to steps: what is missing, is it true, what must be built.

The only module that turns derivations into steps. The three requests of a client, in order: `missing`, the two streams,
`submit`. Every error is an `IntakeError` whose sentence names the member that is at fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

from coordinator.api.models import IntakeMissing, IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.streams import LARGE_BYTES, FramingError, StreamLimits, read_derivations, read_sources
from coordinator.errors import IntakeError, UnavailableError
from coordinator.intake import planning
from coordinator.intake.sources import SourceIntake
from coordinator.stores.derivations import DerivationStore, Kind, Known, NewDerivation, Node, StepInfo, step_info
from coordinator.stores.path_leases import PathLeases
from infra.byte_budget import ByteBudget
from infra.cache.cache import Cache
from infra.cache.pulls.closure_pulls import ClosurePulls, Pulled
from infra.nix import aterm
from infra.nix.derivation import DerivationKind
from infra.nix.errors import FormatError, NixError, UnknownInputError
from infra.nix.store_path import StoreDir, parse_base_name
from infra.nix.verify import KnownDerivation, VerifiedDerivation, Verifier
from infra.objects.store import ObjectStore
from scheduler.events import SubmissionReceived
from scheduler.model import ANY_SYSTEM, StepKey, StepSpec, SubmissionId
from scheduler.resource_limits import ResourceLimits

#: Derivations that one turn of a worker thread verifies; some 20 ms.
VERIFY_AT_ONCE = 256
#: Inflated bytes and derivations of one stream that are verified before they are stored in one transaction.
STORED_AT_ONCE_BYTES = LARGE_BYTES
STORED_AT_ONCE = 5_000
#: Bytes in memory for each byte of a derivation that is verified: itself inflated, parsed, rendered, compressed.
VERIFYING_COST = 6
#: Seconds without a byte after which a stream is given up: its place is wanted by others.
STREAM_IDLE_S = 60.0
_KINDS = {DerivationKind.INPUT_ADDRESSED: Kind.INPUT_ADDRESSED, DerivationKind.FIXED: Kind.FIXED}
_BACK = {kind: nix for nix, kind in _KINDS.items()}


class DerivationRefusedError(IntakeError):
    """A derivation is not what it claims, or of a kind that the farm does not build."""

    code: ClassVar[str] = "bad_derivation"


class MissingMemberError(IntakeError):
    """A member of the graph was not sent, or not before what needs it."""

    code: ClassVar[str] = "missing_member"


class TooLargeError(IntakeError):
    """The graph is larger than a limit; the sentence has both numbers."""

    code: ClassVar[str] = "too_large"
    status: ClassVar[int] = 413


class StoreDirError(IntakeError):
    """The client's store directory is not the farm's."""

    code: ClassVar[str] = "store_dir"


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds of one request; an error names the limit and the count."""

    #: Of one submission's closure, and of one stream.
    max_derivations: int = 200_000
    max_sources: int = 200_000
    max_derivation_bytes: int = 64 * 1024 * 1024
    #: Of an inflated derivations stream.
    max_derivations_bytes: int = 2 * 1024 * 1024 * 1024
    #: NAR size of one source, and of all in one stream.
    max_source_bytes: int = 64 * 1024 * 1024 * 1024
    max_sources_bytes: int = 256 * 1024 * 1024 * 1024
    #: Streams of derivations and of sources that are taken at one time; each has some MiB in memory.
    max_streams: int = 32
    #: Memory for verifying derivations of more than `framing.LARGE_BYTES`, of all clients together.
    verifying_bytes: int = 512 * 1024 * 1024
    #: Members that are kept as recipes of one fixed-output step.
    max_recipes: int = 8


@dataclass(frozen=True, slots=True)
class PlannedRoot:
    """A wish and the step that it stands on; `outputs` are the wanted (name, full path), sorted by name."""

    attr: str
    drv: str
    step: StepKey
    outputs: tuple[tuple[str, str], ...]
    limits: ResourceLimits | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A submission as steps. `infos` has one entry for each of `steps` and each of `held`."""

    roots: tuple[PlannedRoot, ...]
    steps: tuple[StepSpec, ...]
    #: Steps that the cache holds and at which the graph ends; not in `steps`.
    held: tuple[StepKey, ...]
    infos: tuple[StepInfo, ...]
    #: Derivations of the submission that stand behind `steps` and `held`.
    derivations: int = 0
    #: What keeps what the plan stands on until housekeeping knows the submission (`PathLeases`).
    leases: tuple[str, ...] = ()

    def event(self, submission: SubmissionId) -> SubmissionReceived:
        """Return the core's event for this plan."""
        return SubmissionReceived(
            submission=submission,
            roots=tuple(dict.fromkeys(root.step for root in self.roots)),
            steps=self.steps,
            held=self.held,
            limits=tuple({root.step: root.limits for root in self.roots if root.limits is not None}.items()),
        )


class Intake:
    """Verifies and stores what clients send, and plans submissions."""

    def __init__(
        self,
        derivations: DerivationStore,
        cache: Cache,
        objects: ObjectStore,
        store_dir: StoreDir,
        limits: IntakeLimits | None = None,
    ) -> None:
        #: Has built paths from upstreams; whoever opens these adds them.
        self.pulls = ClosurePulls(cache)
        self._derivations = derivations
        #: What keeps the paths that clients were told are there.
        self.leases = PathLeases(cache)
        self._sources = SourceIntake(cache, objects, store_dir)
        self._store_dir = store_dir
        self._limits = limits or IntakeLimits()
        #: Memory for verifying large derivations, of all clients together.
        self.budget = ByteBudget(self._limits.verifying_bytes)
        self._streams = 0
        #: Recipe indexes are given out by one plan at a time.
        self._planning = asyncio.Lock()

    async def missing(self, query: IntakeQuery) -> IntakeMissing:
        """Return the part of the query that must be sent. Built paths come from upstreams where these have them.

        Raises:
            IntakeError: The store directories differ, there are too many names, or one is none.
        """
        if query.store_dir != self._store_dir.path:
            raise StoreDirError(
                f"the client's store is {query.store_dir}, the farm's is {self._store_dir.path}; they must be the same"
            )
        _within(len(query.derivations), self._limits.max_derivations, "derivations")
        _within(len(query.sources), self._limits.max_sources, "sources")
        await asyncio.to_thread(self._check_names, (*query.derivations, *query.sources, *query.built))
        derivations = await self._derivations.unknown(query.derivations)
        absent = await self.leases.ask([f"{self._store_dir.path}/{name}" for name in query.sources])
        pulled = await self.pulls.pull(absent.intersection(f"{self._store_dir.path}/{name}" for name in query.built))
        absent -= pulled.paths
        return IntakeMissing(
            derivations=tuple(derivations),
            sources=tuple(name for name in query.sources if f"{self._store_dir.path}/{name}" in absent),
            trouble=pulled.trouble,
        )

    async def add_derivations(self, body: AsyncIterable[bytes], client: str = "") -> int:
        """Verify and store a derivations stream (coordinator.api.streams); returns how many it held.

        Of a stream with a fault at most whole pieces of `STORED_AT_ONCE_BYTES` before it are stored: each derivation is
        true by itself and stands behind its inputs. Between clients the room for large ones is shared fairly.

        Raises:
            IntakeError: The stream is damaged, or the sentence names the member that is at fault.
            UnavailableError: Too many streams are being taken.
        """
        limits = StreamLimits(
            self._limits.max_derivations, self._limits.max_derivation_bytes, self._limits.max_derivations_bytes
        )
        verifier = Verifier(self._store_dir)
        verified: list[NewDerivation] = []
        count = size = 0
        with self._stream():
            batches = read_derivations(_lively(body), limits, lambda size: self._room_for(client, size))
            async with aclosing(batches):
                async for batch in batches:
                    for start in range(0, len(batch), VERIFY_AT_ONCE):
                        some = batch[start : start + VERIFY_AT_ONCE]
                        verified += await self._verify(verifier, some)
                        size += sum(len(data) for _, data in some)
                        if size >= STORED_AT_ONCE_BYTES or len(verified) >= STORED_AT_ONCE:
                            count += len(verified)
                            await self._derivations.add(verified)
                            verified, size = [], 0
                        # Nothing of a large one may stay when its room is given back.
                        del some
                    batch.clear()
            if verified:
                await self._derivations.add(verified)
        return count + len(verified)

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
            yield
        finally:
            self._streams -= 1

    async def _verify(self, verifier: Verifier, batch: Sequence[tuple[str, bytes]]) -> list[NewDerivation]:
        members = [(f"{self._store_dir.path}/{name}", data) for name, data in batch]
        done: list[NewDerivation] = []
        looked_up = False
        while len(done) < len(members):
            rest = members[len(done) :]
            fresh, error = await asyncio.to_thread(_verify_members, verifier, rest)
            done += fresh
            if error is None:
                continue
            if looked_up or not isinstance(error, UnknownInputError):
                raise _refusal(error, dict(members[len(done) :]))
            # The inputs may be known from earlier streams: ask once for all that this batch lacks.
            wanted = await asyncio.to_thread(_unknown_inputs, verifier, members[len(done) :])
            for name, known in (await self._derivations.known(wanted)).items():
                verifier.preload(f"{self._store_dir.path}/{name}", _to_verifier(known))
            looked_up = True
        return done

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

    async def submit(self, request: SubmitRequest, *, sources_may_lack: bool = False) -> Planned:
        """Plan a submission of derivations that are stored: steps, and which of them the cache holds.

        Whoever asks gives the plan's `leases` back or attaches them to the submission that it becomes. With
        `sources_may_lack` steps are planned whose sources the cache has lost: they wait for these.

        Raises:
            IntakeError: A member is not known here, an output does not exist, or the graph is too large.
        """
        # What walks the whole graph does so in a thread: a mass rebuild has some hundred thousand members.
        wishes = await asyncio.to_thread(lambda: [(root, self._drv_name(root.drv)) for root in request.roots])
        names = await asyncio.to_thread(lambda: list(dict.fromkeys(name for _, name in wishes)))
        makers = await asyncio.to_thread(lambda: dict.fromkeys(map(self._drv_name, request.makers)))
        leases: list[str] = []
        pulled = Pulled()
        try:
            while True:
                graph = await self._graph(names, list(makers))
                lease, absent = await self.leases.take(await asyncio.to_thread(graph.paths))
                leases.append(lease)
                pulled = await self.pulls.pull(await asyncio.to_thread(graph.lacking, absent))
                absent -= pulled.paths
                # Built paths among the sources are made again by what made them for an earlier submission.
                known = await self._makers(await asyncio.to_thread(graph.lacking, absent))
                if makers.keys() >= known.keys():
                    break
                makers |= known
            roots = await asyncio.to_thread(self._roots, wishes, graph.nodes)
            store_dir = self._store_dir.path
            planned = await asyncio.to_thread(graph.plan, roots, absent, store_dir, sources_may_lack=sources_may_lack)
            leases += await self.leases.answered(await asyncio.to_thread(graph.sources))
        except MissingMemberError as error:
            self.leases.give_back(leases)
            if pulled.trouble:
                raise MissingMemberError(f"{error}, or try again later: {pulled.trouble}") from None
            raise
        except BaseException:
            self.leases.give_back(leases)
            raise
        return replace(planned, leases=tuple(leases))

    async def _graph(self, names: Sequence[str], makers: Sequence[str]) -> _Graph:
        async with self._planning:
            nodes, members = await self._load([*names, *makers])
            graph = await asyncio.to_thread(_Graph.build, names, nodes, members, self._limits.max_recipes)
            _within(len(graph.own), self._limits.max_derivations, "derivations")
            await self._derivations.add_members(graph.recipes.new)
        return graph

    async def _makers(self, sources: Sequence[str]) -> dict[str, None]:
        """Return the derivations that made one of these paths for an earlier submission, by whichever output."""
        return dict.fromkeys((await self._derivations.makers(sources)).values()) if sources else {}

    def _roots(self, wishes: Sequence[tuple[RootRequest, str]], nodes: Mapping[str, Node]) -> tuple[PlannedRoot, ...]:
        return tuple(self._root(root, nodes[name]) for root, name in wishes)

    def _root(self, root: RootRequest, node: Node) -> PlannedRoot:
        outputs = dict(node.outputs)
        for name in root.outputs:
            if name not in outputs:
                raise IntakeError(f"{root.drv} has no output {name}; it has {', '.join(outputs)}")
        wanted = tuple((name, path) for name, path in node.outputs if not root.outputs or name in root.outputs)
        limits = ResourceLimits(**root.limits.model_dump()) if root.limits else None
        return PlannedRoot(root.attr, f"{self._store_dir.path}/{node.drv}", node.step, wanted, limits)

    async def _load(self, roots: Sequence[str]) -> tuple[dict[str, Node], dict[StepKey, list[str]]]:
        """Load the closure of `roots` and of all members of its fixed-output steps."""
        nodes: dict[str, Node] = {}
        members: dict[StepKey, list[str]] = {}
        frontier = list(roots)
        # The closure of every member of a step is bounded too: fallbacks bring graphs of earlier submissions in.
        limit = self._limits.max_derivations * 2
        while frontier:
            fresh: list[Node] = []
            while frontier:
                found = await self._derivations.nodes(frontier)
                frontier = await asyncio.to_thread(_add_nodes, nodes, frontier, found)
                fresh += found.values()
                _within(len(nodes), limit, "derivations")
            steps = await asyncio.to_thread(_new_steps, fresh, members)
            places = await self._derivations.members(steps)
            frontier = await asyncio.to_thread(_add_places, nodes, members, fresh, steps, places)
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


def _add_nodes(nodes: dict[str, Node], asked: Sequence[str], found: Mapping[str, Node]) -> list[str]:
    """Take in what was found; return what it needs and is not loaded. Raises `MissingMemberError`."""
    for name in asked:
        if name not in found:
            raise MissingMemberError(f"the derivation {name} is not known here; send its closure first")
    nodes.update(found)
    return list(dict.fromkeys(need for node in found.values() for need in node.needs if need not in nodes))


def _new_steps(fresh: Sequence[Node], members: Mapping[StepKey, Sequence[str]]) -> list[StepKey]:
    return list(dict.fromkeys(node.step for node in fresh if node.step not in members))


def _add_places(
    nodes: Mapping[str, Node],
    members: dict[StepKey, list[str]],
    fresh: Sequence[Node],
    steps: Sequence[StepKey],
    places: Mapping[StepKey, list[str]],
) -> list[str]:
    """Take in the recipes of `steps`; return those of the fixed-output ones that are not loaded."""
    members.update((step, places.get(step, [])) for step in steps)
    fixed = (node.step for node in fresh if node.kind is Kind.FIXED)
    return list(dict.fromkeys(drv for step in fixed for drv in members[step] if drv not in nodes))


@dataclass(frozen=True, slots=True)
class _Graph:
    """A submission's derivations and their recipes."""

    nodes: Mapping[str, Node]
    #: The submission's own derivations, inputs first.
    own: tuple[str, ...]
    recipes: planning.Recipes

    @classmethod
    def build(
        cls,
        roots: Sequence[str],
        nodes: Mapping[str, Node],
        members: Mapping[StepKey, Sequence[str]],
        max_recipes: int,
    ) -> _Graph:
        nodes = planning.with_made_sources(nodes)
        own = planning.inputs_first(roots, nodes)
        others = [drv for places in members.values() for drv in places if drv in nodes]
        order = planning.inputs_first([*roots, *others], nodes)
        return cls(nodes, tuple(own), planning.assign_recipes(order, nodes, members, max_recipes))

    def paths(self) -> list[str]:
        """All output paths of the graph, and the sources of the submission's own derivations."""
        paths = {path: None for node in self.nodes.values() for _, path in node.outputs}
        paths.update(dict.fromkeys(self.sources()))
        return list(paths)

    def sources(self) -> set[str]:
        """Return the sources of the submission's own derivations."""
        return {source for name in self.own for source in self.nodes[name].sources}

    def lacking(self, absent: set[str]) -> list[str]:
        """Return the sources that the cache lacks of the submission's own derivations that it does not hold."""
        nodes = (self.nodes[name] for name in self.own)
        unheld = (node for node in nodes if any(path in absent for _, path in node.outputs))
        return list(dict.fromkeys(source for node in unheld for source in node.sources if source in absent))

    def plan(
        self, roots: tuple[PlannedRoot, ...], absent: set[str], store_dir: str, *, sources_may_lack: bool
    ) -> Planned:
        """Cut the graph where the cache holds it; `absent` are the paths that the cache lacks."""
        held = {node.step for node in self.nodes.values() if not any(path in absent for _, path in node.outputs)}
        stand_in = {self.nodes[name].step: name for name in self.own}
        specs, ends = planning.steps_to_do(
            (root.step for root in roots), self.recipes.by_step, self.nodes, stand_in, held
        )
        to_do = {spec.key for spec in specs}
        reached = to_do.union(ends)
        count = 0
        for name in self.own:
            node = self.nodes[name]
            count += node.step in reached
            if node.step in to_do and not sources_may_lack:
                for source in node.sources:
                    if source in absent:
                        raise MissingMemberError(f"the source {source} of {name} is not in the cache; send it first")
        infos = tuple(self._info(step, stand_in, store_dir) for step in (*(spec.key for spec in specs), *ends))
        return Planned(roots, tuple(specs), tuple(ends), infos, count)

    def _info(self, step: StepKey, stand_in: Mapping[StepKey, str], store_dir: str) -> StepInfo:
        first = self.recipes.by_step[step][0]
        return step_info(self.nodes[first if first in self.nodes else stand_in[step]], store_dir)


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


def _verify_members(
    verifier: Verifier, members: Iterable[tuple[str, bytes]]
) -> tuple[list[NewDerivation], Exception | None]:
    """Verify until the first that cannot be; returns it as an error, for what is before it stays verified."""
    done: list[NewDerivation] = []
    for path, data in members:
        try:
            done.append(_accepted(verifier.add(path, data), data))
        except (NixError, DerivationRefusedError) as error:
            return done, error
    return done, None


def _accepted(verified: VerifiedDerivation, data: bytes) -> NewDerivation:
    kind = _KINDS.get(verified.kind)
    if kind is None:
        raise DerivationRefusedError(
            f"{verified.drv_path} is {verified.kind.value}: its output paths are not known before it is built, and "
            "this farm builds only input-addressed and fixed-output derivations"
        )
    drv = verified.derivation
    system = ANY_SYSTEM if drv.builder.startswith("builtin:") else drv.system
    outputs = tuple(sorted(verified.outputs.items()))
    prefix = len(verified.drv_path.rpartition("/")[0]) + 1
    node = Node(
        drv=verified.drv_path[prefix:],
        step=StepKey(min(path for _, path in outputs)[prefix:]),
        kind=kind,
        system=system,
        features=tuple(sorted(set(verified.options.required_system_features))),
        outputs=outputs,
        needs=tuple(path[prefix:] for path, _ in drv.input_drvs),
        sources=drv.input_srcs,
    )
    return NewDerivation(node, bytes.fromhex(verified.hash_modulo), verified.inputs, data)


def _to_verifier(known: Known) -> KnownDerivation:
    return KnownDerivation(_BACK[known.kind], known.modulo.hex(), dict(known.outputs), deferred=False)


def _unknown_inputs(verifier: Verifier, members: Sequence[tuple[str, bytes]]) -> list[str]:
    """Base names of inputs that are neither remembered nor among `members`; malformed members are passed over."""
    here = {path for path, _ in members}
    names: dict[str, None] = {}
    for _, data in members:
        try:
            derivation = aterm.parse(data)
        except FormatError:
            continue
        for path, _ in derivation.input_drvs:
            if path not in here and verifier.known(path) is None:
                names[path.rpartition("/")[2]] = None
    return list(names)


def _refusal(error: Exception, rest: Mapping[str, bytes]) -> IntakeError:
    """Turn what the verifier said into what the client is told; `rest` is the unverified part of the batch."""
    if isinstance(error, IntakeError):
        return error
    if isinstance(error, UnknownInputError):
        why = f"{error}; every derivation must be sent after its inputs"
        return MissingMemberError(f"{why}, and they form a cycle" if _in_cycle(error.member, rest) else why)
    return DerivationRefusedError(f"{error}; the derivation was not written by Nix or was changed since")


def _in_cycle(start: str, rest: Mapping[str, bytes]) -> bool:
    """Whether `start` needs itself by way of members that were sent with it."""
    seen: set[str] = set()
    stack = [start]
    while stack:
        path = stack.pop()
        if path in seen or path not in rest:
            continue
        seen.add(path)
        try:
            needed = [needed for needed, _ in aterm.parse(rest[path]).input_drvs]
        except FormatError:
            continue
        if start in needed:
            return True
        stack += needed
    return False


def _within(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise TooLargeError(f"the graph has {count} {what}; this farm takes at most {limit} in one submission")
