"""Settings of tracked environments; `coordinator.config` has them among the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class EnvironmentSettings(BaseModel):
    """Tracked environments (`drover environments`): where they may come from, and how much of them is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Directories of this machine below which files may be tracked; none: no file may.
    directories: Annotated[tuple[Path, ...], Field(max_length=100)] = ()
    #: Hosts of git repositories that may be tracked, as `github.com` or `git.example.org:8443`; none: no repository
    #: may. Redirections are not followed.
    git_hosts: Annotated[tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(:[0-9]{1,5})?$")], ...],
                         Field(max_length=100)] = ()  # fmt: skip
    #: Schemes of those addresses. Plain http can be read and changed on its way.
    git_schemes: tuple[Literal["https", "http"], ...] = ("https",)
    #: Seconds for one look at a repository, its fetch included, and MiB that the fetch may bring.
    git_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    git_mib: Annotated[int, Field(ge=1)] = 256
    #: Seconds between two looks at a source, and between two at what cannot be fetched yet. A source that fails is
    #: looked at less and less often, hourly at last.
    poll_s: Annotated[float, Field(gt=0)] = 300.0
    assess_s: Annotated[float, Field(gt=0)] = 60.0
    #: Environments at one time.
    most: Annotated[int, Field(ge=1, le=10_000)] = 200
    #: Revisions of each that are remembered, and of these how many keep their paths in the cache, the newest ones.
    #: What `stable` is at, and was at before, is kept besides.
    revisions: Annotated[int, Field(ge=1, le=1000)] = 50
    kept_revisions: Annotated[int, Field(ge=1, le=1000)] = 3
    #: How long the coverage of each day is remembered.
    trend_days: Annotated[int, Field(ge=1, le=3660)] = 400

    @field_validator("directories", mode="after")
    @classmethod
    def _absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(Path(os.path.abspath(each.expanduser())) for each in value)  # noqa: PTH100 - resolve() would follow links
