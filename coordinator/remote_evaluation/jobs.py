"""Jobs of programs in a sandbox, and what they answer, as bounded models: both sides check what they read."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field

from coordinator.api.requests import RootRequest

#: Characters that are kept of a failed attribute's message.
MAX_MESSAGE = 16 * 1024
#: Failed attributes, or roots, of one frame.
AT_ONCE = 500

_Short = Annotated[str, Field(max_length=1024)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EvaluationJob(_Model):
    """An evaluation: `file` of the tree (or `expression`), as `coordinator.evaluation.inputs.Inputs` has it."""

    file: str = ""
    expression: str = ""
    directory: str = ""
    attrs: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    #: `--arg` and `--argstr` words.
    flags: tuple[str, ...] = ()
    evaluators: int
    memory_bytes: int
    timeout_s: float
    #: Bytes and entries of the tree at most.
    tree_bytes: int
    tree_entries: int
    #: Prefixes of addresses that may be fetched.
    allowed_uris: tuple[str, ...] = ()


class GitJob(_Model):
    """One revision of a git repository, to be sent as a tree."""

    url: str
    rev: str
    tree_bytes: int
    tree_entries: int


class MissingNames(_Model):
    """The part of a query that must be sent."""

    derivations: tuple[str, ...]
    sources: tuple[str, ...]


class FailedJobAttr(_Model):
    """An attribute that could not be evaluated."""

    attr: _Short
    error: _Short
    text: Annotated[str, Field(max_length=MAX_MESSAGE)] = ""
    position: _Short = ""


class FailedAttrs(_Model):
    """Some of those that failed."""

    failed: Annotated[tuple[FailedJobAttr, ...], Field(max_length=AT_ONCE), FailFast()]


class FoundRoots(_Model):
    """Some of the roots; their derivations and sources have been sent."""

    roots: Annotated[tuple[RootRequest, ...], Field(min_length=1, max_length=AT_ONCE), FailFast()]
