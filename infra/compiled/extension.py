"""Compiler run of `infra.compiled.build`, in a process of its own: `extension DIRECTORY CACHE OPTIMISATION MODULE…`.

mypyc ends the process where it finds a mistake, and a compiler writes to both outputs, which `build` reads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from infra.compiled.modules import NATIVE, NATIVE_SOURCE

#: Of an error that names a command with all of its options.
ERROR_CHARACTERS: Final = 200
#: Optimised whatever Python was, with the checks of the C library and of the stack.
NATIVE_FLAGS: Final = ["-std=c11", "-O2", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"]


def compile_into(directory: Path, cache: Path, optimisation: str, modules: list[str]) -> None:
    """Compile the modules, of the packages in the working directory, into extension modules in `directory`."""
    from mypyc.build import mypycify  # noqa: PLC0415  of the packages for development
    from setuptools import Distribution, Extension  # noqa: PLC0415  the same
    from setuptools.command.build_ext import build_ext  # noqa: PLC0415  the same
    from setuptools.errors import BaseError, CCompilerError  # noqa: PLC0415  the same

    # Without the checkout's settings: what is strict there is judged by `./run lint`, not again here.
    options = ["--config-file=", f"--cache-dir={cache}"]
    files = [f"{module.replace('.', '/')}.py" for module in modules if module != NATIVE]
    extensions: list[Any] = []
    if files:
        c = str(directory / "c")
        extensions += mypycify([*options, *files], opt_level=optimisation, debug_level="0", target_dir=c)
    if NATIVE in modules:
        extensions.append(Extension(NATIVE, [NATIVE_SOURCE], extra_compile_args=NATIVE_FLAGS))
    command = build_ext(Distribution({"name": "drover-compiled", "ext_modules": extensions}))
    command.build_lib, command.build_temp = str(directory), str(directory / "c")
    command.ensure_finalized()
    try:
        command.run()
    except (BaseError, CCompilerError) as error:
        # The compiler has said why; this names the whole command.
        sys.exit(str(error)[:ERROR_CHARACTERS])


if __name__ == "__main__":
    compile_into(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
