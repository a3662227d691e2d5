"""Settings of sources; `coordinator.config` has them among the others."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class SourceSettings(BaseModel):
    """Ways by which fixed outputs (sources) come into the cache before a worker is sent to the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Whether a fixed output takes a content that is here under another name, instead of being fetched. A derivation
    #: whose name or address was changed and whose hash was forgotten then gets the old content without an error.
    across_names: bool = True
