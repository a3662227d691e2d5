"""Differences of derivations: what is an own change, what follows from an input, and which input was the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from infra.nix import aterm, base32
from infra.nix.causes import Bounds, Causes, Compared, Uncompared, search
from infra.nix.derivation import Derivation, DerivationOutput
from infra.nix.difference import (
    MAX_CHANGES,
    NAME_BYTES,
    SHOWN_BYTES,
    ChangedInput,
    Difference,
    Field,
    compare,
    printable,
)
from infra.nix.store_path import drv_name_of, hash_part_of, package_of

from .test_derivations import PIECES, derivations


def path_of(name: str, *content: object) -> str:
    return f"/nix/store/{base32.encode(sha256(repr(content).encode()).digest()[:20])}-{name}"


def derivation(
    name: str, inputs: Mapping[str, Derivation] | None = None, sources: Sequence[str] = (), **variables: str
) -> tuple[str, Derivation]:
    """A derivation as Nix makes them: its content is in its paths; `{PACKAGE}` in a variable is an input's output."""
    inputs = inputs or {}
    outputs = {package_of(drv_name_of(path)): drv.outputs[0].path for path, drv in inputs.items()}
    env = {"name": name, **{key: value.format_map(outputs) for key, value in variables.items()}}
    made = Derivation(
        outputs=(),
        input_drvs=tuple((path, ("out",)) for path in sorted(inputs)),
        input_srcs=tuple(sorted(sources)),
        system="x86_64-linux",
        builder=env.pop("builder", "/bin/sh"),
        args=(b"-e", b"build.sh"),
        env=(),
    )
    out = path_of(name, made, sorted(env.items()))
    env["out"] = out
    made = replace(
        made,
        outputs=(DerivationOutput("out", out),),
        env=tuple(sorted((key.encode(), value.encode()) for key, value in env.items())),
    )
    return path_of(f"{name}.drv", made), made


@given(derivations(), st.randoms())
def test_derivations_that_nix_writes_alike_have_no_difference(drv: Derivation, chance: object) -> None:
    assert not compare(drv, drv)
    shuffled = replace(drv, env=drv.env[::-1], input_srcs=drv.input_srcs[::-1] * 2, input_drvs=drv.input_drvs[::-1])
    assert not compare(drv, shuffled)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Derivation, Derivation]:
    """Two derivations, of which the second has some fields of a third."""
    before, other = draw(derivations()), draw(derivations())
    fields = draw(st.sets(st.sampled_from(["outputs", "input_drvs", "input_srcs", "system", "builder", "args", "env"])))
    return before, replace(before, **{name: getattr(other, name) for name in fields})


def reverse(difference: Difference) -> Difference:
    """The difference in the other direction."""
    return replace(
        difference,
        changes=tuple([replace(each, before=each.after, after=each.before) for each in difference.changes]),
        path_changes=tuple([replace(each, before=each.after, after=each.before) for each in difference.path_changes]),
        inputs=tuple([ChangedInput(each.after, each.before) for each in difference.inputs]),
    )


@given(pairs())
def test_a_difference_is_empty_only_of_equals_and_reversed_in_the_other_direction(
    pair: tuple[Derivation, Derivation],
) -> None:
    before, after = pair
    found = compare(before, after)
    assert bool(found) == (aterm.render(before) != aterm.render(after))
    assert compare(after, before) == reverse(found)
    assert len(found.changes) == min(found.change_count, MAX_CHANGES)
    for change in (*found.changes, *found.path_changes):
        for text in (change.name, change.before or "", change.after or ""):
            assert text.isprintable()
            # A byte may become an escape of four characters; an ellipsis stands at each end.
            assert len(text) <= 4 * max(SHOWN_BYTES, NAME_BYTES) + 2


LONG = st.lists(st.one_of(PIECES, st.sampled_from([b"x" * 500, b"\xe2\x80\xae", "ü".encode() * 90])), max_size=8).map(
    b"".join
)


@given(LONG, LONG)
def test_the_excerpts_of_two_texts_differ_and_are_of_the_texts(old: bytes, new: bytes) -> None:
    before = replace(aterm.parse(MINIMAL), env=((b"k", old),))
    found = compare(before, replace(before, env=((b"k", new),)))
    assert len(found.changes) == (old != new)
    for change in found.changes:
        assert change.before != change.after
        assert change.before is not None
        assert change.before.strip("\u2026") in printable(old)


MINIMAL = b'Derive([("out","/nix/store/o","","")],[],[],"x","/bin/sh",[],[])'


