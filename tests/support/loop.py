"""Stalls of a running coordinator's event loop, read from its `/metrics` (see `infra.loop_watch`)."""

from __future__ import annotations

import re
import urllib.request
from typing import Self

from tests.support.patience import PATIENCE_S

_BUCKET = re.compile(r'^drover_loop_stall_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)


def _buckets(url: str) -> dict[float, int]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE_S) as answer:
        return {float(bound): int(float(count)) for bound, count in _BUCKET.findall(answer.read().decode())}


class LoopStalls:
    """Slices of processor time for which the loop of the coordinator at `url` was held during the block."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._before: dict[float, int] = {}
        self._after: dict[float, int] = {}

    def __enter__(self) -> Self:
        self._before = _buckets(self._url)
        return self

    def __exit__(self, *_: object) -> None:
        self._after = _buckets(self._url)

    def over(self, bound_s: float) -> int:
        """Number of slices longer than `bound_s`, one of `infra.telemetry.SECONDS`; 0 before the first stall."""

        def count(buckets: dict[float, int]) -> int:
            return buckets[float("inf")] - buckets[bound_s] if buckets else 0

        return count(self._after) - count(self._before)
