"""View of the farm as a whole: how clients use it, and what it waits for at the moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Protocol

from coordinator.api.models import FarmView
from workers.wire.messages import FarmInfo


class Troubled(Protocol):
    """A part of the coordinator that may have to wait for something outside."""

    @property
    def trouble(self) -> str:
        """Reason that it waits at the moment, "" while all is well."""


def farm_view(info: FarmInfo, parts: Sequence[Troubled]) -> Callable[[], FarmView]:
    """Return a function that makes the view as of now."""
    version = metadata.version("drover")
    return lambda: FarmView(
        version=version,
        cache_url=info.cache_url,
        public_keys=info.public_keys,
        store_dir=info.store_dir,
        troubles=tuple(part.trouble for part in parts if part.trouble),
    )
