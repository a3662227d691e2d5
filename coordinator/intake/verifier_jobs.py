"""Jobs of verifying child processes and their answers, as frames on a pipe.

A frame is two lengths (four bytes each, little-endian), JSON of the first length and bytes of the second. A job names
what those inputs of its members are that stood in no job of the same stream; its answer has each member as it is
written, in order, or none at all where one is refused or the job is not sound. Both sides are programs of one release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import orjson

from coordinator.stores.derivation_records import Kind, Known, PackedDerivation, node_of
from scheduler.values import quick

_INT: Final = 4


@quick
@dataclass(frozen=True, slots=True)
class JobAnswer:
    """One member of a job as it is written: the fields of a `PackedDerivation`, of its node those that no JSON has."""

    drv: str
    step: str
    kind: int
    modulo: bytes
    detail: bytes
    inputs: bytes
    aterm: bytes
    content: str

    @classmethod
    def of(cls, each: PackedDerivation) -> JobAnswer:
        """Return the answer with a member that was packed here."""
        node = each.node
        return cls(node.drv, node.step, int(node.kind), each.modulo, each.detail, each.inputs, each.aterm, each.content)


def write_job(pipe: IO[bytes], members: Sequence[tuple[str, bytes]], known: Mapping[str, Known], *, anew: bool) -> None:
    """Send .drv files by base name, and what those of their inputs are that stand in no member before them.

    Unless the process begins `anew`, it remembers what stood in jobs before.
    """
    header = {
        "anew": anew,
        "members": [(name, len(data)) for name, data in members],
        "known": [(name, int(each.kind), each.modulo.hex(), each.outputs) for name, each in known.items()],
    }
    _write(pipe, header, [data for _, data in members])


def read_job(pipe: IO[bytes]) -> tuple[list[tuple[str, bytes]], dict[str, Known], bool] | None:
    """Return the next job and whether it begins anew, None where no more come."""
    frame = _read(pipe)
    if frame is None:
        return None
    header, payload = frame
    members: list[tuple[str, bytes]] = []
    at = 0
    for name, size in header["members"]:
        members.append((name, payload[at : at + size]))
        at += size
    known = {
        name: Known(bytes.fromhex(modulo), Kind(kind), tuple([(output, path) for output, path in outputs]))
        for name, kind, modulo, outputs in header["known"]
    }
    return members, known, header["anew"]


def write_answer(pipe: IO[bytes], done: Sequence[JobAnswer]) -> None:
    """Send the members of a job as they are written, or nothing of them."""
    header = [
        (each.drv, each.step, each.kind, each.content, len(each.detail), len(each.inputs), len(each.aterm))
        for each in done
    ]
    _write(pipe, header, [part for each in done for part in (each.modulo, each.detail, each.inputs, each.aterm)])


def read_answer(pipe: IO[bytes], modulo_bytes: int = 32) -> list[PackedDerivation]:
    """Return the answer to a job. Raises `EOFError` where the process has ended."""
    frame = _read(pipe)
    if frame is None:
        raise EOFError
    header, payload = frame
    done: list[PackedDerivation] = []
    at = 0

    def part(size: int) -> bytes:
        nonlocal at
        at += size
        return payload[at - size : at]

    for drv, step, kind, content, detail_size, inputs_size, aterm_size in header:
        modulo, detail, inputs, aterm = part(modulo_bytes), part(detail_size), part(inputs_size), part(aterm_size)
        done.append(PackedDerivation(node_of(drv, step, kind, detail), modulo, detail, inputs, aterm, content))
    return done


def _write(pipe: IO[bytes], header: object, parts: Sequence[bytes]) -> None:
    text = orjson.dumps(header)
    size = sum(map(len, parts))
    pipe.write(b"".join([len(text).to_bytes(_INT, "little"), size.to_bytes(_INT, "little"), text, *parts]))
    pipe.flush()


def _read(pipe: IO[bytes]) -> tuple[Any, bytes] | None:
    sizes = pipe.read(2 * _INT)
    if len(sizes) < 2 * _INT:
        return None
    header, payload = int.from_bytes(sizes[:_INT], "little"), int.from_bytes(sizes[_INT:], "little")
    body = pipe.read(header + payload)
    if len(body) < header + payload:
        return None
    return orjson.loads(body[:header]), body[header:]
