"""The closure of derivations in the client's store: .drv files, and the input sources with their references.

Everything here reads; what is sent is read again when its turn comes, so that memory stays flat.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from coordinator.errors import CoordinatorError
from infra.dependency_order import CycleError, inputs_first
from infra.nix.errors import FormatError, NixError
from infra.nix.path_info import PathInfo
from infra.records import record

if TYPE_CHECKING:
    from coordinator.api.sent_streams import SourceHeader
    from infra.nix.drv_head import DrvHead

#: Content addresses by which `infra.nix.ca` verifies a source.
VERIFIABLE = ("text:sha256:", "fixed:r:sha256:", "fixed:sha256:")


class ClosureError(CoordinatorError):
    """The local store does not hold what it should, or cannot be read."""

    code: ClassVar[str] = "closure"


#: Bytes of a file that one call reads: nearly all .drv files are smaller.
_READ_BYTES: Final = 64 * 1024


@record(frozen=True, slots=True)
class LocalStore:
    """A Nix store on this machine; with a `root`, the store directory lies physically below it."""

    store_dir: str = "/nix/store"
    root: str = ""

    @property
    def flags(self) -> tuple[str, ...]:
        """Arguments that make a Nix command use this store."""
        return ("--store", self.root) if self.root else ()

    def physical(self, path: str) -> str:
        """Return where the store path lies in the file system."""
        return f"{self.root.rstrip('/')}{path}" if self.root else path

    def has(self, path: str) -> bool:
        """Return whether the store path is there as a file."""
        return os.path.lexists(self.physical(path))

    def read(self, drv: str) -> bytes:
        """Return the bytes of a .drv.

        Raises:
            ClosureError: It is not there or cannot be read.
        """
        try:
            return _content(self.physical(drv))
        except FileNotFoundError:
            raise ClosureError(f"{drv} is not in the local store{self._named}; evaluate the file again") from None
        except OSError as error:
            raise ClosureError(f"cannot read {drv}: {error.strerror}") from None

    def head(self, drv: str) -> DrvHead:
        """Return what a .drv makes and what it is made from.

        Raises:
            ClosureError: It is not there, cannot be read, or is no derivation.
        """
        from infra.nix.drv_head import read_head  # noqa: PLC0415 - slow to import, and a push reads no derivation

        try:
            return read_head(self.read(drv))
        except FormatError as error:
            raise ClosureError(f"{drv} is not a derivation: {error}") from None

    def dump(self, path: str, *, case_hack: bool = False) -> Iterator[bytes]:
        """Yield the NAR of a store path.

        Raises:
            ClosureError: It cannot be read, or no NAR can hold it.
        """
        from infra.nar_files import dump  # noqa: PLC0415 - slow to import, and most builds send no source

        try:
            yield from dump(self.physical(path), case_hack=case_hack)
        except OSError as error:
            raise ClosureError(f"{path} cannot be read: {error.strerror}") from None
        except NixError as error:
            raise ClosureError(f"{path} cannot be sent: {error}") from None

    @property
    def _named(self) -> str:
        return f" {self.root}" if self.root else ""


@record(frozen=True, slots=True)
class Closure:
    """Full store paths: .drv files by layer, inputs first; input sources that they name, sorted; outputs they make."""

    derivations: tuple[str, ...]
    sources: tuple[str, ...]
    outputs: frozenset[str] = frozenset()


@record(frozen=True, slots=True)
class Sources:
    """Input sources with what they refer to."""

    #: Those that the farm can verify by their content, references first.
    headers: tuple[SourceHeader, ...]
    #: Full paths of the others, which something built, and their derivers ("" where the store knows none).
    built: Mapping[str, str]


def read_closure(store: LocalStore, roots: Sequence[str], known: Collection[str] = frozenset()) -> Closure:
    """Read the .drv files below `roots`, but for those that are `known` and what is below these.

    Raises:
        ClosureError: A member is missing, is no derivation, or the graph has a cycle; the sentence names the member.
    """
    return closure_of(roots, lambda drv: None if drv in known else store.head(drv))


def closure_of(roots: Sequence[str], head_of: Callable[[str], DrvHead | None]) -> Closure:
    """Return the closure of `roots` by the heads of its members; it ends where there is none.

    Raises:
        ClosureError: The graph has a cycle, and whatever `head_of` raises.
    """
    needs: dict[str, tuple[str, ...]] = {}
    sources: set[str] = set()
    outputs: set[str] = set()

    def inputs(drv: str) -> tuple[str, ...]:
        head = head_of(drv)
        if head is None:
            return ()
        needs[drv] = head.input_drvs
        sources.update(head.input_srcs)
        outputs.update(head.outputs)
        return head.input_drvs

    try:
        order = inputs_first(roots, inputs)
    except CycleError as error:
        raise ClosureError(f"{error.first} needs itself; the local store is damaged") from None
    return Closure(tuple(_layered(order, needs)), tuple(sorted(sources)), frozenset(outputs))


def _layered(order: Iterable[str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return those members that have needs, by layer: each stands on the layers before, so a layer is verified at once.

    `order` has inputs first.
    """
    layers: dict[str, int] = {}
    for drv in order:
        if drv in needs:
            layers[drv] = 1 + max([layers[need] for need in needs[drv] if need in layers], default=0)
    return sorted(layers, key=layers.__getitem__)


