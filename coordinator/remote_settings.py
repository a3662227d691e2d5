"""Settings of remote evaluation; `coordinator.config` has them among the others."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class RemoteEvaluationSettings(BaseModel):
    """Evaluation on the coordinator's machine (`drover build --remote`), in a sandbox. Off unless it is switched on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Whether holders of the API token may evaluate here. It wants Linux, and root or user namespaces.
    enabled: bool = False
    #: Hosts from which evaluations may fetch git repositories and archives, as `github.com` or `git.example.org:8443`;
    #: none: nothing is fetched. A redirection to another host wants that one here too (`codeload.github.com`).
    allowed_hosts: Annotated[tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(:[0-9]{1,5})?$")], ...],
                             Field(max_length=100)] = ()  # fmt: skip
    #: Schemes of those addresses. Plain http can be read and changed on its way.
    allowed_schemes: tuple[Literal["https", "http"], ...] = ("https",)
    #: Networks that an allowed host may mean although they are private, local or reserved.
    network_allow: tuple[str, ...] = ()
    #: Evaluations at one time, and how many more may wait.
    at_once: Annotated[int, Field(ge=1, le=64)] = 1
    waiting: Annotated[int, Field(ge=0, le=1000)] = 16
    #: Evaluators of one evaluation, side by side.
    evaluators: Annotated[int, Field(ge=1, le=64)] = 2
    #: MiB of memory of one evaluation, and of what it writes: its store and its unpacked tree lie in memory too.
    memory_mib: Annotated[int, Field(ge=512)] = 4096
    scratch_mib: Annotated[int, Field(ge=64)] = 2048
    #: Seconds for one evaluation; as many for the git revision before it.
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    #: MiB of one tree, its files and directories, and MiB of all trees that are kept compressed.
    tree_mib: Annotated[int, Field(ge=1)] = 512
    tree_entries: Annotated[int, Field(ge=1)] = 200_000
    kept_mib: Annotated[int, Field(ge=1)] = 2048

    @field_validator("network_allow", mode="after")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value
