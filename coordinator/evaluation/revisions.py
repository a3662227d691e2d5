"""Revisions of a local git repository, each checked out into a private directory to be evaluated there.

A checkout holds the files of a commit as a clone would, and no `.git`. It is made through an index of its own, so that
the repository, its working tree and its index stay as they are and no hook runs; `git archive` would leave out what
`.gitattributes` does not export, and `git worktree` writes into the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from coordinator.evaluation.errors import EvaluationError
from infra.process import Completed, ProcessError, ProcessNotFound, run
from infra.records import record

#: Seconds for a question to git, and for a checkout, which may fetch or filter files.
ASK_S: Final = 60.0
CHECKOUT_S: Final = 1800.0
MAX_OUTPUT_BYTES: Final = 64 * 1024 * 1024
#: Variables that would point git at something else than the directory that it is run for.
_FOREIGN: Final = frozenset({
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY",
})  # fmt: skip
_COMMIT: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_SUBMODULE: Final = "160000 "


@record(frozen=True, slots=True)
class Checkout:
    """The files of a commit."""

    directory: Path
    #: Paths of submodules, which are empty.
    submodules: tuple[str, ...] = ()


@record(frozen=True, slots=True)
class Repository:
    """A repository, by the top of its working tree (of a bare one, its own directory)."""

    root: Path
    #: Where git keeps it.
    git_dir: Path
    env: Mapping[str, str]

    @classmethod
    async def around(cls, path: Path, env: Mapping[str, str]) -> Repository:
        """Return the repository that a file or directory lies in.

        Raises:
            EvaluationError: There is none, or git refuses it.
        """
        directory = _directory_of(path)
        own = {name: value for name, value in env.items() if name not in _FOREIGN}
        done = await _git(["-C", str(directory), "rev-parse", "--absolute-git-dir"], own)
        if done.returncode != 0:
            raise EvaluationError(f"{directory} is in no git repository that can be read: {_complaint(done)}")
        git_dir = Path(_text(done).rstrip("\n"))
        top = await _git(["-C", str(directory), "rev-parse", "--show-toplevel"], own)
        return cls(Path(_text(top).rstrip("\n")) if top.returncode == 0 else git_dir, git_dir, own)

    async def commit_of(self, revision: str) -> str:
        """Return the hash of the commit that a person's text means.

        Raises:
            EvaluationError: It means none; the sentence says what to do, also in a shallow clone.
        """
        if revision and not revision.startswith("-"):
            done = await self.ask("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
            commit = _text(done).strip()
            if done.returncode == 0 and _COMMIT.fullmatch(commit):
                return commit
        shallow = _text(await self.ask("rev-parse", "--is-shallow-repository")).strip() == "true"
        if shallow:
            raise EvaluationError(
                f"{self.root} has no revision {revision!r}, and it is a shallow clone: fetch the rest with "
                "`git fetch --unshallow` (in CI: a checkout with its whole history)"
            )
        raise EvaluationError(
            f"{self.root} has no revision {revision!r}; `git log --oneline --all` lists those that it has, "
            "`git fetch` gets newer ones"
        )

    async def uncommitted(self) -> tuple[str, ...]:
        """Return the paths of the working tree that differ from HEAD, untracked ones too; of a bare one none."""
        done = await self.ask("-c", "core.quotePath=false", "status", "--porcelain")
        return tuple(line[3:] for line in _text(done).splitlines()) if done.returncode == 0 else ()

    @asynccontextmanager
    async def checkout(self, commit: str, below: Path | None = None) -> AsyncIterator[Checkout]:
        """Give the files of a commit for as long as the block runs, in the temporary directory or `below` another.

        Their directory has the repository's own name, because Nix names a source after its directory.

        Raises:
            EvaluationError: git cannot read the commit, or the files cannot be written.
        """
        private = tempfile.mkdtemp(prefix="drover-revision-", dir=below)
        try:
            directory = _made(private, self._name)
            index = {"GIT_INDEX_FILE": str(Path(private) / "index")}
            where = ("-C", str(directory), f"--work-tree={directory}")
            await self._do(commit, index, *where, "read-tree", commit)
            await self._do(commit, index, *where, "checkout-index", "--all", "--force", "--quiet")
            staged = await self._do(commit, index, *where, "ls-files", "--stage", "-z")
            entries = [line for line in _text(staged).split("\0") if line.startswith(_SUBMODULE)]
            yield Checkout(directory, tuple(entry.partition("\t")[2] for entry in entries))
        finally:
            # Not in a thread: nothing may come between an interruption and this.
            shutil.rmtree(private, ignore_errors=True)

    @property
    def _name(self) -> str:
        return self.root.name.removesuffix(".git") or "source"

    async def ask(self, *arguments: str) -> Completed:
        """Run git in the repository; nothing that it is asked may write there."""
        return await _git([f"--git-dir={self.git_dir}", *self._tree, *arguments], self.env)

    @property
    def _tree(self) -> tuple[str, ...]:
        return () if self.root == self.git_dir else ("-C", str(self.root), f"--work-tree={self.root}")

    async def _do(self, commit: str, more: Mapping[str, str], *arguments: str) -> Completed:
        command = [f"--git-dir={self.git_dir}", *arguments]
        done = await _git(command, {**self.env, **more}, CHECKOUT_S)
        if done.returncode != 0:
            raise EvaluationError(f"revision {commit[:12]} of {self.root} cannot be checked out: {_complaint(done)}")
        return done


def _directory_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _made(private: str, name: str) -> Path:
    # git checks nothing out through links.
    directory = Path(private).resolve() / "files" / name
    directory.mkdir(parents=True)
    return directory


async def _git(arguments: Sequence[str], env: Mapping[str, str], timeout_s: float = ASK_S) -> Completed:
    # A hook that follows changes of an index, and a monitor of the working tree, are none of a checkout's business.
    command = ["git", "-c", f"core.hooksPath={os.devnull}", "-c", "core.fsmonitor=false", *arguments]
    try:
        return await run(command, env=env, timeout_s=timeout_s, max_output_bytes=MAX_OUTPUT_BYTES)
    except ProcessNotFound:
        raise EvaluationError("git is not on PATH; install it on this machine to evaluate revisions") from None
    except ProcessError as error:
        raise EvaluationError(f"git did not answer: {error}") from None


def _text(done: Completed) -> str:
    return os.fsdecode(done.stdout).encode(errors="replace").decode()


def _complaint(done: Completed) -> str:
    """Return git's last line without its word for an error."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    line = next((each for each in lines if each.startswith(("fatal:", "error:"))), lines[-1] if lines else "")
    return line.partition(": ")[2] or f"git ended with status {done.returncode}"
