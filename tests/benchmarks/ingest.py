"""Derivations per second, from .drv files on disk to a graph that the scheduler has accepted.

Ours, client and coordinator in one process without HTTP between them, with as many child processes that verify as are
asked for (none: all in threads of one process):

    read       every .drv of the closure from the store directory, as far as its inputs (client)
    missing    one question about all of them
    stream     written and read (both), every .drv path and every output path recomputed, options and resolved inputs
               written to SQLite, durably; all at one time
    plan       collapse to steps, one question to the cache about all outputs, recipe places, SubmissionReceived
    accept     Farm.handle takes the event

Peers, on the same corpus after `nix-store --load-db`: `nix-store --query --requisites ROOTS`, for which Nix reads its
own database and no file; and `nix show-derivation -r ROOTS`, which reads and prints every file. Both verify, store and
plan nothing. Targets: 0.3 x of the first and 4 x of the second on two cores.

Beside the wall time stands the processor time of this process and of its children in each stage. From those of the
stream follows what more cores can give at best: this process is one thread's worth of Python, its children divide
their work.

Where `./run compile` was run, runs from source and with the native verification come in turn; the scheduler runs
compiled in both then.

The coordinator's part runs as in a coordinator: its threads give way soon, long collections are rare, and none happens
while a submission is planned and taken.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import uvloop

from coordinator.api.requests import IntakeQuery, RootRequest, SubmitRequest
from coordinator.api.sent_streams import encode_derivations
from coordinator.client.closure import LocalStore, read_closure
from coordinator.intake.intake import Intake
from coordinator.intake.verifier_pool import VerifierPool
from coordinator.stores.derivations import DerivationStore
from infra.cache.cache import Cache
from infra.collector import collector_paused, long_collections_kept_rare
from infra.compiled.finder import SWITCH
from infra.nix.nar import NarData, NarFile, write_events
from infra.nix.signing import generate
from infra.nix.store_path import StoreDir, base_name_of
from infra.nix.verify_quickly import is_native
from infra.objects.store import open_object_store
from infra.thread_switches import switching_often
from scheduler.farm import Farm
from scheduler.model import Instant, SubmissionId
from tests.benchmarks.processes import children_processor_s
from tests.benchmarks.report import arguments, progress, publish
from tests.support.graphs import Made, Maker

REQUISITES = "nix-store --query --requisites"
SHOW = "nix show-derivation -r"
#: Ratios to both.
TARGETS = (0.3, 4.0)
#: Cores for which the bound of the stream is stated.
CORES = (1, 2, 4, 8, 16)
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


def nix_show(root: Path, roots: list[Made]) -> float:
    """Seconds of `nix show-derivation -r`."""
    command = ["nix", "--extra-experimental-features", "nix-command", "show-derivation", "-r", "--store", str(root)]
    began = time.monotonic()
    subprocess.run(
        [*command, *(made.drv for made in roots)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds of one stage: of wall time, of this process's processors, of its children's."""

    wall: float
    own: float
    children: float


