"""Derivations per second, from .drv files on disk to a graph that the scheduler has accepted.

Ours, on one core, client and coordinator in one process, without HTTP between them:

    read       every .drv of the closure from the store directory, parsed to find its inputs (client)
    send       the compressed stream is written, and read again (both)
    verify     every .drv path and every output path is recomputed (coordinator)
    store      derivations, options and resolved inputs go into SQLite, durably
    plan       collapse to steps, one question to the cache about all outputs, recipe places, SubmissionReceived
    accept     Farm.handle takes the event

Peer: `nix-store --query --requisites ROOTS` on the same corpus after `nix-store --load-db`: Nix answers the closure
question from its own database, and verifies, stores and plans nothing. It is the nearest that Nix has, and does less.
The target is stated beside both: 10,000 derivations per second.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from hashlib import sha256
from pathlib import Path

from coordinator.api.requests import IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.streams import encode_derivations
from coordinator.client.closure import LocalStore, read_closure
from coordinator.intake.intake import Intake
from coordinator.stores.derivations import DerivationStore
from infra.cache.cache import Cache
from infra.nix.nar import NarData, NarFile, write_events
from infra.nix.signing import generate
from infra.nix.store_path import StoreDir, base_name_of
from infra.objects.store import open_object_store
from scheduler.farm import Farm
from scheduler.model import Instant, SubmissionId
from tests.benchmarks.report import arguments, progress, publish
from tests.support.graphs import Made, Maker

TARGET = 10_000
STORE = StoreDir("/nix/store")
FLAGS = (
    "cmakeFlags configureFlags mesonFlags doCheck doInstallCheck enableParallelBuilding enableParallelChecking "
    "enableParallelInstalling hardeningDisable patches patchFlags postPatch preConfigure postConfigure preBuild "
    "buildPhase postInstall preFixup postFixup propagatedBuildInputs propagatedNativeBuildInputs strictDeps version "
    "pname shellHook outputsToInstall NIX_CFLAGS_COMPILE NIX_LDFLAGS makeFlags dontStrip"
)


def corpus(count: int, seed: int) -> tuple[list[Made], list[Made]]:
    """`count` layered derivations (2-4 KB, some 35 variables each), and the roots that nothing else needs."""
    chance = random.Random(seed)
    maker = Maker()
    everything: list[Made] = []
    layer: list[Made] = []
    below: list[Made] = []
    used: set[str] = set()
    width = max(20, count // 60)
    for index in range(count):
        if len(layer) >= width:
            below, layer = layer, []
        name = f"package-{index}-{chance.randint(0, 9)}.{chance.randint(0, 99)}"
        if index % 5 == 0:
            made = maker.fixed(
                f"{name}.tar.gz",
                str(index).encode(),
                chance.sample(below, min(2, len(below))),
                urls=f"https://example.org/{name}.tar.gz",
                outputHash="0" * 52,
                outputHashMode="flat",
            )
        else:
            near = chance.sample(below, min(len(below), chance.randint(2, 9)))
            far = chance.sample(everything, min(len(everything), 2))
            inputs = list({each.drv: each for each in (*near, *far)}.values())
            env = {flag: _words(chance, 1, 7) for flag in FLAGS.split()}
            env["buildInputs"] = " ".join(each.outputs["out"] for each in inputs)
            env["installPhase"] = "\n".join(f'install -Dm755 "{_words(chance, 1, 3)}" $out' for _ in range(4))
            outputs = ("out", "dev") if index % 7 == 1 else ("out",)
            made = maker.plain(name, [(each, ("out",)) for each in inputs], outputs=outputs, builder="/bin/bash", **env)
            used.update(each.drv for each in inputs)
        everything.append(made)
        layer.append(made)
    return everything, [made for made in everything if made.drv not in used]


def _words(chance: random.Random, least: int, most: int) -> str:
    return " ".join(f"--with-{chance.randint(0, 0xFFFFFF):06x}" for _ in range(chance.randint(least, most)))


def write_store(root: Path, everything: Iterable[Made]) -> None:
    """Put the files into a chroot store and tell its database of them, as Nix itself would."""
    directory = root / "nix/store"
    directory.mkdir(parents=True)
    dump: list[str] = []
    for made in everything:
        (directory / made.name).write_bytes(made.data)
        nar = b"".join(write_events([NarFile(b"", False, len(made.data)), NarData(made.data)]))
        references = sorted(_references(made))
        dump += [made.drv, sha256(nar).hexdigest(), str(len(nar)), "", str(len(references)), *references]
    subprocess.run(
        ["nix-store", "--store", root, "--load-db"],
        input="\n".join(dump) + "\n",
        text=True,
        check=True,
        stderr=subprocess.DEVNULL,
    )


def _references(made: Made) -> list[str]:
    from infra.nix import aterm  # noqa: PLC0415

    return [path for path, _ in aterm.parse(made.data).input_drvs]


def nix_requisites(root: Path, roots: list[Made], expected: int) -> float:
    began = time.monotonic()
    answer = subprocess.run(
        ["nix-store", "--store", root, "--query", "--requisites", *(made.drv for made in roots)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    took = time.monotonic() - began
    if len(answer.stdout.split()) != expected:
        raise SystemExit("nix-store did not answer with the whole corpus")
    return took


async def ingest(root: Path, state: Path, roots: list[Made]) -> dict[str, float]:
    """One run into empty databases; returns seconds by stage."""
    objects = open_object_store((state / "objects").as_uri())
    cache = await Cache.open(
        f"sqlite+aiosqlite:///{state}/cache.sqlite3",
        objects,
        store_dir=STORE,
        keys=[generate("bench", os.urandom(32))],
        now=time.time,
    )
    derivations = DerivationStore.open(f"sqlite+aiosqlite:///{state}/derivations.sqlite3")
    await derivations.prepare()
    intake = Intake(derivations, cache, objects, STORE)
    farm = Farm()
    spent: dict[str, float] = {}

    def lap(name: str, began: float) -> float:
        now = time.monotonic()
        spent[name] = now - began
        return now

    at = time.monotonic()
    store = LocalStore("/nix/store", str(root))
    closure = read_closure(store, [made.drv for made in roots])
    at = lap("read", at)
    names = tuple(base_name_of(drv) for drv in closure.derivations)
    missing = await intake.missing(IntakeQuery(store_dir="/nix/store", derivations=names, sources=()))
    at = lap("missing", at)
    stream = list(encode_derivations((name, store.read(f"/nix/store/{name}")) for name in missing.derivations))
    at = lap("send", at)
    await intake.add_derivations(_pieces(stream))
    at = lap("verify and store", at)
    request = SubmitRequest(roots=tuple(RootRequest(attr=made.name, drv=made.drv) for made in roots))
    planned = await intake.submit(request)
    at = lap("plan", at)
    farm.handle(planned.event(SubmissionId("bench")), Instant(1.0))
    lap("accept", at)
    await cache.close()
    await derivations.close()
    return spent


async def _pieces(stream: list[bytes]) -> AsyncIterator[bytes]:
    for piece in stream:
        for start in range(0, len(piece), 64 * 1024):
            yield piece[start : start + 64 * 1024]


def main() -> None:
    parser = arguments("derivations per second from .drv files to a schedulable graph", runs=3)
    parser.add_argument("--count", type=int, default=20_000, help="derivations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the corpus (default: %(default)s)")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ours, peer = [], []
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="drover-ingest-") as directory:
        top = Path(directory)
        progress(f"making {options.count} derivations")
        everything, roots = corpus(options.count, options.seed)
        size = sum(len(made.data) for made in everything) / len(everything)
        write_store(top / "client", everything)
        progress(f"{len(everything)} files of {size:.0f} bytes on average, {len(roots)} roots")
        count = len(everything)
        del everything
        gc.collect()
        for run in range(options.runs):
            state = top / f"state-{run}"
            (state / "objects").mkdir(parents=True)
            spent = asyncio.run(ingest(top / "client", state, roots))
            ours.append(count / sum(spent.values()))
            peer.append(count / nix_requisites(top / "client", roots, count))
            stages = {name: round(seconds, 3) for name, seconds in spent.items()}
            progress(f"run {run + 1}: ours {ours[-1]:,.0f}/s {stages}, nix-store -qR {peer[-1]:,.0f}/s")
    publish(
        "ingest",
        ours=ours,
        peer=peer,
        unit="derivations/s",
        bigger_is_better=True,
        as_json=options.json,
        peer_is="nix-store --query --requisites, which neither reads nor verifies the files",
        target=TARGET,
        seconds=stages,
        derivations=count,
    )


if __name__ == "__main__":
    main()
