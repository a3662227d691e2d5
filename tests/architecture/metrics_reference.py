"""Reference of all metrics, printed from their table: `./run docs` writes infra/docs/metrics.md."""

from __future__ import annotations

from pathlib import Path

from coordinator.observability.metric_table import METRICS

FILE = Path(__file__).resolve().parents[2] / "infra" / "docs" / "metrics.md"
PREFACE = """\
# Metrics

<!-- Printed from coordinator/observability/metric_table.py by `./run docs`; a test compares. Change it there. -->

`GET /metrics`, without a token, gives these in Prometheus' text format. Counters begin at 0 with each start of the
coordinator. A histogram `NAME` has the series `NAME_bucket`, `NAME_sum` and `NAME_count`, and appears with its first
value. A figure that a worker's machine does not give is absent.

`infra/deploy/prometheus/drover.rules.yml` has alerts, `infra/deploy/grafana/drover.json` a dashboard. For Prometheus:

```yaml
rule_files: [drover.rules.yml]
scrape_configs:
  - job_name: drover
    static_configs: [{targets: ["farm.example.org:7878"]}]
```

"""


def reference() -> str:
    """Return the whole page."""
    lines = ["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.exposed}` | {metric.kind} | {labels} | {metric.meaning} |")
    return PREFACE + "\n".join(lines) + "\n"
