"""Reference of all settings, printed from the models that check them: `./run docs` writes infra/docs/settings.md.

The meaning of a setting is the `#:` comment above it in the model; settings without one share the comment before them.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from coordinator.config import (
    CacheSettings,
    LimitSettings,
    NamedCacheSettings,
    Settings,
    UpstreamSettings,
    WorkerConfig,
)
from coordinator.demand_settings import DemandSettings
from coordinator.remote_settings import RemoteEvaluationSettings
from coordinator.source_settings import SourceSettings

FILE = Path(__file__).resolve().parents[2] / "infra" / "docs" / "settings.md"
#: Heading, what stands before its table, model.
SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("The farm", "At the top of the file.", Settings),
    ("`[limits]`", "Bounds on what one client, one build or the whole farm may cost.", LimitSettings),
    ("`[cache]`", "The cache at `/cache`, which the farm publishes to.", CacheSettings),
    ("`[[caches]]`", "Further caches, at `/cache/NAME`: all of `[cache]`, and:", NamedCacheSettings),
    (
        "`[remote_evaluation]`",
        "Evaluation on the coordinator's machine ([guide](remote_evaluation.md)).",
        RemoteEvaluationSettings,
    ),
    ("`[demand]`", "What people wait for ([guide](demand.md)).", DemandSettings),
    ("`[sources]`", "Fixed outputs before a worker is sent to the network ([guide](sources.md)).", SourceSettings),
    ("`[[cache.upstreams]]`, `[[caches.upstreams]]`", "Caches that a cache trusts.", UpstreamSettings),
    ("`[[workers]]`", "Workers that `drover up` starts on this machine.", WorkerConfig),
)
#: Numbers from here on are written in groups of three digits, which TOML reads too.
_GROUPED = 10_000
_KINDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    dict: "table of texts",
}
PREFACE = """\
# Settings

<!-- Printed from the models in coordinator/config.py by `./run docs`; a test compares. Change it there. -->

`drover up --config FILE` reads TOML. Each setting of the farm is an environment variable too: `DROVER_PORT`,
`DROVER_LIMITS__GRAPH_SIZE`. Arguments win over the environment, the environment over the file, the file over the
defaults. An unknown name is an error.
"""


@dataclass
class Row:
    """Settings that one comment explains."""

    meaning: str
    names: list[str] = field(default_factory=list)


def reference() -> str:
    """Return the whole page."""
    parts = [PREFACE]
    for heading, intro, model in SECTIONS:
        head = "| setting | value | default | meaning |\n|---|---|---|---|\n"
        parts.append(f"## {heading}\n\n{intro}\n\n{head}{_table(model)}")
    return "\n".join(parts)


def _table(model: type[BaseModel]) -> str:
    lines = []
    for row in rows(model):
        fields = [model.model_fields[name] for name in row.names]
        cells = [
            ", ".join(f"`{name}`" for name in row.names),
            ", ".join(dict.fromkeys(_kind(each.annotation) for each in fields)),
            ", ".join(filter(None, dict.fromkeys(_default(each) for each in fields))),
            row.meaning,
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(lines)


def rows(model: type[BaseModel]) -> Iterator[Row]:
    """Yield the settings of one model in order, each with its comment. A first setting without one is an error."""
    source = textwrap.dedent(inspect.getsource(model)).splitlines()
    body = ast.parse("\n".join(source)).body[0]
    assert isinstance(body, ast.ClassDef)
    row: Row | None = None
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if meaning := _comment_above(source, node.lineno - 1):
            if row is not None:
                yield row
            row = Row(meaning)
        if row is None:
            msg = f"{model.__name__}.{node.target.id} has no `#:` comment"
            raise ValueError(msg)
        row.names.append(node.target.id)
    if row is not None:
        yield row


def _comment_above(source: list[str], line: int) -> str:
    words: list[str] = []
    while line > 0 and (text := source[line - 1].strip()).startswith("#:"):
        words.insert(0, text.removeprefix("#:").strip())
        line -= 1
    return " ".join(words)


def _kind(annotation: Any) -> str:
    """Return what a value looks like, in the words of TOML."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin in {Union, UnionType}:
        return _kind(next(one for one in get_args(annotation) if one is not type(None)))
    if origin is tuple:
        inner = get_args(annotation)[0]
        return "tables" if _is(inner, BaseModel) else f"list of {_kind(inner)}s"
    if origin is Literal or _is(annotation, Enum):
        words = get_args(annotation) or [one.value for one in annotation]
        return " or ".join(f'`"{word}"`' for word in words)
    return "table" if _is(annotation, BaseModel) else _KINDS[origin or annotation]


def _is(annotation: Any, base: type) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, base)


def _default(setting: FieldInfo) -> str:
    if setting.is_required():
        return "required"
    value = setting.default
    if value is PydanticUndefined or isinstance(value, BaseModel) or value is None or value in ("", ()):
        return ""
    number = isinstance(value, int) and not isinstance(value, bool) and value >= _GROUPED
    return f"`{value:_}`" if number else f"`{json.dumps(value)}`"
