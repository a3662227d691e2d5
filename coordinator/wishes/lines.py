"""Lists of store paths, lists of derivations, and lines of nix-eval-jobs: one wish a line, in any mixture.

Neither a path nor a .drv says which system it is for: its list does. Lines of nix-eval-jobs say it themselves. Empty
lines and those that begin with `#` are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, ValidationError

from coordinator.wishes.checks import check_name, check_size, check_system, check_target
from coordinator.wishes.model import (
    MAX_INSTALLABLE,
    MAX_NAME,
    MAX_NOTES,
    MAX_OUTPUTS,
    MAX_PATH,
    MAX_SYSTEMS,
    SHOWN,
    Wish,
    WishedDerivation,
    WishedOutput,
    WishedPaths,
    WishList,
    WishListError,
    WishMark,
    WishSource,
    unique,
)
from infra.nix.errors import FormatError
from infra.nix.store_path import StoreDir, base_name_of, drv_name_of, hash_part_of
from infra.validation import first_fault

_Text = Annotated[str, Field(max_length=MAX_INSTALLABLE)]
_Path = Annotated[str, Field(max_length=MAX_PATH)]
#: Characters of a hash that tell two paths of one name apart.
_HASH_SHOWN: Final = 8
_CORRECT: Final = "give full store paths, .drv paths or what nix-eval-jobs prints, one a line"


class _ListedJob(BaseModel):
    """One line of nix-eval-jobs, as far as it is read."""

    attr: _Text
    drvPath: _Path = ""  # noqa: N815 - its name there
    system: _Text = ""
    name: _Text = ""
    outputs: Annotated[dict[str, _Path | None], Field(max_length=MAX_OUTPUTS)] = {}
    meta: dict[str, Any] | None = None
    error: str = ""


def read_lines(place: str, data: bytes, store_dir: StoreDir, system: str) -> WishList:
    """Return the wishes of a list, which `place` names; paths without a system are for `system`.

    Raises:
        WishListError: A line holds no wish.
    """
    check_size(place, data)
    reader = _LineReader(place, store_dir, system)
    named: dict[tuple[str, str], Wish] = {}
    wishes, repeats = unique(place, [_named_apart(wish, named) for wish in reader.wishes(data)])
    systems = tuple(dict.fromkeys(wish.system for wish in wishes)) or (system,)
    if len(systems) > MAX_SYSTEMS:
        raise WishListError(place, f"it is for more than {MAX_SYSTEMS} systems", "ask for some with --systems")
    source = WishSource.EVAL_JOBS if reader.jobs and not reader.paths else WishSource.PATHS
    return WishList(place, source, wishes, systems, notes=(*reader.notes, *repeats)[:MAX_NOTES])


def _named_apart(wish: Wish, named: dict[tuple[str, str], Wish]) -> Wish:
    """Return a wish; of several that only share a name, later ones get their hash's beginning beside it.

    Further outputs of one derivation are named after it.
    """
    if named.setdefault(wish.key, wish) == wish:
        return wish
    match wish.target:
        case WishedDerivation(path, outputs):
            suffixes = [f" ({hash_part_of(path)[:_HASH_SHOWN]}){more}" for more in ("", f"^{','.join(outputs)}")]
        case WishedPaths(outputs=(WishedOutput(path=path),)):
            suffixes = [f" ({hash_part_of(path)[:_HASH_SHOWN]})"]
        case _:
            suffixes = []
    found = wish
    for suffix in suffixes:
        found = replace(wish, name=f"{wish.name}{suffix}"[:MAX_NAME])
        if named.setdefault(found.key, found) == found:
            break
    return found


class _LineReader:
    """Reads the lines of one list."""

    def __init__(self, place: str, store_dir: StoreDir, system: str) -> None:
        self._place = place
        self._store_dir = store_dir
        self._system = system
        #: Lines of nix-eval-jobs, and paths.
        self.jobs = 0
        self.paths = 0
        self.notes: list[str] = []

    def wishes(self, data: bytes) -> Iterator[Wish]:
        seen: set[str] = set()
        for number, line in enumerate(data.splitlines(), 1):
            text = line.decode(errors="replace").strip()
            if not text or text.startswith("#"):
                continue
            here = f"{self._place} at line {number}"
            if text.startswith("{"):
                self.jobs += 1
                job = _job(here, text)
                if job.drvPath:
                    yield self._job_wish(here, job)
                else:
                    self._note(f"{here}: {job.attr[:SHOWN] or 'an attribute'} could not be evaluated")
            elif text in seen:
                self._note(f"{here}: {base_name_of(text)[:SHOWN]} is there twice; it counts once")
            else:
                self.paths += 1
                seen.add(text)
                yield self._path_wish(here, text)

    def _note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text)

    def _path_wish(self, place: str, text: str) -> Wish:
        path, separator, names = text.partition("!" if "!" in text else "^")
        try:
            parsed = self._store_dir.parse(path)
        except FormatError as error:
            way = f"give paths directly below {self._store_dir.path}" if path.startswith("/") else _CORRECT
            raise WishListError(place, f"{text[:SHOWN]!r} is no store path ({error.message})", way) from None
        if parsed.is_derivation:
            wanted = tuple(dict.fromkeys(name for name in names.split(",") if name not in {"", "*"}))
            if len(wanted) > MAX_OUTPUTS:
                raise WishListError(place, f"it wants more than {MAX_OUTPUTS} outputs", "want fewer")
            for name in wanted:
                check_name(place, name)
            return Wish(drv_name_of(path), self._system, WishedDerivation(path, wanted))
        if separator:
            raise WishListError(place, f"{text[:SHOWN]!r} has outputs and is no .drv", _CORRECT)
        return Wish(parsed.name, self._system, WishedPaths((WishedOutput("out", path),)))

    def _job_wish(self, place: str, job: _ListedJob) -> Wish:
        name, system = job.attr or job.name or drv_name_of(job.drvPath), job.system or self._system
        check_name(place, name)
        check_system(place, name, system)
        paths = [WishedOutput(output, path) for output, path in job.outputs.items() if path]
        # A path that is known after the build alone is null there.
        known = bool(paths) and len(paths) == len(job.outputs)
        target = WishedPaths(tuple(paths), job.drvPath) if known else WishedDerivation(job.drvPath, tuple(job.outputs))
        check_target(place, name, target, self._store_dir)
        return Wish(name, system, target, marks=marks_of(job.meta or {}))


def _job(place: str, text: str) -> _ListedJob:
    try:
        return _ListedJob.model_validate_json(text)
    except ValidationError as error:
        fault = first_fault(error)
        at = f" at {fault.place[:SHOWN]}" if fault.place else ""
        raise WishListError(
            f"{place}{at}", f"it is no line of nix-eval-jobs ({fault.message[:SHOWN]})", _CORRECT
        ) from None


def marks_of(meta: dict[str, Any]) -> frozenset[WishMark]:
    """Return what a derivation's `meta` says against it."""
    return frozenset(mark for mark in WishMark if meta.get(mark.value) is True)
