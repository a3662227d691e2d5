"""Order in which a batch of derivations is verified side by side: waves, each of which needs only those before it.

A process with the native part takes a batch whole: it verifies in a third of the time in which waves go to and fro.

The heads of the files say what stands on what. That is not verification: a file whose head lies is refused where it is
verified, because there its input is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from infra.nix.drv_head import input_names
from scheduler.values import quick

#: Derivations of one job at least; some 5 ms, as long as sending a job and its answer takes of this process.
JOB_FROM: Final = 32


@quick
@dataclass(frozen=True, slots=True)
class WaveMember:
    """A derivation that is to be verified, with the base names of its input derivations."""

    name: str
    data: bytes
    inputs: Sequence[str]


def waves_of(batch: Sequence[tuple[str, bytes]]) -> list[list[WaveMember]]:
    """Return (base name, bytes) in waves; none where one comes twice, before its input, or cannot be read.

    Narrow ones are one, which is one job: there each stands behind its inputs.
    """
    waves: list[list[WaveMember]] = []
    #: Number of its wave.
    placed: dict[str, int] = {}
    names = {name for name, _ in batch}
    if len(names) < len(batch):
        return []
    for name, data in batch:
        inputs = input_names(data)
        if inputs is None:
            return []
        inside = names.intersection(inputs)
        if not inside <= placed.keys():
            return []
        wave = placed[name] = max([placed[need] for need in inside], default=-1) + 1
        if wave == len(waves):
            waves.append([])
        waves[wave].append(WaveMember(name, data, inputs))
    return _joined(waves)


def whole(batch: Sequence[tuple[str, bytes]]) -> list[WaveMember]:
    """Return (base name, bytes) as one job in their order; none where one cannot be read."""
    members: list[WaveMember] = []
    for name, data in batch:
        inputs = input_names(data)
        if inputs is None:
            return []
        members.append(WaveMember(name, data, inputs))
    return members


def jobs_of(wave: Sequence[WaveMember], processes: int) -> list[Sequence[WaveMember]]:
    """Return a wave as jobs of about one size, as many as can be done at one time."""
    count = max(1, min(processes, len(wave) // JOB_FROM))
    return [wave[len(wave) * number // count : len(wave) * (number + 1) // count] for number in range(count)]


def _joined(waves: Iterable[list[WaveMember]]) -> list[list[WaveMember]]:
    """Join narrow waves that follow each other, as far as they are one job, in which each stands behind its inputs."""
    joined: list[list[WaveMember]] = []
    for wave in waves:
        # Of a chain each derivation would else be a job, which costs this process 0.3 ms.
        if joined and len(joined[-1]) + len(wave) < 2 * JOB_FROM:
            joined[-1] += wave
        else:
            joined.append(wave)
    return joined
