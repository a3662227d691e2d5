"""Causes of mass rebuilds: one changed root is one cause, and what each changed derivation follows from is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from infra.nix.causes import BATCH, Bounds, Compared, Uncompared
from infra.nix.derivation import Derivation
from infra.nix.difference import ChangedInput, Difference, compare
from infra.nix.rebuilds import MAX_FOLDED, MAX_NAMES, FoldedRebuild, few_dependents, fold

from .test_difference import derivation

WHOLE = Bounds(pairs=100_000, depth=1_000)
Store = dict[str, Derivation]


def folded(store: Mapping[str, Derivation], changed: Sequence[ChangedInput], bounds: Bounds = WHOLE) -> FoldedRebuild:
    """Fold with real comparisons; every pair is asked for once."""
    asked: set[ChangedInput] = set()

    def answer(pair: ChangedInput) -> Compared:
        if pair.before not in store or pair.after not in store:
            return Uncompared.UNKNOWN
        return compare(store[pair.before], store[pair.after])

    work = fold(changed, bounds)
    try:
        wanted = next(work)
        while True:
            assert len(wanted) <= BATCH
            assert not asked.intersection(wanted)
            asked.update(wanted)
            wanted = work.send([answer(pair) for pair in wanted])
    except StopIteration as end:
        found: FoldedRebuild = end.value
        return found


def build(needs: Sequence[Sequence[int]], texts: Sequence[str], store: Store) -> list[str]:
    """Put derivations into a store, each with those before it that it needs; return their paths."""
    paths: list[str] = []
    for number, (its, text) in enumerate(zip(needs, texts, strict=True)):
        inputs = {paths[need]: store[paths[need]] for need in its}
        names = " ".join(f"{{p{need}}}" for need in its)
        path, made = derivation(f"p{number}", inputs, text=text, needs=names)
        store[path] = made
        paths.append(path)
    return paths


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[list[int]], list[str], list[str]]:
    """A graph, and the texts of its members before and after."""
    count = draw(st.integers(1, 14))
    needs = [sorted(draw(st.sets(st.integers(0, number - 1), max_size=4))) if number else [] for number in range(count)]
    before = [f"text {number}" for number in range(count)]
    after = [text + draw(st.sampled_from(["", "", "", " changed"])) for text in before]
    return needs, before, after


@given(changes())
@settings(max_examples=150, deadline=None)
def test_each_changed_derivation_follows_from_exactly_those_below_it_whose_own_text_changed(
    graph: tuple[list[list[int]], list[str], list[str]],
) -> None:
    needs, old, new = graph
    store: Store = {}
    before, after = build(needs, old, store), build(needs, new, store)
    changed = [ChangedInput(*pair) for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    found = folded(store, changed)
    own = {number for number in range(len(needs)) if old[number] != new[number]}
    below: list[set[int]] = []
    for number, its in enumerate(needs):
        below.append({number} & own | {cause for need in its for cause in below[need]})
    assert found.cause_count == len(own) == len(found.causes)
    assert found.unfollowed == 0
    assert [cause.reach for cause in found.causes] == sorted((cause.reach for cause in found.causes), reverse=True)
    for number, (left, right) in enumerate(zip(before, after, strict=True)):
        if left != right:
            names = {name for place in found.reasons[ChangedInput(left, right)] for name in found.causes[place].names}
            assert names == {f"p{cause}" for cause in below[number]}
        else:
            assert not below[number]
    for cause in found.causes:
        assert cause.reach == sum(
            (left != right and any(f"p{each}" in cause.names for each in below[number]))
            for number, (left, right) in enumerate(zip(before, after, strict=True))
        )


def test_a_changed_root_of_forty_thousand_packages_is_one_cause() -> None:
    count = 40_000
    root = ChangedInput("/nix/store/a-stdenv.drv", "/nix/store/b-stdenv.drv")
    tops = [ChangedInput(f"/nix/store/a-{n}.drv", f"/nix/store/b-{n}.drv") for n in range(count)]
    store: Store = {}
    paths = build([[]], ["first"], store), build([[]], ["second"], store)
    own = compare(store[paths[0][0]], store[paths[1][0]])
    work = fold(tops, WHOLE)
    wanted, asked = next(work), 0
    found = FoldedRebuild()
    while True:
        asked += len(wanted)
        answers: list[Compared] = [
            own if pair == root else Difference(inputs=(root,), input_count=1) for pair in wanted
        ]
        try:
            wanted = work.send(answers)
        except StopIteration as end:
            found = end.value
            break
    assert asked == found.compared == count + 1
    assert [(cause.pair, cause.reach) for cause in found.causes] == [(root, count)]
    assert set(found.reasons.values()) == {(0,)}


def test_the_same_change_of_many_packages_is_one_cause_that_names_some_of_them() -> None:
    store: Store = {}
    changed = []
    for number in range(20):
        (left, old), (right, new) = (derivation(f"p{number:02}", builder=shell) for shell in ("/bin/sh", "/bin/bash"))
        store |= {left: old, right: new}
        changed.append(ChangedInput(left, right))
    found = folded(store, changed)
    (cause,) = found.causes
    assert (cause.count, cause.reach, len(cause.names)) == (20, 20, MAX_NAMES)
    assert (cause.changes[0].before, cause.changes[0].after) == ("/bin/sh", "/bin/bash")


def test_what_cannot_be_compared_is_a_cause_and_what_is_beyond_the_bounds_is_counted() -> None:
    store: Store = {}
    texts = [f"text {number}" for number in range(30)]
    before = build([[], *([number] for number in range(29))], texts, store)
    after = build([[], *([number] for number in range(29))], ["changed", *texts[1:]], store)
    top = ChangedInput(before[-1], after[-1])
    assert folded(store, [top]).causes[0].names == ("p0",)
    cut = folded(store, [top], Bounds(pairs=10))
    assert (cut.compared, cut.unfollowed, cut.causes, cut.reasons) == (10, 1, (), {top: ()})
    assert folded(store, [top], Bounds(pairs=100, depth=5)).unfollowed == 1
    del store[before[3]]
    lost = folded(store, [top])
    assert (lost.causes[0].uncompared, lost.causes[0].names, lost.reasons[top]) == (Uncompared.UNKNOWN, ("p3",), (0,))


def test_more_causes_than_are_told_apart_are_counted_and_share_the_last_place() -> None:
    count = MAX_FOLDED + 500
    store: Store = {}
    changed = []
    for number in range(count):
        pair = [derivation(f"p{number}", text=f"{side} {number}") for side in ("before", "after")]
        store.update(pair)
        changed.append(ChangedInput(pair[0][0], pair[1][0]))
    found = folded(store, changed)
    assert (len(found.causes), found.cause_count) == (MAX_FOLDED, count)
    assert sum(cause.reach for cause in found.causes) == count
    assert all(len(places) == 1 for places in found.reasons.values())


@given(changes(), st.integers(0, 6), st.data())
@settings(max_examples=150, deadline=None)
def test_few_dependents_are_exact(
    graph: tuple[list[list[int]], list[str], list[str]], at_most: int, data: st.DataObject
) -> None:
    needs = {f"p{number}": [f"p{need}" for need in its] for number, its in enumerate(graph[0])}
    wanted = data.draw(st.sets(st.sampled_from(list(needs))))
    below: dict[str, set[str]] = {}
    for name, its in needs.items():
        below[name] = {each for need in its for each in ({need} | below[need])}
    exact = {name: frozenset(other for other in wanted if name in below[other]) for name in wanted}
    assert few_dependents(needs, wanted, at_most) == {name: its for name, its in exact.items() if len(its) <= at_most}
