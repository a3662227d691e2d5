"""The values that travel over the worker protocol, and how each is written and read.

Store paths are full paths (`/nix/store/<hash>-<name>`) as text; the strings of a build (builder, arguments,
environment) are bytes, because Nix does not promise that they are UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from infra.daemon.errors import DaemonProtocolError
from infra.daemon.wire import Encoder, Inbox
from infra.nix.errors import FormatError
from infra.nix.hashing import parse_hash, sha256_text
from infra.nix.path_info import PathInfo
from infra.records import record

if TYPE_CHECKING:
    from infra.nix.derivation import Derivation

#: ANSI control sequences (colours above all) and operating-system commands such as links.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
#: What the base name of a store path is made of.
_BASE_NAME = re.compile(r"[0-9A-Za-z+\-._?=]+")
#: Most outputs that one build result may name.
MAX_OUTPUTS: Final = 10_000
#: Most references or signatures that one path may have.
MAX_REFERENCES: Final = 100_000


def plain_text(data: bytes) -> str:
    """Decode text that the daemon wrote for a terminal: escapes removed, invalid UTF-8 replaced."""
    return _ANSI.sub("", data.decode(errors="replace"))


@record(frozen=True, slots=True)
class Options:
    """Settings of one connection, in force from the next request on (operation 19).

    Attributes:
        keep_failed: Keep the build directory of failed builds.
        max_silent_s: End a build after so many seconds without output; 0 is never.
        build_cores: NIX_BUILD_CORES of builders. Nix 2.8 passes 0 literally, so it has no default here.
        use_substitutes: Let the daemon download instead of building.
        overrides: Any other Nix settings by name (`timeout`, `max-build-log-size`, `sandbox`, ...). They persist for
            the connection. An untrusted connection has most of them ignored.
        verbosity: Highest level of messages wanted; 1 is warnings. Log lines and phases come at every level.
    """

    build_cores: int
    keep_failed: bool = False
    max_silent_s: int = 0
    use_substitutes: bool = False
    overrides: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    verbosity: int = 1

    def encode(self, out: Encoder) -> None:
        """Write the arguments of SetOptions."""
        out.integer(self.keep_failed)
        out.integer(0)  # keep going: a request is one derivation
        out.integer(0)  # try fallback: only substitution has one
        out.integer(self.verbosity)
        out.integer(1)  # jobs: a connection is one slot, and 0 makes every local build fail
        out.integer(self.max_silent_s)
        out.integer(1)  # obsolete (use build hook)
        out.integer(0)  # verbose build: 0 is yes
        out.integer(0).integer(0)  # obsolete (log type, print build trace)
        out.integer(self.build_cores)
        out.integer(self.use_substitutes)
        out.mapping(self.overrides)


def encode_path_info(info: PathInfo, out: Encoder) -> None:
    """Write a path and its metadata as AddToStoreNar and AddMultipleToStore want it.

    Raises:
        ValueError: The hash is not a sha256 hash.
    """
    try:
        algorithm, digest = parse_hash(info.nar_hash)
    except FormatError as error:
        raise ValueError(f"hash of {info.store_path}: {error}") from error
    if algorithm != "sha256":
        raise ValueError(f"hash of {info.store_path} is not sha256 but {algorithm}")
    out.string(info.store_path).string(info.deriver_path).string(digest.hex()).strings(info.reference_paths)
    out.integer(0).integer(info.nar_size)  # registered now
    out.integer(0)  # ultimate: built by the store itself
    out.strings(info.sigs).string(info.ca)


def decode_path_info(path: str, inbox: Inbox) -> PathInfo:
    """Read the metadata of a full path as QueryPathInfo answers it."""
    store_prefix = path[: path.rfind("/") + 1]
    deriver = inbox.read_word("deriver")
    nar_hash = _read_nar_hash(inbox)
    references = inbox.read_words("references", MAX_REFERENCES)
    inbox.read_int()  # registration time
    nar_size = inbox.read_int()
    inbox.read_bool()  # ultimate
    if not all(other.startswith(store_prefix) for other in (deriver or store_prefix, *references)):
        raise DaemonProtocolError(f"references of {path}: one lies in another store directory")
    return PathInfo(
        store_path=path,
        nar_hash=nar_hash,
        nar_size=nar_size,
        references=tuple(sorted(reference[len(store_prefix) :] for reference in references)),
        deriver=deriver[len(store_prefix) :],
        sigs=tuple(sorted(inbox.read_words("signatures", MAX_REFERENCES))),
        ca=inbox.read_word("content address"),
    )


def _read_nar_hash(inbox: Inbox) -> str:
    text = inbox.read_word("NAR hash")
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        raise DaemonProtocolError("NAR hash: not base16") from None
    if len(text) != 64 or len(digest) != 32:
        raise DaemonProtocolError("NAR hash: not 32 bytes of base16")
    return sha256_text(digest)


@record(frozen=True, slots=True)
class BasicOutput:
    """An output as the columns of a .drv have it; the last two are "" for input-addressed outputs.

    Attributes:
        name: `out`, `dev`, ...
        path: Full store path, or "" when it is not known before the build.
        hash_algo: `sha256`, `r:sha256`, ... of a fixed output, else "".
        hash: The hash in base16 of a fixed output, else "".
    """

    name: str
    path: str
    hash_algo: str = ""
    hash: str = ""


@record(frozen=True, slots=True)
class BasicDerivation:
    """A build without its graph: what BuildDerivation needs, no .drv file involved.

    Attributes:
        outputs: The outputs, by name.
        inputs: Full paths that must be valid before the build: input sources and the chosen outputs of inputs.
        system: `x86_64-linux`, ...
        builder: Program to run.
        args: Its arguments.
        env: Its environment, `__json` of structured attributes included.
    """

    outputs: tuple[BasicOutput, ...]
    inputs: tuple[str, ...]
    system: str
    builder: bytes
    args: tuple[bytes, ...]
    env: tuple[tuple[bytes, bytes], ...]

    @classmethod
    def from_derivation(cls, derivation: Derivation, inputs: Iterable[str]) -> BasicDerivation:
        """Drop the graph from a derivation; `inputs` are its sources and the chosen outputs of its inputs."""
        return cls(
            outputs=tuple(BasicOutput(o.name, o.path, o.hash_algo, o.hash) for o in derivation.outputs),
            inputs=tuple(sorted(set(inputs))),
            system=derivation.system,
            builder=derivation.builder.encode(),
            args=derivation.args,
            env=derivation.env,
        )

    def encode(self, out: Encoder) -> None:
        """Write the derivation; outputs, inputs and environment sorted as Nix keeps them."""
        out.integer(len(self.outputs))
        for output in sorted(self.outputs, key=lambda o: o.name):
            out.string(output.name).string(output.path).string(output.hash_algo).string(output.hash)
        out.strings(sorted(self.inputs)).string(self.system).string(self.builder).strings(self.args)
        out.integer(len(self.env))
        for key, value in sorted(self.env):
            out.string(key).string(value)


class BuildMode(IntEnum):
    """Modes of BuildDerivation for outputs that are valid already."""

    NORMAL = 0
    REPAIR = 1
    CHECK = 2


class BuildStatus(IntEnum):
    """Ends of a build, by the numbers of the protocol."""

    BUILT = 0
    SUBSTITUTED = 1
    ALREADY_VALID = 2
    PERMANENT_FAILURE = 3
    INPUT_REJECTED = 4
    OUTPUT_REJECTED = 5
    TRANSIENT_FAILURE = 6
    CACHED_FAILURE = 7
    TIMED_OUT = 8
    MISC_FAILURE = 9
    DEPENDENCY_FAILED = 10
    LOG_LIMIT_EXCEEDED = 11
    NOT_DETERMINISTIC = 12
    RESOLVES_TO_ALREADY_VALID = 13
    NO_SUBSTITUTERS = 14
    HASH_MISMATCH = 15

    @property
    def is_success(self) -> bool:
        """True if the outputs are valid in the store now."""
        return self in _SUCCESSES


_SUCCESSES: Final = frozenset(
    {
        BuildStatus.BUILT,
        BuildStatus.SUBSTITUTED,
        BuildStatus.ALREADY_VALID,
        BuildStatus.RESOLVES_TO_ALREADY_VALID,
    }
)


@record(frozen=True, slots=True)
class BuildResult:
    """The daemon's verdict on one build.

    Attributes:
        status: How it ended. A number that is not in the table (a newer Nix) reads as MISC_FAILURE, with the number
            put before the message: no unknown code can look like a success.
        error_msg: Why it failed, without terminal escapes; "" on success. Through the daemon it holds the last log
            lines as well.
        times_built: How often the builder ran.
        start_time: Unix seconds; 0 when the builder never started.
        stop_time: Unix seconds; 0 as well when a limit ended the build.
        cpu_user_us: Microseconds of CPU time, None when the daemon does not say (before 1.37, or no cgroups).
        cpu_system_us: The same for time in the kernel.
        built_outputs: (output name, full store path) as far as the daemon names them.
    """

    status: BuildStatus
    error_msg: str
    times_built: int
    start_time: int
    stop_time: int
    cpu_user_us: int | None
    cpu_system_us: int | None
    built_outputs: tuple[tuple[str, str], ...]

    @classmethod
    def decode(cls, inbox: Inbox, version_minor: int, store_dir: str) -> BuildResult:
        """Read a result of protocol 1.<version_minor>, 29 or later."""
        code = inbox.read_int()
        message = plain_text(inbox.read_free_text("message of a build"))
        try:
            status = BuildStatus(code)
        except ValueError:
            status = BuildStatus.MISC_FAILURE
            message = f"unknown build status {code}: {message}"
        times_built = inbox.read_int()
        inbox.read_bool()  # isNonDeterministic stays 0 even for NOT_DETERMINISTIC
        start_time = inbox.read_int()
        stop_time = inbox.read_int()
        has_cpu_times = version_minor >= 37
        return cls(
            status=status,
            error_msg=message,
            times_built=times_built,
            start_time=start_time,
            stop_time=stop_time,
            cpu_user_us=_read_optional_int(inbox) if has_cpu_times else None,
            cpu_system_us=_read_optional_int(inbox) if has_cpu_times else None,
            built_outputs=_read_built_outputs(inbox, store_dir),
        )


def _read_optional_int(inbox: Inbox) -> int | None:
    match inbox.read_int():
        case 0:
            return None
        case 1:
            return inbox.read_int()
        case tag:
            raise DaemonProtocolError(f"CPU time: optional value with tag {tag}")


def _read_built_outputs(inbox: Inbox, store_dir: str) -> tuple[tuple[str, str], ...]:
    outputs = []
    for _ in range(inbox.read_count(MAX_OUTPUTS, "built outputs")):
        key = inbox.read_word("key of a built output")  # sha256:<hex>!<output name>
        document = inbox.read_word("built output")
        try:
            base_name = json.loads(document)["outPath"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DaemonProtocolError("built output: not a realisation") from None
        if not isinstance(base_name, str) or not _BASE_NAME.fullmatch(base_name):
            raise DaemonProtocolError("built output: its path is not the base name of a store path")
        outputs.append((key.rpartition("!")[2], f"{store_dir}/{base_name}"))
    return tuple(sorted(outputs))


@record(frozen=True, slots=True)
class Collected:
    """Report of a garbage collection.

    Attributes:
        paths: Full paths that were deleted, or that answer the question.
        freed_bytes: How much room that made.
    """

    paths: tuple[str, ...]
    freed_bytes: int


class GcAction(IntEnum):
    """Actions of CollectGarbage."""

    RETURN_LIVE = 0
    RETURN_DEAD = 1
    DELETE_DEAD = 2
    DELETE_SPECIFIC = 3
