"""Pushing a closure of 100 paths into the cache beside `nix copy` of the same closure into a directory.

Ours: `drover cache push` to a coordinator on this machine: closure from the daemon, NARs from the files, compressed,
sent over HTTP, verified, signed, published. Peer: `nix copy --to file://…?compression=zstd`, which does less: it
verifies and signs nothing. Both start from the same chroot store and an empty destination.

Beside it, how much memory pusher and coordinator take for one path of 10 MB and for one of 1 GB.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.report import arguments, progress, publish

BIN = Path(sys.executable).parent
SETTINGS = {"substituters": "", "experimental-features": "nix-command", "build-users-group": ""}
FLAGS = [word for name, value in SETTINGS.items() for word in ("--option", name, value)]


class Server:
    """A coordinator without workers, as a child."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.cache_server", state_dir], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip().removesuffix("/cache")

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024

    def processor_s(self) -> float:
        """Seconds of processors that it took so far, with its child processes."""
        return _processor_s(self._process.pid)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def _processor_s(pid: int) -> float:
    process = Path(f"/proc/{pid}")
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    # Of itself, and of those children that have ended: user and system time, in ticks.
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    children = [pid for thread in (process / "task").iterdir() for pid in (thread / "children").read_text().split()]
    return own + sum(_processor_s(int(child)) for child in children)


def add(store: Path, files: list[Path]) -> list[str]:
    done = subprocess.run(
        ["nix-store", "--store", store, *FLAGS, "--add", *files], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.split()


def make_closure(root: Path, count: int, seed: int) -> list[str]:
    """`count` paths of 4 KB to 2 MB, half of each like text and half like programs."""
    chance = random.Random(seed)
    words = [chance.randbytes(6).hex().encode() for _ in range(3000)]
    files = []
    for number in range(count):
        size = int(4096 * 512 ** chance.random())
        text = b" ".join(chance.choice(words) for _ in range(size // 26))
        file = root / f"path-{number}"
        file.write_bytes(text + chance.randbytes(size // 2))
        files.append(file)
    return add(root / "store", files)


def push(server: Server, store: Path, paths: list[str]) -> tuple[float, int]:
    """Seconds, and the pusher's peak memory."""
    command: list[str | Path] = [BIN / "drover", "cache", "push", "--store", store, "--keep-as", "bench", *paths]
    command += ["--coordinator", server.url, "--token-file", server.state_dir / "api-token", "--json"]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    return took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def nix_copy(store: Path, target: Path, paths: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(
        [
            "nix",
            "copy",
            "--from",
            store,
            "--to",
            f"file://{target}?compression=zstd",
            "--no-check-sigs",
            *FLAGS,
            *paths,
        ],
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": f"{target}-memory"},
    )
    return time.monotonic() - began


def memory(root: Path) -> dict[str, int]:
    """Peak memory in MB of coordinator and pusher, for a small and a large path."""
    peaks = {}
    for name, megabytes in (("10 MB", 10), ("1 GB", 1000)):
        file = root / f"large-{megabytes}"
        with file.open("wb") as out:
            for _ in range(megabytes):
                out.write(os.urandom(500_000) + bytes(500_000))
        (path,) = add(root / "store", [file])
        server = Server(root / f"memory-{megabytes}")
        try:
            _, pusher = push(server, root / "store", [path])
            peaks[f"coordinator, {name}"] = server.peak_bytes() // 10**6
            peaks[f"pusher, {name}"] = pusher // 10**6
        finally:
            server.stop()
    return peaks


def main() -> None:
    parser = arguments("seconds to push a closure of 100 paths", runs=3)
    parser.add_argument("--count", type=int, default=100, help="paths in the closure (default: %(default)s)")
    options = parser.parse_args()
    ours, peer = [], []
    with tempfile.TemporaryDirectory(prefix="drover-push-") as directory:
        root = Path(directory)
        peaks = memory(root)
        progress(f"peak memory in MB: {peaks}")
        paths = make_closure(root, options.count, 1)
        for run in range(options.runs):
            server = Server(root / f"farm-{run}")
            try:
                peer.append(nix_copy(root / "store", root / f"copied-{run}", paths))
                ours.append(push(server, root / "store", paths)[0])
            finally:
                server.stop()
            progress(f"run {run + 1}: drover cache push {ours[-1]:.2f} s, nix copy {peer[-1]:.2f} s")
    publish(
        "push",
        ours=ours,
        peer=peer,
        unit="s",
        bigger_is_better=False,
        as_json=options.json,
        peer_is="nix copy --to file://…?compression=zstd",
        target=2.0,
        peak_memory_mb=peaks,
    )


if __name__ == "__main__":
    main()
