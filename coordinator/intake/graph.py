"""Graph of one submission: its derivations as steps, cut where the cache holds them.

Everything here walks whole graphs, so callers run it in a thread: a mass rebuild has some hundred thousand members.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import is_

from coordinator.errors import MissingMemberError
from coordinator.intake import planning
from coordinator.intake.fixed_outputs import Lacking
from coordinator.journal.codec import RootNote
from coordinator.stores.derivation_records import Kind, Node
from coordinator.stores.derivations import StepInfo, step_info
from scheduler.events import SubmissionReceived
from scheduler.locality import LEAST_BYTES
from scheduler.model import StepKey, StepSpec, SubmissionId

#: Derivation name, system, features and step -> milliseconds that it is expected to take on a builder of speed 1, the
#: bytes of memory at most, and the bytes of its outputs; 0: not known.
Works = Callable[[str, str, Sequence[str], str], tuple[int, int, int]]


def no_works(_name: str, _system: str, _features: Sequence[str], _step: str) -> tuple[int, int, int]:
    """Nothing is known of any derivation."""
    return 0, 0, 0


@dataclass(frozen=True, slots=True)
class Planned:
    """A submission as steps. `infos` has one entry for each of `steps` and each of `held`."""

    roots: tuple[RootNote, ...]
    steps: tuple[StepSpec, ...]
    #: Steps that the cache holds and at which the graph ends; not in `steps`.
    held: tuple[StepKey, ...]
    infos: tuple[StepInfo, ...]
    #: Derivations of the submission that stand behind `steps` and `held`.
    derivations: int = 0
    #: Base names of these derivations, and the step of each.
    planned: Mapping[str, StepKey] = field(default_factory=dict)
    #: What keeps what the plan stands on until housekeeping knows the submission (`PathLeases`).
    leases: tuple[str, ...] = ()
    #: Fixed outputs among `steps`.
    lacking: tuple[Lacking, ...] = ()
    #: As in `SubmissionReceived`.
    held_bytes: tuple[tuple[StepKey, int], ...] = ()

    def expecting(self, works: Works) -> tuple[StepSpec, ...]:
        """Return the steps with what each is expected to take; the memory that a root's limits name is its own."""
        hints = {root.step: root.limits.memory_bytes for root in self.roots if root.limits is not None}
        expected: list[StepSpec] = []
        for spec, info in zip(self.steps, self.infos, strict=False):
            work_ms, memory_bytes, output_bytes = works(
                info.name, info.system, spec.recipes[0].requirements.features, spec.key
            )
            memory_bytes = max(memory_bytes, hints.get(spec.key, 0))
            same = (spec.work_ms, spec.memory_bytes, spec.output_bytes) == (work_ms, memory_bytes, output_bytes)
            expected.append(
                spec if same else replace(spec, work_ms=work_ms, memory_bytes=memory_bytes, output_bytes=output_bytes)
            )
        return self.steps if all(map(is_, expected, self.steps)) else tuple(expected)

    def held_sizes(self, works: Works) -> tuple[tuple[StepKey, int], ...]:
        """Return the bytes that results in the cache should have, of those that are large."""
        infos = self.infos[len(self.steps) :]
        sizes = [(info.key, works(info.name, info.system, (), info.key)[2]) for info in infos]
        return tuple([(key, size) for key, size in sizes if size >= LEAST_BYTES])

    def objects(self) -> list[object]:
        """Return all of which a large plan has very many, to be freed in slices."""
        return [*self.roots, *self.steps, *self.infos]

    def event(self, submission: SubmissionId) -> SubmissionReceived:
        """Return the core's event for this plan."""
        return SubmissionReceived(
            submission=submission,
            roots=tuple(dict.fromkeys(root.step for root in self.roots)),
            steps=self.steps,
            held=self.held,
            held_bytes=self.held_bytes,
            limits=tuple({root.step: root.limits for root in self.roots if root.limits is not None}.items()),
        )


