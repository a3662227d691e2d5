"""Child process that verifies derivations: `python -m coordinator.intake.verifier_child STORE_DIR`.

It reads jobs from its standard input and answers each on its standard output, until no more come. It remembers what it
verified and what it was told for the jobs of one stream, which needs the same again and again. A job of another stream
begins anew, and so does one after a refusal: nothing of one client's remains for the next. What it refuses it does not
explain: the coordinator verifies such a job itself.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from coordinator.intake.acceptance import accepted, to_verifier
from coordinator.intake.errors import DerivationRefusedError
from coordinator.intake.verifier_jobs import read_job, write_answer
from coordinator.stores.derivation_records import Known, PackedDerivation, packed
from infra.nix.errors import NixError
from infra.nix.store_path import StoreDir
from infra.nix.verify import Verifier

#: Added to the niceness of the coordinator: its event loop goes first.
_NICE: Final = 1


def verified(
    verifier: Verifier, members: Sequence[tuple[str, bytes]], known: Mapping[str, Known]
) -> list[PackedDerivation]:
    """Return all members of a job as they are written, or none."""
    store_dir = verifier.store_dir
    for name, each in known.items():
        verifier.preload(store_dir.full(name), to_verifier(each))
    try:
        return packed([accepted(verifier.add(store_dir.full(name), data), data) for name, data in members])
    except (NixError, DerivationRefusedError):
        return []


def main() -> None:
    """Answer jobs."""
    os.nice(_NICE)
    # Counting references frees all that a job makes.
    gc.disable()
    store_dir = StoreDir(sys.argv[1])
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    write_answer(answers, [])
    verifier = Verifier(store_dir)
    while (job := read_job(jobs)) is not None:
        members, known, anew = job
        if anew:
            verifier = Verifier(store_dir)
        write_answer(answers, verified(verifier, members, known))


if __name__ == "__main__":
    main()
