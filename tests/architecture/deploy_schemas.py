"""JSON Schemas of the settings for those who set a farm up by code: `./run docs` prints them, a test compares.

The NixOS module makes its options from one, and Helm checks the chart's values with another, so neither names a
setting itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from coordinator.config import CacheSettings, NamedCacheSettings, OwnerSettings, Settings
from coordinator.environment_settings import EnvironmentSettings
from tests.architecture.settings_reference import SECTIONS, rows

DEPLOY: Final = Path(__file__).resolve().parents[2] / "infra" / "deploy"
FILE: Final = DEPLOY / "settings.schema.json"
#: What a schema says that a reader of options has no use for: names of classes, and pydantic's own titles.
_UNUSED: Final = ("title",)


def schema() -> dict[str, Any]:
    """Return the schema of a settings file, each setting with the text of its comment."""
    whole: dict[str, Any] = _plain(Settings.model_json_schema())
    models: list[type[BaseModel]] = [EnvironmentSettings, OwnerSettings, *(model for _, _, model in SECTIONS)]
    for model in models:
        _describe(model, whole["properties"] if model is Settings else whole["$defs"][model.__name__]["properties"])
    _describe(CacheSettings, whole["$defs"][NamedCacheSettings.__name__]["properties"])
    return whole


def _describe(model: type[BaseModel], properties: dict[str, Any]) -> None:
    for row in rows(model):
        for name in row.names:
            properties[name]["description"] = row.meaning


def text() -> str:
    """Return the file's text."""
    return json.dumps(schema(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _plain(node: Any, *, names: bool = False) -> Any:
    """A copy without what is unused; below `names`, keys are names of settings and none is left out."""
    if isinstance(node, dict):
        inner = {"properties", "$defs"}
        return {
            key: _plain(value, names=key in inner and not names)
            for key, value in node.items()
            if names or key not in _UNUSED
        }
    return [_plain(one) for one in node] if isinstance(node, list) else node
