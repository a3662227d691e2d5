"""The order that graphs are walked in: inputs first, once each, without recursion."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.dependency_order import CycleError, inputs_first


@given(st.lists(st.lists(st.integers(0, 30), max_size=5), min_size=1, max_size=30), st.lists(st.integers(0, 29)))
def test_all_that_the_roots_need_comes_once_and_behind_its_inputs(needs: list[list[int]], roots: list[int]) -> None:
    # Each needs earlier ones alone, so there is no cycle.
    graph = [[need for need in below if need < node] for node, below in enumerate(needs)]
    roots = [root for root in roots if root < len(graph)]
    asked: list[int] = []

    def inputs(node: int) -> list[int]:
        asked.append(node)
        return graph[node]

    order = inputs_first(roots, inputs)
    place = {node: at for at, node in enumerate(order)}
    assert len(place) == len(order) == len(asked)
    assert set(roots) <= place.keys() == set(asked)
    assert all(place[need] < place[node] for node in order for need in graph[node])


def test_what_one_root_needs_stands_together() -> None:
    graph = {"app": ["lib"], "tool": ["base"]}
    assert inputs_first(["app", "tool"], lambda node: graph.get(node, [])) == ["lib", "app", "base", "tool"]


@pytest.mark.parametrize(
    ("graph", "first", "last"),
    [({"a": "b", "b": "c", "c": "b"}, "b", "c"), ({"a": "a"}, "a", "a")],
    ids=["of two", "of one"],
)
def test_a_cycle_is_named_by_the_members_that_close_it(graph: dict[str, str], first: str, last: str) -> None:
    with pytest.raises(CycleError, match=f"{last} needs {first}") as caught:
        inputs_first("a", lambda node: graph[node])
    assert (caught.value.first, caught.value.last) == (first, last)


def test_a_chain_may_be_longer_than_pythons_stack() -> None:
    assert inputs_first([100_000], lambda node: [node - 1] if node else [])[:2] == [0, 1]
