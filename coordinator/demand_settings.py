"""Settings of demand; `coordinator.config` has them among the others."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class DemandAction(StrEnum):
    """Consequences of paths that people wait for."""

    #: Nothing is counted.
    OFF = "off"
    #: They are shown.
    SHOW = "show"
    #: A submission that is to build one goes before others of its owner.
    PRIORITY = "priority"
    #: So it does, and what no submission wants is built where a submitter once sent its derivation.
    BUILD = "build"


class DemandSettings(BaseModel):
    """Paths that clients of the cache at `/cache` asked for and did not get."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: What follows from them: nothing and no counting, a list, a higher priority of the submission that is to build
    #: one, or builds beside that. Readers of a public cache are strangers: see the other settings for what they can
    #: cause.
    action: DemandAction = DemandAction.SHOW
    #: How many people must have asked for a path, roughly (addresses within a day), before anything follows.
    people: Annotated[int, Field(ge=1, le=1000)] = 2
    #: Submissions that may begin for paths in an hour, or gain priority; each is of one path, at the lowest priority
    #: and a tenth of the weight of an owner of weight 1.
    per_hour: Annotated[int, Field(ge=1, le=1000)] = 10
    #: Hours before a path for which something was done counts again.
    again_after_hours: Annotated[float, Field(gt=0)] = 24.0
