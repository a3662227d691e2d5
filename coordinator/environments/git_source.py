"""Git repositories as sources: one file of one branch, bounded in hosts, time and bytes.

A look is one `git ls-remote` of the one ref; only a commit that is new is fetched, alone, into a directory that goes
again. Nothing of a repository runs: there is no checkout, hook, filter, submodule or prompt, and redirections are not
followed. No setting of the machine's user counts, so no credentials of that user are sent anywhere.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from coordinator.environments.errors import EnvironmentSourceError
from coordinator.environments.model import TrackedSource
from coordinator.environments.reading import KNOWN_NAMES, SourceContent
from coordinator.wishes.model import MAX_FILE_BYTES
from infra.process import Completed, ProcessError, ProcessNotFound, ProcessOutputTooLarge, run

_PORTS: Final = {"https": 443, "http": 80}
_REF: Final = re.compile(r"(?!.*(\.\.|//|@\{|\.lock$|/$|\.$))[A-Za-z0-9_][A-Za-z0-9._/+@-]{0,199}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
#: Bytes of what git prints; a ref is one line, and a tag another one.
_MAX_OUTPUT_BYTES: Final = 64 * 1024
#: Bytes of a unit of `ulimit -f`.
_BLOCK_BYTES: Final = 512
#: Characters of git's own words that a sentence repeats.
_SHOWN: Final = 200
_SETTINGS: Final = {
    "protocol.version": "2",
    "protocol.allow": "never",
    "protocol.https.allow": "always",
    "protocol.http.allow": "always",
    "http.followRedirects": "false",
    "http.lowSpeedLimit": "1",
    "http.lowSpeedTime": "30",
    "transfer.fsckObjects": "true",
    # One pack, whose size the limit of files bounds.
    "fetch.unpackLimit": "1",
    "gc.auto": "0",
    "core.hooksPath": "/dev/null",
    "credential.helper": "",
    "core.askPass": "",
}
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin",
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "",
    "LC_ALL": "C",
}


@dataclass(frozen=True, slots=True)
class GitBounds:
    """Bounds that the operator sets."""

    hosts: tuple[str, ...]
    schemes: tuple[str, ...]
    timeout_s: float
    size_bytes: int
    #: Where repositories are while they are looked at; made when it is needed.
    directory: Path


def check_address(source: TrackedSource, bounds: GitBounds) -> None:
    """Raise `EnvironmentSourceError` for a repository, ref or file that this farm does not track."""
    if not bounds.hosts:
        raise EnvironmentSourceError(
            "this farm tracks no git repositories; its operator names hosts in environments.git_hosts, or push the "
            "content: `drover environments push`."
        )
    try:
        parts = urlsplit(source.url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise EnvironmentSourceError("the address of the git repository cannot be read.") from None
    if parts.scheme not in bounds.schemes:
        raise EnvironmentSourceError(
            f"this farm tracks git repositories by {', '.join(bounds.schemes)} only, and not by "
            f"{parts.scheme[:20] or 'a path'}."
        )
    if parts.username is not None or parts.password is not None:
        raise EnvironmentSourceError("the address of the git repository has a name or password in it; take it out.")
    if not source.url.isascii() or not source.url.isprintable() or " " in source.url:
        raise EnvironmentSourceError("the address of the git repository has blanks or control characters in it.")
    _check_host(host, port or _PORTS[parts.scheme], parts.scheme, bounds.hosts)
    if source.ref and not _REF.fullmatch(source.ref):
        raise EnvironmentSourceError(f"{source.ref[:80]!r} is no name of a branch or a tag.")
    if (
        source.path.startswith("/")
        or source.path.endswith("/")
        or ".." in source.path.split("/")
        or not source.path.isprintable()
    ):
        raise EnvironmentSourceError("the file of a git repository is named by its path in the tree.")


def _check_host(host: str, port: int, scheme: str, hosts: Sequence[str]) -> None:
    allowed = {each if ":" in each else f"{each}:{_PORTS[scheme]}" for each in map(str.lower, hosts)}
    if f"{host.lower()}:{port}" not in allowed:
        raise EnvironmentSourceError(
            f"this farm does not track repositories of {host[:100]}; its operator allows {', '.join(hosts[:8])} "
            "(environments.git_hosts)."
        )


async def look(source: TrackedSource, seen: str, bounds: GitBounds) -> SourceContent | None:
    """Return the file as the ref has it now; None where the ref is still at the commit that was `seen`.

    Raises:
        EnvironmentSourceError: The repository, ref or file is not there, or does not keep to the bounds.
    """
    check_address(source, bounds)
    try:
        async with asyncio.timeout(bounds.timeout_s):
            return await _looked(source, seen, bounds)
    except TimeoutError:
        raise EnvironmentSourceError(
            f"{source.url} cannot be looked at: it took longer than {bounds.timeout_s:g} s "
            "(environments.git_timeout_s)."
        ) from None
    except OSError as error:
        raise EnvironmentSourceError(
            f"{source.url} cannot be looked at: the coordinator cannot make a directory for it: {error.strerror}."
        ) from None


async def _looked(source: TrackedSource, seen: str, bounds: GitBounds) -> SourceContent | None:
    commit, name = await _found(source, bounds)
    if commit == seen:
        return None
    bounds.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bounds.directory) as repository:
        await _git(bounds, "init", "--quiet", "--bare", repository, failed="git cannot make a repository")
        here = ("--git-dir", repository)
        wanted = ("--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules")
        failed = f"{_what(source)} of {source.url} cannot be fetched"
        # By name: a server need not give a commit by its number. It may be a later one than that which was looked at.
        await _git(bounds, *here, "fetch", *wanted, source.url, f"+{name}:refs/drover", failed=failed)
        fetched = await _git(bounds, *here, "rev-parse", "refs/drover^{commit}", failed=failed)
        return await _file(source, fetched.stdout.decode().strip(), here, bounds)


async def _found(source: TrackedSource, bounds: GitBounds) -> tuple[str, str]:
    """Return the commit that a branch, a tag or HEAD is at, and its whole name: others may end alike."""
    names = [f"refs/heads/{source.ref}", f"refs/tags/{source.ref}", f"refs/tags/{source.ref}^{{}}"]
    failed = f"{source.url} cannot be looked at"
    said = await _git(bounds, "ls-remote", source.url, *(names if source.ref else ["HEAD"]), failed=failed)
    found = {}
    for line in said.stdout.decode(errors="replace").splitlines():
        commit, _, name = line.partition("\t")
        if _COMMIT.fullmatch(commit):
            found[name] = commit
    # Of a tag with a message the commit that it stands for.
    for name in [names[0], names[2], names[1]] if source.ref else ["HEAD"]:
        if name in found:
            return found[name], name.removesuffix("^{}")
    raise EnvironmentSourceError(f"{source.url} has no {_what(source)}; track another branch.")


async def _file(source: TrackedSource, commit: str, here: Sequence[str], bounds: GitBounds) -> SourceContent:
    for path in (source.path,) if source.path else KNOWN_NAMES:
        failed = f"{path} of {source.url} cannot be read"
        listed = await _git(bounds, *here, "ls-tree", "-l", "-z", commit, "--", path, failed=failed)
        words = listed.stdout.partition(b"\t")[0].split()
        if len(words) != 4 or words[1] != b"blob" or words[0] == b"120000":
            continue
        if int(words[3]) > MAX_FILE_BYTES:
            raise EnvironmentSourceError(f"{path} of {source.url} has more than {MAX_FILE_BYTES} bytes, the limit.")
        blob = await _git(bounds, *here, "cat-file", "blob", words[2].decode(), failed=failed, most=MAX_FILE_BYTES)
        return SourceContent(commit, path.rpartition("/")[2], blob.stdout)
    raise EnvironmentSourceError(
        f"{_what(source)} of {source.url} has no file {source.path or ' or '.join(KNOWN_NAMES)}; name another with "
        "--file."
    )


def _what(source: TrackedSource) -> str:
    return f"branch or tag {source.ref}" if source.ref else "HEAD"


async def _git(bounds: GitBounds, *words: str, failed: str, most: int = _MAX_OUTPUT_BYTES) -> Completed:
    settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
    blocks = str(bounds.size_bytes // _BLOCK_BYTES)
    command = ["sh", "-c", 'ulimit -f "$0" && exec "$@"', blocks, "git", *settings, *words]
    try:
        done = await run(command, env=_ENVIRONMENT, timeout_s=bounds.timeout_s, max_output_bytes=most, cwd="/")
    except ProcessOutputTooLarge:
        raise EnvironmentSourceError(f"{failed}: git answers with more than {most} bytes.") from None
    except (ProcessNotFound, ProcessError) as error:
        raise EnvironmentSourceError(f"{failed}: {error}.") from None
    if done.returncode:
        raise EnvironmentSourceError(f"{failed}: {_said(done, bounds)}.")
    return done


def _said(done: Completed, bounds: GitBounds) -> str:
    """Return git's reason in one line."""
    lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    if any("index-pack" in line or "File too large" in line for line in lines):
        return (
            f"git cannot take its pack, which may have {bounds.size_bytes // 2**20} MiB at most (environments.git_mib)"
        )
    said = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[-1] if lines else "")
    text = said.partition(": ")[2] or said or "git ended without a word"
    return "".join(character for character in text if character.isprintable())[:_SHOWN].rstrip(".")
