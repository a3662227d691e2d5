"""An ordinary user of this machine, made for one test and gone with it: no account of the machine is touched.

Programs of this user run in a mount namespace of their own. It holds copies of the account files with one more user and
a range of subordinate ids for it, and it opens the way to this checkout and its Python where a directory above them is
closed to others (Python below /root): the closed directory is covered by an empty one of mode 0755, into which only
what is needed is bound. `newuidmap` is setuid, so `no_new_privs` stays unset.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.patience import PATIENCE_S

NAME = "ordinary"
#: Above what distributions give to people and to system accounts.
UID = 61234
SUBORDINATE_IDS = (3_000_000, 65536)
CHECKOUT = Path(__file__).resolve().parents[2]


class OrdinaryUser:
    """A user with an empty home directory below `root`; `prefix` before a command runs it as this user."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self._accounts = root / "accounts"
        self._accounts.mkdir()
        self.home.mkdir(mode=0o700)
        (self.home / "tmp").mkdir()
        for directory in (self.home, self.home / "tmp"):
            os.chown(directory, UID, UID)
        first, count = SUBORDINATE_IDS
        self._add("passwd", f"{NAME}:x:{UID}:{UID}::{self.home}:/bin/sh")
        self._add("group", f"{NAME}:x:{UID}:")
        self._add("subuid", f"{NAME}:{first}:{count}")
        self._add("subgid", f"{NAME}:{first}:{count}")
        script = root / "enter.sh"
        script.write_text(self._script())
        user = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--")
        #: Every link becomes the next one, so the process keeps its id and gets the signals.
        self.prefix: tuple[str, ...] = ("unshare", "--mount", "--propagation", "private", "/bin/sh", str(script), *user)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment that a login sets, and the way to Nix."""
        return {
            "HOME": str(self.home),
            "USER": NAME,
            "LOGNAME": NAME,
            "TMPDIR": str(self.home / "tmp"),
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
        }

    def run(self, *command: str | Path, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [*self.prefix, *map(str, command)],
            env=self.environment,
            cwd=self.home.root,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def _add(self, name: str, line: str) -> None:
        (self._accounts / name).write_text(Path(f"/etc/{name}").read_text().rstrip("\n") + f"\n{line}\n")

    def _script(self) -> str:
        lines = ["set -eu"]
        lines += [f"mount --bind {shlex.quote(str(file))} /etc/{file.name}" for file in self._accounts.iterdir()]
        needed = _without_nested([*_readable(CHECKOUT), *_readable(Path(sys.base_prefix)), self.home])
        closed = _without_nested([above for path in needed for above in path.parents if not _open(above)])
        hidden = [path for path in needed if any(above in closed for above in path.parents)]
        if hidden:
            # A file system that only this namespace sees; reached by the working directory once it is covered.
            stage = shlex.quote(str(self._accounts))
            lines += [f"mount -t tmpfs -o mode=0755 stage {stage}", f"cd {stage}"]
            lines += [_bind(path, f"./{number}") for number, path in enumerate(hidden)]
            lines += [f"mount -t tmpfs -o mode=0755 cover {shlex.quote(str(path))}" for path in closed]
            lines += [_bind(Path(f"./{number}"), str(path), like=path) for number, path in enumerate(hidden)]
        return "\n".join([*lines, "cd /", 'exec "$@"', ""])


def _open(directory: Path) -> bool:
    return directory.stat().st_mode & 0o005 == 0o005


def _readable(path: Path) -> list[Path]:
    """`path`, or what is in it where it is itself closed."""
    return [path] if _open(path) else list(path.iterdir())


def _without_nested(paths: Sequence[Path]) -> list[Path]:
    """The distinct paths that are not below another one."""
    distinct = sorted(set(paths))
    return [path for path in distinct if not any(above in distinct for above in path.parents)]


def _bind(source: Path, target: str, like: Path | None = None) -> str:
    place, parent = shlex.quote(target), shlex.quote(str(Path(target).parent))
    make = f"mkdir -p {place}" if (like or source).is_dir() else f"mkdir -p {parent}; : > {place}"
    return f"{make}; mount --rbind {shlex.quote(str(source) if source.is_absolute() else f'./{source}')} {place}"
