"""JSON Schema of the chart's values, with drover's own settings: `./run docs` prints it, a test compares."""

from __future__ import annotations

import json
from typing import Any, Final

from tests.architecture import deploy_schemas

FILE: Final = deploy_schemas.DEPLOY / "kubernetes" / "drover" / "values.schema.json"
_TEXT: Final = {"type": "string"}
_NAME: Final = {"type": "string", "pattern": "^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$"}
_SIZE: Final = {"type": "string", "pattern": "^[1-9][0-9]*(Mi|Gi|Ti)$"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_DIGEST: Final = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
_ANY: Final = {"type": "object"}


def _table(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def text() -> str:
    """Return the file's text."""
    settings = deploy_schemas.schema()
    definitions = settings.pop("$defs")
    group = _table(
        system={"type": "string", "pattern": "^[a-z0-9_]+-[a-z]+$"},
        size=_NAME,
        replicas=_COUNT,
        minReplicas=_COUNT,
        maxReplicas=_COUNT,
        slots={"type": "integer", "minimum": 0, "maximum": 1024},
        features={"type": "array", "items": _TEXT},
        sandbox={"enum": ["user-namespace", "privileged"]},
        tun=_TEXT,
        stopGraceSeconds=_COUNT,
        store=_SIZE,
        storageClassName=_NAME,
        nodeSelector=_ANY,
        tolerations={"type": "array", "items": _ANY},
        resources=_ANY,
    )
    values = _table(
        image=_table(
            repository=_TEXT,
            tag=_TEXT,
            digests=_table(coordinator=_DIGEST, worker=_DIGEST),
            pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        ),
        secretName=_NAME,
        publicUrl={"type": "string", "pattern": "^(https?://.+)?$"},
        settings=settings,
        database=_table(secretName=_NAME, key=_TEXT),
        objectStore=_table(url={"type": "string", "pattern": "^((s3|gs|az)://.+)?$"}, secretName=_NAME),
        serviceAccount=_table(annotations=_ANY),
        coordinator=_table(
            replicas={"type": "integer", "minimum": 1, "maximum": 2},
            storage=_SIZE,
            storageClassName=_NAME,
            resources=_ANY,
        ),
        head=_table(storage=_SIZE, storageClassName=_NAME, resources=_ANY),
        workers={"type": "object", "additionalProperties": group},
        workerDefaults=group,
        networkPolicy=_table(enabled={"type": "boolean"}, clients={"type": "array", "items": _ANY}),
        monitoring=_table(enabled={"type": "boolean"}, interval=_TEXT),
    )
    # Helm's own for charts that are part of others.
    values["properties"]["global"] = _ANY
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions, **values}
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
