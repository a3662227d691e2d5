"""Admission by pressure: how many of its slots a worker offers while its machine is short of processors or memory.

Pure: readings and instants come in, offers go out. A machine is short where tasks wait for memory (Linux pressure stall
information), where little memory is left, or where others than the builds of this worker keep its processors busy. The
own builds are no reason: as many as there are slots are what its operator wants.

The offer falls by one below what runs, at most once in `LOWER_EVERY_S`, because readings are means of some seconds; it
rises by one once nothing was short for `RAISE_AFTER_S`, by bounds that lie lower than those of the fall. It never falls
below one, so that a farm of busy machines goes on, nor exceeds the slots. Builds that run go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from workers.wire.messages import Vitals

#: Seconds between two falls, and without shortage before a rise.
LOWER_EVERY_S: Final = 10.0
RAISE_AFTER_S: Final = 30.0
#: Part of the time in which some task waits for memory: short above the first, no longer short below the second.
MEMORY_WAITS: Final = (0.20, 0.05)
#: Part of the machine's memory that is left: short below the first, no longer short above the second.
MEMORY_LEFT: Final = (0.05, 0.10)
#: Load of others by processor, and part of the time in which some task waits for a processor where that is measured.
OTHERS_LOAD: Final = (1.0, 0.5)
CPU_WAITS: Final = (0.90, 0.60)


@dataclass(frozen=True, slots=True)
class Machine:
    """Size of a machine, and of what its worker runs there."""

    slots: int
    processors: int
    #: 0 where it is not known.
    memory_bytes: int = 0
    #: Processors that one build takes.
    build_cores: int = 1


@dataclass(frozen=True, slots=True)
class SlotOffer:
    """Slots that a worker offers, and the reason where they are not all."""

    slots: int
    because: str = ""
    #: When it fell last, and since when nothing has been short; infinitely long ago at first.
    lowered_at: float = float("-inf")
    calm_since: float = float("-inf")


def next_offer(before: SlotOffer, machine: Machine, vitals: Vitals, running: int, now: float) -> SlotOffer:
    """Return the offer that follows from a look at the machine while so many builds run."""
    short = _shortage(machine, vitals, running, lowered=before.slots < machine.slots)
    if not short:
        if before.slots >= machine.slots:
            return before if before == SlotOffer(machine.slots) else SlotOffer(machine.slots)
        if now - before.calm_since < RAISE_AFTER_S:
            return before
        slots = before.slots + 1
        return (
            SlotOffer(machine.slots)
            if slots >= machine.slots
            else SlotOffer(slots, before.because, before.lowered_at, now)
        )
    slots = before.slots
    if now - before.lowered_at >= LOWER_EVERY_S:
        slots = max(1, min(slots, max(running, 1)) - 1)
    if slots >= machine.slots:
        return SlotOffer(machine.slots)
    fell = slots < before.slots
    return SlotOffer(slots, short, now if fell else before.lowered_at, now)


def _shortage(machine: Machine, vitals: Vitals, running: int, *, lowered: bool) -> str:
    """Return what the machine is short of, in a clause; empty for nothing. `lowered`: it was short before."""
    waits = vitals.memory_pressure
    if waits is not None and waits > MEMORY_WAITS[lowered]:
        return f"tasks wait for memory {waits:.0%} of the time"
    left = vitals.memory_available_bytes
    if left is not None and machine.memory_bytes and left < machine.memory_bytes * MEMORY_LEFT[lowered]:
        return f"{left >> 20} MiB of memory are left of {machine.memory_bytes >> 20}"
    if vitals.load is None:
        return ""
    others = vitals.load - running * machine.build_cores / machine.processors
    cpu_waits = vitals.cpu_pressure
    if others > OTHERS_LOAD[lowered] and (cpu_waits is None or cpu_waits > CPU_WAITS[lowered]):
        return f"others than its builds load each processor with {others:.1f}"
    return ""