def test_each_field_has_a_change_of_its_own_and_what_repeats_it_is_not_said_twice() -> None:
    before = Derivation(
        outputs=(DerivationOutput("out", "", "r:sha256", "aa"),),
        input_drvs=((path_of("dep-1.drv", 1), ("out",)), (path_of("only-old.drv"), ("out",))),
        input_srcs=(path_of("builder.sh", 1),),
        system="x86_64-linux",
        builder="/bin/sh",
        args=(b"-e", b"one", b"last"),
        env=(
            (b"builder", b"/bin/sh"), (b"gone", b"1"), (b"outputHash", b"aa"), (b"requiredSystemFeatures", b"kvm"),
            (b"system", b"x86_64-linux"), (b"\x1b]0;t\x07", b"a\nb"),
        ),
    )  # fmt: skip
    after = Derivation(
        outputs=(DerivationOutput("out", "", "r:sha256", "bb"),),
        input_drvs=((path_of("dep-1.drv", 1), ("dev", "out")),),
        input_srcs=(path_of("builder.sh", 2),),
        system="aarch64-linux",
        builder="/bin/bash",
        args=(b"-e", b"two", b"more", b"last"),
        env=(
            (b"builder", b"/bin/bash"), (b"new", b""), (b"outputHash", b"bb"), (b"requiredSystemFeatures", b"kvm big"),
            (b"system", b"aarch64-linux"), (b"\x1b]0;t\x07", b"a\rb"),
        ),
    )  # fmt: skip
    assert [(each.field.value, each.name, each.before, each.after) for each in compare(before, after).changes] == [
        ("system", "", "x86_64-linux", "aarch64-linux"),
        ("builder", "", "/bin/sh", "/bin/bash"),
        ("argument", "1", "one", "two"),
        ("argument", "2", None, "more"),
        ("environment", "\\x1b]0;t\\x07", "a\\nb", "a\\rb"),
        ("environment", "gone", "1", None),
        ("environment", "new", None, ""),
        ("feature", "big", None, "big"),
        ("output", "out", "r:sha256:aa", "r:sha256:bb"),
        ("source", "builder.sh", path_of("builder.sh", 1), path_of("builder.sh", 2)),
        ("input", "dep", "out", "dev out"),
        ("input", "only-old", path_of("only-old.drv"), None),
    ]


def test_structured_attributes_are_compared_one_by_one() -> None:
    def structured(**values: object) -> Derivation:
        return replace(aterm.parse(MINIMAL), env=((b"__json", json.dumps(values).encode()),))

    found = compare(
        structured(flags=["a"], requiredSystemFeatures=["kvm"], same=1), structured(flags=["a", "b"], same=1)
    )
    assert [(each.field, each.name, each.before, each.after) for each in found.changes] == [
        (Field.ENVIRONMENT, "flags", '["a"]', '["a", "b"]'),
        (Field.FEATURE, "kvm", "kvm", None),
    ]
    written_otherwise = replace(aterm.parse(MINIMAL), env=((b"__json", b'{"a" : 1}'),))
    assert compare(structured(a=1), written_otherwise).change_count == 1
    for broken in (b"[" * 100_000, b"{", b'{"\\ud800": 1}', b"7", b"\xff"):
        other = replace(written_otherwise, env=((b"__json", broken),))
        assert compare(written_otherwise, other).change_count


def test_a_path_in_a_text_follows_from_the_input_or_the_source_that_it_names() -> None:
    """A library has a new version: its dependents name it, and have no own change."""
    old_path, old = derivation("lib-1.0", version="1.0")
    new_path, new = derivation("lib-1.0.1", version="1.0.1")
    flags = "-L{lib}/lib -R{lib} -O2"
    before = derivation("app-2", {old_path: old}, flags=flags, builder="{lib}/bin/sh")[1]
    after = derivation("app-2", {new_path: new}, flags=flags, builder="{lib}/bin/sh")[1]
    found = compare(before, after)
    assert found.changes == ()
    assert found.inputs == (ChangedInput(old_path, new_path),)
    assert [each.name for each in found.path_changes] == ["", "flags", "out", "out"]
    other = derivation("app-2", {new_path: new}, flags="-L{lib}/lib -R{lib} -O3")[1]
    [builder, change] = compare(before, other).changes
    assert (builder.field, change.name) == (Field.BUILDER, "flags")
    assert (change.before or "").endswith("-O2")
    # Another package in its place is a change.
    stranger_path, stranger = derivation("other-1.0")
    exchanged = derivation("app-2", {stranger_path: stranger}, flags="-L{other}/lib -R{other} -O2")[1]
    assert {change.name for change in compare(before, exchanged).changes} >= {"flags", "lib-1.0", "other-1.0"}


