"""Child process that verifies derivations: `python -m coordinator.intake.verifier_child STORE_DIR`.

It reads jobs from its standard input and answers each on its standard output, until no more come. It remembers what it
verified and what it was told for the jobs of one stream, which needs the same again and again. A job of another stream
begins anew, and so does one after a refusal: nothing of one client's remains for the next. What it refuses it does not
explain: the coordinator verifies such a job itself.

Here alone native code reads what clients send (`infra.nix.verify_quickly`), in a process without secrets: where it
ended by a fault, the coordinator would verify that job in Python.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from coordinator.intake.acceptance import accepted, to_verifier
from coordinator.intake.errors import DerivationRefusedError
from coordinator.intake.verifier_jobs import JobAnswer, read_job, write_answer
from coordinator.stores.derivation_records import AtermCompressor, Kind, Known, pack
from infra.nix.errors import NixError
from infra.nix.store_path import StoreDir
from infra.nix.verify_quickly import QuickVerifier, load_native

#: Added to the niceness of the coordinator: its event loop goes first.
_NICE: Final = 1


def verified(
    verifier: QuickVerifier, members: Sequence[tuple[str, bytes]], known: Mapping[str, Known]
) -> list[JobAnswer]:
    """Return all members of a job as they are written, or none."""
    for name, each in known.items():
        verifier.preload(verifier.store_dir.full(name), to_verifier(each))
    compressor = AtermCompressor()
    try:
        return [_verified(verifier, name, data, compressor) for name, data in members]
    except (NixError, DerivationRefusedError):
        return []


def _verified(verifier: QuickVerifier, name: str, data: bytes, compressor: AtermCompressor) -> JobAnswer:
    found = verifier.quickly(name, data)
    if found is None:
        new = accepted(verifier.add(verifier.store_dir.full(name), data), data)
        return JobAnswer.of(pack(new, compressor))
    kind = Kind.FIXED if found.is_fixed else Kind.INPUT_ADDRESSED
    aterm = compressor.compress(data)
    step, detail, inputs = found.first_output, found.detail, found.inputs
    return JobAnswer(name, step, int(kind), found.modulo, detail, inputs, aterm, found.content)


def main() -> None:
    """Answer jobs."""
    os.nice(_NICE)
    # Counting references frees all that a job makes.
    gc.disable()
    store_dir = StoreDir(sys.argv[1])
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    write_answer(answers, [])
    native = load_native()
    verifier = QuickVerifier(store_dir, native)
    while (job := read_job(jobs)) is not None:
        members, known, anew = job
        if anew:
            verifier = QuickVerifier(store_dir, native)
        write_answer(answers, verified(verifier, members, known))


if __name__ == "__main__":
    main()
