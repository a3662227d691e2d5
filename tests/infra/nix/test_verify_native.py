"""The native part of verification: what it takes, Python takes too and says the same; all else it leaves to Python."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.compiled import build
from infra.compiled.modules import NATIVE, NATIVE_SOURCE
from infra.nix import aterm
from infra.nix.canonical import MAX_BYTES
from infra.nix.derivation import Derivation
from infra.nix.errors import NixError, OutputPathError
from infra.nix.verify_quickly import Native, QuickVerifier
from tests.benchmarks.ingest_core import make_graph
from tests.infra.nix.native_cases import STORE, Both, at_its_path, graph, load, mutated
from tests.support.graphs import Made, Maker

TOP = Path(__file__).resolve().parent.parent.parent.parent
FLAGS = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-fPIC", "-shared"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
#: Mutated derivations that a build with sanitizers reads; more by hand, as its docstring says.
FUZZED = 1_500


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    place = tmp_path_factory.mktemp("native")
    build.compile_modules(TOP, place, (NATIVE,))
    (file,) = place.glob("*/infra/nix/verify_native*")
    return load(file)


@pytest.fixture(scope="module")
def members() -> list[Made]:
    return graph()


def test_common_derivations_are_taken_and_say_what_python_says(native: Native, members: list[Made]) -> None:
    both = Both(native)
    assert all(both.take(path.rpartition("/")[2], data) for path, data in make_graph(200, seed=3))
    assert all(both.take(made.name, made.data) for made in members)


@given(st.randoms(use_true_random=False), st.integers(0, 7), st.booleans())
def test_of_changed_bytes_it_takes_only_what_python_takes(
    native: Native, members: list[Made], chance: Random, number: int, moved: bool
) -> None:
    both = Both(native, members)
    data = mutated(members[number].data, chance)
    both.take(at_its_path(members[number].name, data) if moved else members[number].name, data)


def test_every_end_of_a_text_is_met(native: Native, members: list[Made]) -> None:
    both = Both(native, members)
    data = members[2].data
    assert not any(both.take(members[2].name, data[:end]) for end in range(len(data)))
    assert not both.take(members[2].name, data + b")")


@pytest.mark.parametrize(
    "env",
    [
        {"__json": "{}"},
        {'a"b': "x"},
        {"requiredSystemFeatures": "k\u00fcm"},
        {"requiredSystemFeatures": "a\nb"},
        {"text": "x" * MAX_BYTES},
    ],
)
def test_what_is_rare_is_left_to_python_and_those_above_it_are_taken(native: Native, env: dict[str, str]) -> None:
    make = Maker()
    below = make.plain("below")
    rare = make.plain("rare", [below], outputs=("dev", "out"), **env)
    above = make.plain("above", [(rare, ("dev",)), below])
    quick = QuickVerifier(STORE, native)
    assert quick.quickly(below.name, below.data) is not None
    assert quick.quickly(rare.name, rare.data) is None
    # Python finds what was verified natively, and its own is found natively.
    assert quick.add(rare.drv, rare.data).outputs == rare.outputs
    found = quick.quickly(above.name, above.data)
    assert found is not None
    assert found.modulo.hex() == above.modulo


def test_a_lie_is_refused_in_pythons_words(native: Native, members: list[Made]) -> None:
    other = members[0].outputs["out"].encode()
    quick = QuickVerifier(STORE, native)
    for made in members:
        lie = made.data.replace(made.outputs["out"].encode(), other)
        if lie != made.data:
            name = at_its_path(made.name, lie)
            assert quick.quickly(name, lie) is None
            with pytest.raises(OutputPathError):
                quick.add(STORE.full(name), lie)
        # Nor is one known that was refused.
        assert quick.quickly(made.name, made.data) is not None


def test_names_and_records_that_are_none_are_left_alone(native: Native, members: list[Made]) -> None:
    made = members[0]
    for name in ("", "x", "../" + made.name, made.name + "\0", "\ud800" + made.name[1:], made.name[:-4], made.name * 9):
        assert native.verify(STORE.path, name, made.data, {}) is None
    above = members[2]
    for record in (b"", b"0" * 64, b"0" * 65, b"0" * 65 + b"out", b"0" * 65 + b"out\0", b"0" * 65 + b"out\0\0"):
        assert native.verify(STORE.path, above.name, above.data, {made.name: record}) is None
    with pytest.raises(TypeError):
        native.verify(STORE.path, above.name, above.data, {made.name: "text"})  # type: ignore[dict-item]


def test_an_unsorted_or_doubled_list_is_never_taken(native: Native, members: list[Made]) -> None:
    both = Both(native, members)
    drv = aterm.parse(members[-1].data)
    env, inputs, sources = drv.env, drv.input_drvs, drv.input_srcs
    for changed in (
        replace(drv, env=env[::-1]),
        replace(drv, env=(*env, env[-1])),
        replace(drv, input_drvs=inputs[::-1]),
        replace(drv, input_srcs=sources[::-1]),
        replace(drv, input_drvs=tuple((path, names * 2) for path, names in inputs)),
        replace(drv, input_drvs=tuple((path, ()) for path, _ in inputs)),
    ):
        data = unsorted(changed)
        name = at_its_path(members[-1].name, data)
        assert not both.take(name, data)
        with pytest.raises(NixError):
            both.quick.add(STORE.full(name), data)


def unsorted(drv: Derivation) -> bytes:
    """The text in the order of the derivation, which holds no escapes."""

    def strings(items: tuple[str, ...]) -> str:
        return "[" + ",".join(f'"{each}"' for each in items) + "]"

    outputs = ",".join(f'("{each.name}","{each.path}","{each.hash_algo}","{each.hash}")' for each in drv.outputs)
    inputs = ",".join(f'("{path}",{strings(names)})' for path, names in drv.input_drvs)
    env = ",".join(f'("{key.decode()}","{value.decode()}")' for key, value in drv.env)
    args = strings(tuple(each.decode() for each in drv.args))
    program = f'"{drv.system}","{drv.builder}"'
    return f"Derive([{outputs}],[{inputs}],{strings(drv.input_srcs)},{program},{args},[{env}])".encode()


def test_the_compilers_sanitizers_find_nothing(tmp_path: Path) -> None:
    file = tmp_path / f"verify_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(
        ["cc", *FLAGS, *SANITIZERS, include, str(TOP / NATIVE_SOURCE), "-o", str(file)],
        check=True,
    )
    library = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # Python itself keeps what it has until it ends.
    environment = {**os.environ, "LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    # Objects of its own for each, so that a byte behind one is none of another.
    environment["PYTHONMALLOC"] = "malloc"
    answer = subprocess.run(
        [sys.executable, "-m", "tests.infra.nix.native_cases", file, "1", str(FUZZED)],
        env=environment,
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    taken, kept = map(int, answer.stdout.split())
    # Most changes break a promise; some do not, such as one of a variable that nothing reads.
    assert 0 < taken <= kept
