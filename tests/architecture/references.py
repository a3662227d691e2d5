"""Pages of infra/docs and schemas in infra/deploy, printed from code: `./run docs` writes them, a test compares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from tests.architecture import chart_schema, deploy_schemas, metrics_reference, settings_reference, traces_reference

PAGES: Mapping[Path, Callable[[], str]] = MappingProxyType(
    {
        settings_reference.FILE: settings_reference.reference,
        metrics_reference.FILE: metrics_reference.reference,
        traces_reference.FILE: traces_reference.reference,
        deploy_schemas.FILE: deploy_schemas.text,
        chart_schema.FILE: chart_schema.text,
    }
)

if __name__ == "__main__":
    for file, text in PAGES.items():
        file.write_text(text())
        sys.stdout.write(f"{file.name} is written\n")
