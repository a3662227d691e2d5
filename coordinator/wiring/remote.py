"""Remote evaluation, where the operator has switched it on and the machine has its sandbox."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

from coordinator.api.trees import TreeBounds
from coordinator.config import Settings
from coordinator.remote_evaluation.errors import RemoteOffError
from coordinator.remote_evaluation.evaluations import EvaluationBounds, RemoteEvaluations
from coordinator.remote_evaluation.gateway import Gateway
from coordinator.remote_evaluation.sandboxes import Sandboxes, SandboxLimits
from coordinator.remote_evaluation.trees import TreeStore
from coordinator.remote_settings import RemoteEvaluationSettings
from coordinator.wiring.core import Core

_log = logging.getLogger(__name__)

_MIB = 1024 * 1024
#: Answer where the operator has not switched it on.
NOT_ENABLED = (
    "remote evaluation is off; the operator of this farm switches it on with `enabled = true` in [remote_evaluation]."
)


async def open_remote(stack: AsyncExitStack, settings: Settings, core: Core) -> RemoteEvaluations:
    """Make the room of remote evaluation; `stack` ends what runs in it."""
    wanted = settings.remote_evaluation
    directory = settings.state_dir / "remote-evaluation"
    trees = TreeStore(
        directory / "trees", TreeBounds(wanted.tree_mib * _MIB, wanted.tree_entries), wanted.kept_mib * _MIB
    )
    sandboxes, off = None, NOT_ENABLED
    if wanted.enabled:
        try:
            await asyncio.to_thread(trees.prepare)
            sandboxes, off = await asyncio.to_thread(_sandboxes, settings), ""
        except OSError as error:
            off = f"remote evaluation is off: {directory} cannot be used: {error.strerror}."
        except RemoteOffError as error:
            off = str(error)
        if off:
            _log.warning("%s", off)
    room = RemoteEvaluations(
        sandboxes,
        trees,
        Gateway(_with_ports(wanted), wanted.network_allow),
        _bounds(wanted),
        core.intake,
        core.submissions,
        core.growth,
        directory,
        off,
    )
    stack.push_async_callback(room.stop)
    return room


def _sandboxes(settings: Settings) -> Sandboxes:
    wanted = settings.remote_evaluation
    limits = SandboxLimits(wanted.memory_mib * _MIB, wanted.scratch_mib * _MIB, 4 * wanted.tree_entries)
    return Sandboxes.found(limits, wanted.at_once, settings.state_dir)


def _with_ports(wanted: RemoteEvaluationSettings) -> list[str]:
    """Return the allowed hosts with the port of each scheme where they have none."""
    ports = [{"https": 443, "http": 80}[scheme] for scheme in wanted.allowed_schemes]
    return [each if ":" in each else f"{each}:{port}" for each in wanted.allowed_hosts for port in ports]


def _bounds(wanted: RemoteEvaluationSettings) -> EvaluationBounds:
    return EvaluationBounds(
        at_once=wanted.at_once,
        waiting=wanted.waiting,
        memory_bytes=wanted.memory_mib * _MIB,
        timeout_s=wanted.timeout_s,
        evaluators=wanted.evaluators,
        schemes=frozenset(wanted.allowed_schemes),
        hosts=wanted.allowed_hosts,
    )