def _content(path: str) -> bytes:
    """Return the content of a file. Hot: closures have thousands of small ones."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(file, _READ_BYTES)
        if len(data) < _READ_BYTES:
            return data
        pieces = [data]
        while piece := os.read(file, _READ_BYTES):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(file)


def find_maker(store: LocalStore, path: str, deriver: str, trouble: str = "") -> str:
    """Return the derivation that the farm must build to have `path`, a built path.

    `trouble` says why the farm did not have it from an upstream, "" where all of them answered.

    Raises:
        ClosureError: The local store does not have it whole; the sentence says what to do.
    """
    try:
        if deriver and path in read_closure(store, [deriver]).outputs:
            return deriver
    except ClosureError:
        # Its derivation, or one below it, is collected.
        pass
    raise ClosureError(
        f"the input {path} was built before and not by this evaluation; {_nowhere(trouble)} and the "
        f"local store does not know how it is built: run `drover cache push {path}`"
    )


def refuse_lost_references(
    store: LocalStore, headers: Iterable[SourceHeader], lacking: Collection[str], trouble: str = ""
) -> None:
    """Refuse sources that refer to built paths which the farm lacks (`lacking`, base names).

    A source is published before anything is built, and only with all that it refers to.

    Raises:
        ClosureError: There is one; the sentence says what to do.
    """
    for header in headers:
        for reference in header.references:
            if reference in lacking:
                path = f"{store.store_dir}/{reference}"
                raise ClosureError(
                    f"the source {header.path} refers to {path}, which was built before; {_nowhere(trouble)}, "
                    f"and sources are sent before anything is built: run `drover cache push {path}`"
                )


def _nowhere(trouble: str) -> str:
    return f"the farm's cache does not have it{f' ({trouble})' if trouble else ''}"


async def query_closure(
    store: LocalStore,
    paths: Iterable[str],
    lacking: Callable[[str], CoordinatorError],
    *,
    follow: Callable[[PathInfo], bool] = lambda _: True,
    env: Mapping[str, str] | None = None,
) -> dict[str, PathInfo]:
    """Return what the store's daemon knows of `paths` and, behind those that `follow` accepts, of their references.

    Raises:
        ClosureError: The store does not answer.
        CoordinatorError: A path is not valid in the store; `lacking` makes the error.
    """
    from infra.daemon import DaemonError, open_questions  # noqa: PLC0415 - slow to import, and most builds ask nothing

    infos: dict[str, PathInfo] = {}
    waiting = dict.fromkeys(paths)
    command = ("nix-daemon", "--stdio", *store.flags)
    try:
        async with await open_questions(command, os.environ if env is None else env) as connection:
            while waiting:
                asked, waiting = waiting, {}
                for path, info in zip(asked, await connection.query_path_infos(list(asked)), strict=True):
                    if info is None:
                        raise lacking(path)
                    infos[path] = info
                    if follow(info):
                        waiting.update(dict.fromkeys(info.reference_paths))
                waiting = {path: None for path in waiting if path not in infos}
    except DaemonError as error:
        raise ClosureError(f"cannot ask the local Nix store: {error}") from None
    return infos


async def describe_sources(store: LocalStore, paths: Sequence[str], env: Mapping[str, str] | None = None) -> Sources:
    """Return what the local store knows of `paths` and of everything they refer to.

    What a built path refers to is left to who builds it.

    Raises:
        ClosureError: A path is not valid in the store, or the store does not answer.
    """
    from coordinator.api.sent_streams import SourceHeader  # noqa: PLC0415 - slow to import, and a push describes no source

    if not paths:
        return Sources((), {})
    infos = await query_closure(store, paths, _lost_source, follow=_is_verifiable, env=env)
    sources = {path: info for path, info in infos.items() if _is_verifiable(info)}
    built = {path: info.deriver_path for path, info in infos.items() if path not in sources}
    try:
        order = inputs_first(sorted(sources), lambda path: sources[path].reference_paths if path in sources else ())
    except CycleError as error:
        raise ClosureError(f"the source {error.first} refers to itself; the local store is damaged") from None
    return Sources(tuple(SourceHeader.of(sources[path]) for path in order if path in sources), built)


def _lost_source(path: str) -> ClosureError:
    return ClosureError(f"the source {path} is not in the local store; evaluate the file again")


def _is_verifiable(info: PathInfo) -> bool:
    """Return whether the farm can derive the path from the content."""
    return info.ca.startswith(VERIFIABLE) and info.base_name not in info.references


def local_store(directory: str | None, drv: str = "") -> LocalStore:
    """Return the store of `--store DIR` (the machine's own without it); `drv` gives the store directory.

    Raises:
        ClosureError: It is a store of another kind than a directory.
    """
    store_dir = drv.rpartition("/")[0] or "/nix/store"
    if not directory:
        return LocalStore(store_dir)
    if "://" in directory or "?" in directory:
        raise ClosureError(f"--store wants a directory, not {directory}; evaluate on this machine")
    return LocalStore(store_dir, str(Path(directory).absolute()))
