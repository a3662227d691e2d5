"""Compiled modules of the scheduler: they decide as their sources do, and give way to these where they are stale."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from infra.compiled import build
from infra.compiled.finder import MANIFEST, SWITCH, Manifest

TOP = Path(__file__).resolve().parent.parent.parent
#: mypy's answers about the standard library, which take it ten seconds.
CACHE = TOP / ".mypy_cache/compiled-by-tests"
SEEDS = 120
#: Of the modules those that hold the state and decide the most: all of them take four times as long to compile.
CORE = tuple(
    f"scheduler.{name}" for name in ("builders", "decide", "grants", "graph", "ready", "records", "state", "wanted")
)

#: Imports a small module, and says where from and why.
IMPORTING = """
import sys
from infra.compiled import finder
sys.path.insert(0, sys.argv[1])
finder.install(sys.argv[2])
import scheduler.pauses
print(scheduler.pauses.__file__.endswith(".py"), scheduler.pauses.PIECE)
print(finder.is_compiled(), finder.fault())
"""


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    answer = subprocess.run(
        [sys.executable, *command],
        env={**environment, **(env or {})},
        cwd=TOP,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return answer.stdout


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkout with one small module."""
    (tmp_path / "top/scheduler").mkdir(parents=True)
    for name in ("__init__", "pauses"):
        shutil.copy(TOP / f"scheduler/{name}.py", tmp_path / f"top/scheduler/{name}.py")
    return tmp_path / "top"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "place"


def compile_small(small: Path, place: Path) -> None:
    build.compile_modules(small, place, ("scheduler.pauses",), "0", CACHE)


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what makes a shell script the C compiler."""

    def make(text: str) -> None:
        script = tmp_path / "cc"
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))

    return make


def test_compiled_and_from_source_the_core_decides_the_same(tmp_path: Path) -> None:
    build.compile_modules(TOP, tmp_path, CORE, "0", CACHE)
    lives = "tests.scheduler.compiled_lives"
    how, _, compiled = run("-m", lives, str(SEEDS), tmp_path).partition("\n")
    assert how == "compiled"
    how, _, source = run("-m", lives, str(SEEDS), env={SWITCH: "no"}).partition("\n")
    assert how == "source"
    assert len(source.splitlines()) > SEEDS
    assert compiled == source


def test_a_build_runs_until_a_source_has_changed_and_says_so(small: Path, place: Path) -> None:
    compile_small(small, place)
    assert build.is_fresh(place)
    assert run("-c", IMPORTING, small, place).split() == ["False", "512", "True"]
    # A checkout to and fro changes times alone.
    source = small / "scheduler/pauses.py"
    os.utime(source, ns=(1, 1))
    assert run("-c", IMPORTING, small, place).split() == ["False", "512", "True"]
    # Another checkout that is first in the path is not the one that was compiled.
    other = shutil.copytree(small, small.parent / "other")
    assert run("-c", IMPORTING, other, place).split()[:2] == ["True", "512"]
    assert run("-c", IMPORTING, small, place, env={SWITCH: "no"}).split() == ["True", "512", "False"]
    source.write_text(source.read_text().replace("512", "513"))
    where, compiled = run("-c", IMPORTING, small, place).splitlines()
    assert where == "True 513"
    assert compiled == (
        "False everything runs from source, because scheduler/pauses.py has changed since it was compiled: "
        "run ./run compile again"
    )
    compile_small(small, place)
    assert run("-c", IMPORTING, small, place).split() == ["False", "513", "True"]
    # A process that began before may still import from the former build; no others stay.
    assert len([each for each in place.iterdir() if each.is_dir()]) == 2
    (place / MANIFEST).write_text("garbled")
    assert run("-c", IMPORTING, small, place).splitlines()[0] == "True 513"


def test_without_a_compiler_one_sentence_names_the_package(
    small: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.CompileError, match=r"no C compiler called no-such-compiler; install one with: apt-get"):
        compile_small(small, place)
    assert not place.exists()


def test_a_compiler_that_fails_or_is_cut_leaves_the_former_build(
    small: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_small(small, place)
    before = (place / MANIFEST).read_text()
    make = compiler(tmp_path, monkeypatch)
    make("echo 'the disk is full' >&2; exit 1")
    with pytest.raises(build.CompileError, match=r"(?s)the compiler failed, so nothing has changed.*the disk is full"):
        compile_small(small, place)
    source = small / "scheduler/pauses.py"
    text = source.read_text()
    make(f"echo '# edited' >> {source}; exec cc \"$@\"")
    with pytest.raises(build.CompileError, match="the sources changed while they were compiled"):
        compile_small(small, place)
    source.write_text(text)
    # The process that compiles is killed, as by a machine that goes down.
    make(f"kill -9 $(cat {tmp_path}/pid)")
    program = (
        "import os, sys; from pathlib import Path; from infra.compiled import build; "
        "Path(sys.argv[1]).write_text(str(os.getpid())); "
        f"build.compile_modules(Path(sys.argv[2]), Path(sys.argv[3]), ('scheduler.pauses',), '0', Path({str(CACHE)!r}))"
    )
    with pytest.raises(subprocess.CalledProcessError):
        run("-c", program, tmp_path / "pid", small, place)
    assert (place / MANIFEST).read_text() == before
    assert run("-c", IMPORTING, small, place).split() == ["False", "512", "True"]
    monkeypatch.delenv("CC")
    compile_small(small, place)
    assert not list(place.glob("new-*"))


def test_each_start_looks_for_the_build_until_it_is_removed(small: Path, place: Path, tmp_path: Path) -> None:
    compile_small(small, place)
    site = tmp_path / "site"
    site.mkdir()
    build.start_with(site, place)
    probe = f"import site; site.addsitedir({str(site)!r}); import sys; sys.path.insert(0, {str(small)!r}); "
    probe += "import scheduler.pauses; print(scheduler.pauses.__file__)"
    directory = Manifest((place / MANIFEST).read_text()).directory
    assert f"/place/{directory}/scheduler/pauses" in run("-c", probe)
    build.remove(site, place)
    assert run("-c", probe).strip() == str(small / "scheduler/pauses.py")
    assert not place.exists()