def test_inputs_are_matched_by_package_those_of_the_same_name_first() -> None:
    def inputs(*names: str) -> Derivation:
        return replace(
            aterm.parse(MINIMAL),
            input_drvs=tuple((path_of(f"{name}.drv", name, at), ("out",)) for at, name in enumerate(names)),
        )

    found = compare(inputs("gcc-12", "gcc-13", "zlib-1"), inputs("zlib-2", "gcc-13", "gcc-14"))
    names = [(drv_name_of(each.before), drv_name_of(each.after)) for each in found.inputs]
    assert names == [("gcc-12", "gcc-14"), ("zlib-1", "zlib-2")]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[int]], set[int]]:
    """For each node of a graph the earlier nodes that it needs, and the nodes that are changed."""
    size = draw(st.integers(1, 12))
    needs = [sorted(draw(st.sets(st.integers(0, at - 1), max_size=4))) if at else [] for at in range(size)]
    return needs, draw(st.sets(st.integers(0, size - 1)))


def built(needs: list[list[int]], changed: set[int]) -> dict[str, Derivation]:
    """Derivations of a graph by path, the last one last."""
    made: list[tuple[str, Derivation]] = []
    for at, lower in enumerate(needs):
        inputs = dict(made[each] for each in lower)
        variables = {f"dep{each}": f"{{n{each}x}}" for each in lower}
        made.append(derivation(f"n{at}x", inputs, own="new" if at in changed else "old", **variables))
    return dict(made)


def searched(before: dict[str, Derivation], after: dict[str, Derivation], bounds: Bounds) -> Causes:
    known = {**before, **after}
    work = search(list(before)[-1], list(after)[-1], bounds)
    answers: Sequence[Compared] | None = None
    while True:
        try:
            wanted = next(work) if answers is None else work.send(answers)
        except StopIteration as end:
            causes: Causes = end.value
            return causes
        answers = [
            compare(known[pair.before], known[pair.after])
            if pair.before in known and pair.after in known
            else Uncompared.UNKNOWN
            for pair in wanted
        ]


@given(graphs())
def test_the_causes_are_exactly_the_changed_inputs_that_are_reached_each_once(
    graph: tuple[list[list[int]], set[int]],
) -> None:
    needs, changed = graph
    reached, stack = set(), [len(needs) - 1]
    while stack:
        at = stack.pop()
        reached.add(at)
        stack += needs[at]
    found = searched(built(needs, set()), built(needs, changed), Bounds(pairs=100))
    names = [(each.way[-1] if each.way else f"n{len(needs) - 1}x") for each in found.causes]
    assert sorted(names) == sorted(f"n{at}x" for at in reached & changed)
    assert found.unfollowed == 0
    for cause in found.causes:
        assert [(each.name, each.before, each.after) for each in cause.changes] == [("own", "old", "new")]
        # Each name of the way is needed by the one before.
        way = [len(needs) - 1, *(int(name[1:-1]) for name in cause.way)]
        assert all(low in needs[high] for high, low in pairwise(way))
    few = searched(built(needs, set()), built(needs, changed), Bounds(pairs=2, depth=1))
    assert few.compared <= 2
    assert few.count + few.unfollowed >= min(1, found.count)


def test_one_change_in_several_derivations_of_a_package_is_one_cause_and_what_is_not_there_is_said() -> None:
    def graph(patch: str) -> dict[str, Derivation]:
        first = derivation("bash-5", stage="1", patches=patch)
        second = derivation("bash-5", stage="2", patches=patch)
        gone = derivation("gone-1", patches=patch)
        return dict([first, second, gone, derivation("top-1", dict([first, second, gone]))])

    before, after = graph("a.patch"), graph("a.patch b.patch")
    del after[next(path for path in after if "gone" in path)]
    bash, gone = searched(before, after, Bounds(pairs=100)).causes
    assert (bash.way, bash.alike, gone.way, gone.uncompared) == (("bash-5",), 1, ("gone-1",), Uncompared.UNKNOWN)


def test_a_large_text_is_compared_path_by_path() -> None:
    line = f"{path_of('dep-1', 1)}/lib ".encode()
    other = line.replace(hash_part_of(path_of("dep-1", 1)).encode(), hash_part_of(path_of("dep-1", 2)).encode())
    count = 4 * 1024 * 1024 // len(line)
    before = replace(aterm.parse(MINIMAL), env=((b"k", line * count),))
    found = compare(before, replace(before, env=((b"k", other * count),)))
    assert (found.change_count, found.path_change_count) == (0, 1)
    found = compare(before, replace(before, env=((b"k", other * (count - 1) + b"x"),)))
    assert found.change_count == 1
