"""Settings of sources; `coordinator.config` has them among the others."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class SourceSettings(BaseModel):
    """Ways by which fixed outputs (sources) come into the cache before a worker is sent to the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Whether a fixed output takes a content that is here under another name, instead of being fetched. A derivation
    #: whose name or address was changed and whose hash was forgotten then gets the old content without an error.
    across_names: bool = True
    #: Mirrors in the layout of Nix' `hashed-mirrors`, `URL/sha256/HASH`, for plain files. They are not trusted.
    mirrors: Annotated[tuple[Annotated[str, Field(pattern=r"^https?://[^\s]+$")], ...], Field(max_length=16)] = ()
    #: Whether the upstreams of the cache at `/cache` are asked for fixed outputs too.
    upstreams: bool = True
    #: Fixed outputs that are looked for at one time, and MiB of the largest that is taken from a mirror.
    at_once: Annotated[int, Field(ge=1, le=64)] = 4
    max_mib: Annotated[int, Field(ge=1)] = 8192