def processor_of(peer: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds that a program took, and those of processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = peer()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Laps:
    """Stages of one run, one after the other."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.monotonic(), time.process_time(), children_processor_s(os.getpid())

    def lap(self, name: str) -> None:
        before, self._before = self._before, self._now()
        self.stages[name] = Stage(*(now - then for now, then in zip(self._before, before, strict=True)))


async def ingest(root: Path, state: Path, roots: list[Made], processes: int, *, native: bool) -> dict[str, Stage]:
    """One run into empty databases; returns what each stage took."""
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
    verifiers = VerifierPool(STORE.path, processes) if processes else None
    intake = Intake(derivations, cache, objects, STORE, verifiers=verifiers)
    farm = Farm()
    if verifiers is not None:
        # They look at it where they start.
        os.environ[SWITCH] = "yes" if native else "no"
        verifiers.is_native = native
        # A client takes longer to read than they take to start.
        verifiers.start()
        await verifiers.started()
    laps = Laps()
    store = LocalStore("/nix/store", str(root))
    closure = read_closure(store, [made.drv for made in roots])
    laps.lap("read")
    names = tuple(base_name_of(drv) for drv in closure.derivations)
    missing = await intake.missing(IntakeQuery(store_dir="/nix/store", derivations=names, sources=()))
    laps.lap("missing")
    stream = encode_derivations((name, store.read(f"/nix/store/{name}")) for name in missing.derivations)
    await intake.add_derivations(_pieces(stream))
    laps.lap("stream")
    request = SubmitRequest(roots=tuple(RootRequest(attr=made.name, drv=made.drv) for made in roots))
    with collector_paused():
        planned = await intake.submit(request)
        laps.lap("plan")
        farm.handle(planned.event(SubmissionId("bench")), Instant(1.0))
        laps.lap("accept")
    if verifiers is not None:
        await verifiers.close()
    await cache.close()
    await derivations.close()
    return laps.stages


def bounds(stages: Mapping[str, Stage]) -> dict[int, float]:
    """Processor time on the longest path with so many cores: only the stream's divides, but for what this process does.

    This is what a quiet machine gives at best, also where it was measured on a busy one.
    """
    stream = stages["stream"]
    rest = sum(stage.own for name, stage in stages.items() if name != "stream")
    whole = stream.own + stream.children
    return {cores: round(rest + max(stream.own, whole / cores), 3) for cores in CORES}


async def _pieces(stream: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in stream:
        for start in range(0, len(piece), 64 * 1024):
            yield piece[start : start + 64 * 1024]


def median_stages(runs: list[dict[str, Stage]]) -> dict[str, Stage]:
    def middle(name: str, part: Callable[[Stage], float]) -> float:
        return round(statistics.median(part(run[name]) for run in runs), 3)

    return {
        name: Stage(
            middle(name, lambda stage: stage.wall),
            middle(name, lambda stage: stage.own),
            middle(name, lambda stage: stage.children),
        )
        for name in runs[0]
    }


def report(
    processes: int,
    ours: list[dict[str, Stage]],
    peers: Mapping[str, list[tuple[float, float]]],
    count: int,
    *,
    native: bool,
    as_json: bool,
) -> None:
    """Print what `processes` children gave, beside each peer."""
    stages = median_stages(ours)
    rates = [count / sum(stage.wall for stage in run.values()) for run in ours]
    kind = "native" if native else "verifying"
    named = f"ingest, {processes} {kind} processes" if processes else "ingest, one process"
    for (peer, seconds), target in zip(peers.items(), TARGETS, strict=True):
        publish(
            f"{named}, beside {peer}",
            ours=rates,
            peer=[count / wall for wall, _ in seconds],
            unit="derivations/s",
            bigger_is_better=True,
            target_ratio=target,
            wall_s={name: stage.wall for name, stage in stages.items()},
            processor_s={name: [stage.own, stage.children] for name, stage in stages.items()},
            peer_processor_s=round(statistics.median(processor for _, processor in seconds), 3),
            processor_s_on_the_path_by_cores=bounds(stages),
            derivations=count,
            as_json=as_json,
            load=round(os.getloadavg()[0], 1),
        )


def main() -> None:
    parser = arguments("derivations per second from .drv files to a schedulable graph", runs=3)
    parser.add_argument("--count", type=int, default=25_000, help="derivations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the corpus (default: %(default)s)")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="children that verify, each number in turn (default: %(default)s)",
    )
    options = parser.parse_args()
    kinds = [(processes, False) for processes in options.processes]
    if is_native():
        # One keeps up with a stream.
        kinds += [(1, True)]
    ours: dict[tuple[int, bool], list[dict[str, Stage]]] = {kind: [] for kind in kinds}
    peers: dict[str, list[tuple[float, float]]] = {REQUISITES: [], SHOW: []}
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
            for (processes, native), runs in ours.items():
                state = top / f"state-{run}-{processes}-{native}"
                (state / "objects").mkdir(parents=True)
                with (
                    switching_often(),
                    long_collections_kept_rare(),
                    asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
                ):
                    runs.append(runner.run(ingest(top / "client", state, roots, processes, native=native)))
                shown = ", ".join(f"{name} {stage.wall:.2f}" for name, stage in runs[-1].items())
                progress(f"run {run + 1}, {processes} {'native ' * native}processes: {shown} s")
            peers[REQUISITES].append(processor_of(lambda: nix_requisites(top / "client", roots, count)))
            peers[SHOW].append(processor_of(lambda: nix_show(top / "client", roots)))
            progress(f"run {run + 1}: {', '.join(f'{name} {seconds[-1][0]:.2f} s' for name, seconds in peers.items())}")
    for (processes, native), runs in ours.items():
        report(processes, runs, peers, count, native=native, as_json=options.json)


if __name__ == "__main__":
    main()
