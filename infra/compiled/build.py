"""Compilation of the scheduler by mypyc, and of the native module by the C compiler: `./run compile`.

The build lies in the virtual environment, beside nothing that git sees, and goes with it. A compiler works in a
directory of its own; the manifest, which says where the build is, takes the place of the former one last and in one
step. So whatever ends early leaves the former build, or none, in use.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from infra.compiled.finder import FORMAT, MANIFEST, SWITCH, Manifest
from infra.compiled.modules import MODULES, NATIVE, NATIVE_SOURCE, PACKAGE

#: More takes half a minute longer and gives nothing that can be measured.
OPTIMISATION: Final = "1"
#: Beyond this a compiler hangs.
COMPILE_S: Final = 900.0
#: Lines of a compiler's messages that are shown.
LAST_LINES: Final = 8
#: Prefix of directories in which a compiler works.
_WORK: Final = "new-"
_START: Final = "drover_compiled.pth"
_CACHE: Final = ".mypy_cache/compiled"


class CompileError(Exception):
    """There is no new build; the text says why, and what to do."""


def sources_of(top: Path) -> list[Path]:
    """Return the sources that a build depends on."""
    return [*sorted((top / PACKAGE).glob("*.py")), *top.glob(NATIVE_SOURCE)]


def compile_modules(
    top: Path,
    place: Path,
    modules: Sequence[str] = (*MODULES, NATIVE),
    optimisation: str = OPTIMISATION,
    cache: Path | None = None,
) -> None:
    """Compile modules of the checkout at `top` into `place` and have its manifest name them."""
    _require_compiler()
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        for left in place.glob(f"{_WORK}*"):
            shutil.rmtree(left)
        before = _source_lines(top)
        with tempfile.TemporaryDirectory(prefix=_WORK, dir=place) as work:
            _run_compiler(top, Path(work), cache or top / _CACHE, optimisation, modules)
            if _source_lines(top) != before:
                raise CompileError("the sources changed while they were compiled; run ./run compile again")
            text = _manifest(top, Path(work), before)
            directory = place / Manifest(text).directory
            if not directory.exists():
                directory.mkdir()
                for each in Path(work).iterdir():
                    if each.name != "c":
                        each.rename(directory / each.name)
        _keep_one_besides(place, directory)
        written = place / f"{MANIFEST}.new"
        written.write_text(text, encoding="utf-8")
        written.replace(place / MANIFEST)


def is_fresh(place: Path) -> bool:
    """Return whether there is a build of the sources as they are."""
    try:
        found = Manifest((place / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not found.fault() and (place / found.directory).is_dir()


def start_with(site: Path, place: Path) -> None:
    """Have each start of the environment's interpreter look for compiled modules in `place`."""
    # A checkout of an older state has no such package.
    line = (
        f'import os, importlib.util as u; os.environ.get("{SWITCH}") != "no" and '
        'u.find_spec("infra") and u.find_spec("infra.compiled") and '
        f'__import__("infra.compiled.finder", fromlist=["install"]).install({str(place)!r})\n'
    )
    written = site / f"{_START}.new"
    written.write_text(line, encoding="utf-8")
    written.replace(site / _START)


def remove(site: Path, place: Path) -> None:
    """Remove the build, and the look for it."""
    (site / _START).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        shutil.rmtree(place)


def _require_compiler() -> None:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    install = "xcode-select --install" if sys.platform == "darwin" else "apt-get install gcc python3-dev"
    if shutil.which(compiler) is None:
        raise CompileError(f"there is no C compiler called {compiler}; install one with: {install}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise CompileError(f"Python's C headers (Python.h) are missing; install them with: {install}")
    if find_spec("mypyc") is None:
        raise CompileError("mypyc is missing from this environment; ./run setup installs it")


def _run_compiler(top: Path, work: Path, cache: Path, optimisation: str, modules: Sequence[str]) -> None:
    command = [sys.executable, "-m", "infra.compiled.extension", str(work), str(cache), optimisation, *modules]
    try:
        run = subprocess.run(
            command,
            cwd=top,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMPILE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"the compiler did not end within {COMPILE_S:.0f} s; nothing has changed") from None
    if run.returncode:
        said = [line for line in run.stdout.splitlines() if line.strip() and "warning:" not in line]
        raise CompileError(
            "\n".join(["the compiler failed, so nothing has changed; it ended with:", *said[-LAST_LINES:]])
        )


def _source_lines(top: Path) -> list[str]:
    lines = []
    for source in sources_of(top):
        found = source.stat()
        digest = sha256(source.read_bytes()).hexdigest()
        lines.append(f"source {found.st_size} {found.st_mtime_ns} {digest} {source.relative_to(top)}")
    return lines


def _manifest(top: Path, work: Path, sources: Sequence[str]) -> str:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    # It stands above all packages, or beside the one module that was compiled; a native module alone has none.
    library = next((each.relative_to(work) for each in work.rglob(f"*__mypyc{suffix}")), "")
    lines = [
        FORMAT,
        f"python {sys.version}",
        f"mypyc {metadata.version('mypy')}",
        f"top {top}",
        f"library {str(library).removesuffix(suffix).replace(os.sep, '.')}",
        f"suffix {suffix}",
        *sources,
    ]
    name = sha256("\n".join([*lines, str(os.getpid())]).encode()).hexdigest()[:16]
    return "\n".join([*lines, f"directory {name}", ""])


def _keep_one_besides(place: Path, directory: Path) -> None:
    """Remove all builds but the new one and the one in use, of which a process may still import modules."""
    try:
        used = Manifest((place / MANIFEST).read_text(encoding="utf-8")).directory
    except (OSError, ValueError):
        used = ""
    for each in place.iterdir():
        if each.is_dir() and each.name not in {directory.name, used}:
            shutil.rmtree(each)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompileError("another ./run compile is at work here; wait for its end") from None
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, or say or undo what was compiled."""
    parser = argparse.ArgumentParser(
        prog="./run compile", description="Compile what runs compiled, for this environment."
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--remove", action="store_true", help="run from source again")
    choice.add_argument("--check", action="store_true", help="end with 1 where no fresh build is used, and say why")
    options = parser.parse_args(arguments)
    top = Path(__file__).resolve().parent.parent.parent
    site = Path(sysconfig.get_path("purelib"))
    place = site / "drover_compiled"
    if options.remove:
        remove(site, place)
        return 0
    if options.check:
        return _check(place)
    try:
        if not is_fresh(place):
            compile_modules(top, place)
        start_with(site, place)
    except CompileError as error:
        print(f"compile: {error}", file=sys.stderr)  # noqa: T201  a command
        return 2
    return _check(place)


def _check(place: Path) -> int:
    if not (place / MANIFEST).exists():
        answer = "nothing is compiled, so everything runs from source: ./run compile compiles it"
    elif is_fresh(place):
        answer = (
            f"{len(MODULES)} modules of the scheduler run compiled, and derivations are verified natively; "
            "start the coordinator again to use them"
        )
    else:
        answer = "the compiled modules are stale, so everything runs from source: run ./run compile again"
    print(answer)  # noqa: T201  a command
    return int(not is_fresh(place))


if __name__ == "__main__":
    sys.exit(main())
