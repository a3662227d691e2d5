"""The memory of a bisection in a file: what was evaluated and built, so that the same command goes on after an end."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from coordinator.api.root_limits import RootLimits
from coordinator.bisect.errors import BisectError
from coordinator.bisect.verdicts import Outcome
from coordinator.evaluation.model import EvaluatedRoot

FORMAT: Final = 1
_DIRECTORY: Final = "drover-bisect-"
#: Lines and results of a hundred thousand commits.
MAX_BYTES: Final = 64 * 1024 * 1024


class Arguments(BaseModel):
    """Arguments that make two bisections the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    good: str
    bad: str
    file: str
    attr: str
    until: str
    factor: float
    system: str
    flags: tuple[str, ...]


class Evaluated(BaseModel):
    """Result of an evaluation: a derivation, or an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drv: str = ""
    attr: str = ""
    outputs: tuple[str, ...] = ()
    limits: RootLimits | None = None
    error: str = ""

    @classmethod
    def of(cls, found: EvaluatedRoot | str) -> Evaluated:
        """Return it for a root, or for the sentence of an error."""
        if isinstance(found, str):
            return cls(error=found)
        return cls(drv=found.drv, attr=found.attr, outputs=found.outputs, limits=found.limits)

    @property
    def root(self) -> EvaluatedRoot:
        """The root of what could be evaluated."""
        return EvaluatedRoot(self.attr, self.drv, self.outputs, self.limits)


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    arguments: Arguments
    #: Directory in which an earlier run had files of commits.
    files: str = ""
    #: By revision.
    evaluated: dict[str, Evaluated] = {}
    #: By derivation.
    outcomes: dict[str, Outcome] = {}


class Memory:
    """Knowledge of one bisection, kept in a file. Make it with `opened`."""

    def __init__(self, path: Path, content: _Content) -> None:
        self._path = path
        self._content = content
        #: It was there: the bisection goes on.
        self.is_old = bool(content.evaluated)

    @property
    def evaluated(self) -> Mapping[str, Evaluated]:
        """Evaluations by revision."""
        return self._content.evaluated

    @property
    def outcomes(self) -> Mapping[str, Outcome]:
        """Outcomes that last, by derivation."""
        return self._content.outcomes

    def evaluate(self, revision: str, found: Evaluated) -> None:
        """Keep an evaluation."""
        self._content.evaluated[revision] = found
        self._write()

    def settle(self, drv: str, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._content.outcomes[drv] = outcome
        self._write()

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """Make a private directory for the files of commits; it is removed at the end, or by the next run."""
        left = Path(self._content.files) if self._content.files else None
        if left is not None and left.name.startswith(_DIRECTORY) and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=_DIRECTORY)).resolve()
        try:
            self._content.files = str(made)
            self._write()
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def forget(self) -> None:
        """Remove the file: the bisection has its answer."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        part = self._path.with_name(f"{self._path.name}.part")
        try:
            part.write_text(self._content.model_dump_json())
            part.replace(self._path)
        except OSError as error:
            raise BisectError(f"cannot write {self._path}: {error.strerror}; name another file with --state") from None


@contextmanager
def opened(path: Path, arguments: Arguments, *, restart: bool) -> Iterator[Memory]:
    """Open the memory of a bisection, for this process alone.

    Raises:
        BisectError: It is that of another bisection, in use, or cannot be read.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise BisectError(f"cannot write {lock}: {error.strerror}; name another file with --state") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BisectError(f"another drover bisect uses {path}; wait for it, or name another --state") from None
        if restart:
            path.unlink(missing_ok=True)
        yield Memory(path, _read(path, arguments))
    finally:
        with suppress(OSError):
            if not path.exists():
                lock.unlink()
        os.close(descriptor)


def _read(path: Path, arguments: Arguments) -> _Content:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BisectError(f"{path} is too large for the state of a bisection; --restart begins anew")
        content = _Content.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Content(arguments=arguments)
    except OSError as error:
        raise BisectError(f"cannot read {path}: {error.strerror}; name another file with --state") from None
    except ValidationError:
        raise BisectError(f"{path} is not the state of a bisection of this drover; --restart begins anew") from None
    if content.format != FORMAT:
        raise BisectError(f"{path} was written by another version of drover; --restart begins anew")
    before = content.arguments
    if before != arguments:
        names = [name for name in Arguments.model_fields if getattr(before, name) != getattr(arguments, name)]
        raise BisectError(
            f"{path} is of another bisection, of {before.attr or before.file} from {before.good[:12]} to "
            f"{before.bad[:12]} until {before.until} (other: {', '.join(names)}); repeat that one, or --restart"
        )
    return content