@dataclass(frozen=True, slots=True)
class Graph:
    """A submission's derivations and their recipes."""

    nodes: Mapping[str, Node]
    #: The submission's own derivations, inputs first.
    own: tuple[str, ...]
    recipes: planning.Recipes
    #: Steps that an earlier plan of the same submission has, and at which this one ends.
    known: frozenset[StepKey] = frozenset()

    @classmethod
    def build(
        cls,
        roots: Sequence[str],
        nodes: Mapping[str, Node],
        members: Mapping[StepKey, Sequence[str]],
        max_recipes: int,
        known: Collection[str] = frozenset(),
    ) -> Graph:
        """Return the graph of `roots` among `nodes`; `members` are the recipes that each step has so far.

        It ends at nodes that are `known`, whose steps have been planned before.
        """
        known_steps = frozenset(node.step for name, node in nodes.items() if name in known)
        nodes = planning.with_made_sources(nodes)
        own = planning.closure(roots, nodes)
        walked = set(own)
        others = [drv for places in members.values() for drv in places if drv in nodes and drv not in walked]
        # Most often there is nothing further to walk.
        order = planning.closure([*roots, *others], nodes) if others else own
        order = [name for name in order if nodes[name].step not in known_steps]
        recipes = planning.assign_recipes(order, nodes, members, max_recipes)
        return cls(nodes, tuple(own), recipes, known_steps)

    def paths(self) -> list[str]:
        """Return all output paths of the graph, and the sources of the submission's own derivations."""
        paths = {path: None for node in self.nodes.values() for _, path in node.outputs}
        paths.update(dict.fromkeys(self.sources()))
        return list(paths)

    def sources(self) -> set[str]:
        """Return the sources of the submission's own derivations."""
        return {source for name in self.own for source in self.nodes[name].sources}

    def lacking(self, absent: set[str]) -> list[str]:
        """Return the sources that the cache lacks of the submission's own derivations that it does not hold."""
        nodes = (self.nodes[name] for name in self.own)
        unheld = (node for node in nodes if not _is_held(node, absent))
        return list(dict.fromkeys(source for node in unheld for source in node.sources if source in absent))

    def lacking_fixed(self, absent: Collection[str]) -> list[Node]:
        """Return a node for each fixed output that the cache lacks."""
        fixed = (node for node in self.nodes.values() if node.kind is Kind.FIXED and node.outputs[0][1] in absent)
        return list({node.step: node for node in fixed}.values())

    def plan(self, roots: tuple[RootNote, ...], absent: set[str], store_dir: str, *, sources_may_lack: bool) -> Planned:
        """Cut the graph where the cache holds it; `absent` are the paths that the cache lacks."""
        held = {node.step for node in self.nodes.values() if _is_held(node, absent)}
        held |= self.known
        stand_in = {self.nodes[name].step: name for name in self.own}
        specs, ends = planning.steps_to_do(
            (root.step for root in roots), self.recipes.by_step, self.nodes, stand_in, held
        )
        ends = [step for step in ends if step not in self.known]
        to_do = {spec.key for spec in specs}
        reached = to_do.union(ends)
        planned: dict[str, StepKey] = {}
        for name in self.own:
            node = self.nodes[name]
            if node.step in reached:
                planned[name] = node.step
            if node.step in to_do and not sources_may_lack:
                for source in node.sources:
                    if source in absent:
                        raise MissingMemberError(f"the source {source} of {name} is not in the cache; send it first")
        infos = tuple(self._info(step, stand_in, store_dir) for step in (*(spec.key for spec in specs), *ends))
        return Planned(roots, tuple(specs), tuple(ends), infos, len(planned), planned)

    def _info(self, step: StepKey, stand_in: Mapping[StepKey, str], store_dir: str) -> StepInfo:
        first = self.recipes.by_step[step][0]
        return step_info(self.nodes[first if first in self.nodes else stand_in[step]], store_dir)


def _is_held(node: Node, absent: Collection[str]) -> bool:
    for _, path in node.outputs:  # noqa: SIM110  a generator for each of very many nodes takes four times as long
        if path in absent:
            return False
    return True


def cut(node: Node) -> Node:
    """Return a node at which a graph ends."""
    return replace(node, needs=(), sources=())


def add_nodes(nodes: dict[str, Node], names: Sequence[str], found: Mapping[str, Node]) -> list[str]:
    """Take in what was found; return what it needs and is not loaded. Raises `MissingMemberError`."""
    for name in names:
        if name not in found:
            raise MissingMemberError(f"the derivation {name} is not known here; send its closure first")
    nodes.update(found)
    return list(dict.fromkeys(need for node in found.values() for need in node.needs if need not in nodes))


def new_steps(fresh: Sequence[Node], members: Mapping[StepKey, Sequence[str]]) -> list[StepKey]:
    """Return the steps of fresh nodes whose recipes are not loaded."""
    return list(dict.fromkeys(node.step for node in fresh if node.step not in members))


def add_recipes(
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
