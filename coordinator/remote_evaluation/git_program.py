"""Program that fetches one revision of a git repository, run in a sandbox of its own, and sends it as a tree.

It evaluates nothing and runs nothing of the repository: there is no checkout, so no hook, filter or attribute counts.
Git reaches the gateway and nothing else. Submodules become empty directories, as git leaves them.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from typing import Final

from coordinator.api.trees import TreeBounds, TreeChecker, compressed
from coordinator.evaluation.errors import EvaluationError
from coordinator.remote_evaluation.frames import FrameKind
from coordinator.remote_evaluation.jobs import GitJob
from coordinator.remote_evaluation.program import Pipe, relaying, run
from coordinator.remote_evaluation.sandboxes import ENVIRONMENT, GATEWAY_PORT, WORK
from infra.nix.nar import (
    MAX_TARGET_LENGTH,
    NarData,
    NarDirectory,
    NarDirectoryEnd,
    NarEvent,
    NarFile,
    NarSymlink,
    NarWriter,
)
from infra.process import ProcessError
from infra.process import run as run_process

REPOSITORY: Final = f"{WORK}/repository"
#: Seconds for one git command; the coordinator's own bound on all is smaller or larger.
GIT_S: Final = 24 * 3600.0
_MAX_OUTPUT_BYTES: Final = 64 * 1024
_MAX_LISTING_BYTES: Final = 256 * 1024 * 1024
_PIECE_BYTES: Final = 256 * 1024
#: Only what the operator allows: the gateway, no redirect to another place, no helper of a URL.
_SETTINGS: Final = {
    "http.proxy": f"socks5h://127.0.0.1:{GATEWAY_PORT}",
    "http.followRedirects": "initial",
    "protocol.allow": "never",
    "protocol.https.allow": "always",
    "protocol.http.allow": "always",
    "transfer.fsckObjects": "true",
    "fetch.unpackLimit": "1",
    "gc.auto": "0",
    "core.hooksPath": "/dev/null",
    "credential.helper": "",
}
_LINK, _EXECUTABLE, _SUBMODULE, _DIRECTORY = "120000", "100755", "160000", "040000"


async def fetch(pipe: Pipe) -> None:
    """Do the job that comes over the pipe. Raises `CoordinatorError`."""
    _, data = await pipe.receive(FrameKind.JOB)
    job = GitJob.model_validate_json(data)
    await _git("init", "--quiet", "--bare", REPOSITORY, failed="git cannot make a repository")
    async with relaying():
        await _fetch_revision(job)
    pieces = compressed(_tree(job))
    await pipe.stream(FrameKind.TREE, FrameKind.TREE_END, pieces)


async def _fetch_revision(job: GitJob) -> None:
    failed = f"{job.rev} of {job.url} cannot be fetched"
    wanted = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules")
    try:
        await _git("fetch", "--depth=1", *wanted, job.url, f"{job.rev}:refs/drover", failed=failed)
    except EvaluationError:
        # A server may give a revision only as part of a branch, and a dumb one no part of a history.
        await _git("fetch", *wanted, job.url, "+refs/*:refs/remote/*", failed=failed)
        await _git("update-ref", "refs/drover", f"{job.rev}^{{commit}}", failed=f"{job.url} has no revision {job.rev}")


async def _git(*words: str, failed: str) -> None:
    command = ["git", *_settings(), "--git-dir", REPOSITORY, *words]
    if words[0] == "init":
        command = ["git", *_settings(), *words]
    try:
        done = await run_process(command, env=ENVIRONMENT, timeout_s=GIT_S, max_output_bytes=_MAX_OUTPUT_BYTES)
    except ProcessError as error:
        raise EvaluationError(f"{failed}: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        said = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[-1] if lines else "")
        raise EvaluationError(f"{failed}: {said.partition(': ')[2] or said or 'git ended without a word'}")


def _settings() -> list[str]:
    return [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]


def _tree(job: GitJob) -> Iterator[bytes]:
    """Yield the NAR of the revision's tree, in a thread; blobs are read one by one."""
    checker = TreeChecker(TreeBounds(job.tree_bytes, job.tree_entries))
    writer = NarWriter()
    for event in _events():
        checker.check(event)
        yield writer.write(event)
    writer.close()


class _Blobs:
    """`git cat-file --batch`, asked for one blob at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["git", "--git-dir", REPOSITORY, "cat-file", "--batch"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def open(self, name: str) -> int:
        """Ask for a blob; returns its size."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("it has pipes")
        self._process.stdin.write(f"{name}\n".encode())
        self._process.stdin.flush()
        words = self._process.stdout.readline().split()
        if len(words) != 3 or words[1] != b"blob":
            raise EvaluationError("the repository lacks a part of the revision")
        return int(words[2])

    def read(self, size: int) -> Iterator[bytes]:
        """Yield its bytes."""
        if self._process.stdout is None:
            raise AssertionError("it has pipes")
        while size:
            data = self._process.stdout.read(min(size, _PIECE_BYTES))
            if not data:
                raise EvaluationError("the repository lacks a part of the revision")
            size -= len(data)
            yield data
        self._process.stdout.read(1)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def _events() -> Iterator[NarEvent]:
    blobs = _Blobs()
    try:
        yield NarDirectory(b"")
        above: list[bytes] = []
        for path, mode, name in _listing():
            *directories, last = path.split(b"/")
            while above != directories[: len(above)]:
                above.pop()
                yield NarDirectoryEnd()
            if mode in {_DIRECTORY, _SUBMODULE}:
                yield NarDirectory(last)
                above.append(last)
                continue
            size = blobs.open(name)
            if mode == _LINK:
                if size > MAX_TARGET_LENGTH:
                    raise EvaluationError("the repository has a symlink that is too long")
                yield NarSymlink(last, b"".join(blobs.read(size)))
                continue
            yield NarFile(last, mode == _EXECUTABLE, size)
            for data in blobs.read(size):
                yield NarData(data)
        for _ in above:
            yield NarDirectoryEnd()
        yield NarDirectoryEnd()
    finally:
        blobs.close()


def _listing() -> list[tuple[bytes, str, str]]:
    """Return (path, mode, object) of the tree, in the order of a NAR."""
    done = subprocess.run(
        ["git", "--git-dir", REPOSITORY, "ls-tree", "-r", "-t", "-z", "--full-tree", "refs/drover"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        check=False,
        timeout=GIT_S,
    )
    if done.returncode or len(done.stdout) > _MAX_LISTING_BYTES:
        raise EvaluationError("the tree of the revision cannot be listed")
    found = []
    for line in done.stdout.split(b"\0"):
        if line:
            words, _, path = line.partition(b"\t")
            mode, _, name = words.decode().split()
            found.append((path, mode, name))
    # Git sorts a directory as if its name ended in a slash.
    return sorted(found, key=lambda each: each[0].split(b"/"))


def main() -> None:
    """Fetch."""
    asyncio.run(run(fetch))


if __name__ == "__main__":
    main()
