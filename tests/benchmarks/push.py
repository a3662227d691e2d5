"""`./run bench push`: closures into the cache, beside `nix copy` into a directory and to the same coordinator.

Ours: `drover cache push` to a coordinator on this machine: closure from the daemon, NARs from the files, compressed,
sent over HTTP, verified, signed, published. Peers: `nix copy --to file://…?compression=zstd`, which does less (it
verifies, signs and sends nothing), and `nix copy --to http://…?compression=zstd` to such a coordinator. All start from
the same chroot store and an empty destination. Three closures: 100 paths of 4 KB to 3 MB, 2,000 small paths, one path
of 1 GB. Seconds of each, smaller is better.

Beside it, the processor time of pusher and coordinator, and with `--memory` how much memory both take for one path of
10 MB and for one of 1 GB.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
        self.cache_url = self._process.stdout.readline().strip()
        self.url = self.cache_url.removesuffix("/cache")

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


def make_small(root: Path, count: int, seed: int) -> list[str]:
    """`count` paths of 300 bytes to 20 KB."""
    chance = random.Random(seed)
    files = []
    for number in range(count):
        file = root / f"small-{number}"
        file.write_bytes(chance.randbytes(chance.choice((300, 2_000, 20_000))))
        files.append(file)
    return add(root / "store", files)


def make_large(root: Path, megabytes: int) -> list[str]:
    """One path, half of it like programs."""
    file = root / f"large-{megabytes}"
    with file.open("wb") as out:
        for _ in range(megabytes):
            out.write(os.urandom(500_000) + bytes(500_000))
    paths = add(root / "store", [file])
    file.unlink()
    return paths


def push(server: Server, store: Path, paths: list[str]) -> tuple[float, int]:
    """Seconds, and the pusher's peak memory."""
    command: list[str | Path] = [BIN / "drover", "cache", "push", "--store", store, "--keep-as", "bench", *paths]
    command += ["--coordinator", server.url, "--token-file", server.state_dir / "api-token", "--json"]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    return took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def nix_copy(store: Path, target: str, memory: Path, paths: list[str]) -> tuple[float, float]:
    """Seconds of `nix copy`, which remembers nothing from before, and of its processor."""
    command: list[str | Path] = ["nix", "copy", "--from", store, "--to", f"{target}?compression=zstd"]
    began, used = time.monotonic(), os.times()
    subprocess.run(
        [*command, "--no-check-sigs", *FLAGS, "--option", "netrc-file", memory / "netrc", *paths],
        check=True,
        # It names each path.
        stderr=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(memory)},
    )
    return time.monotonic() - began, sum(os.times()[2:4]) - sum(used[2:4])


def memory(root: Path) -> dict[str, int]:
    """Peak memory in MB of coordinator and pusher, for a small and a large path."""
    peaks = {}
    for name, megabytes in (("10 MB", 10), ("1 GB", 1000)):
        (path,) = make_large(root, megabytes)
        server = Server(root / f"memory-{megabytes}")
        try:
            _, pusher = push(server, root / "store", [path])
            peaks[f"coordinator, {name}"] = server.peak_bytes() // 10**6
            peaks[f"pusher, {name}"] = pusher // 10**6
        finally:
            server.stop()
    return peaks


def measure(root: Path, name: str, paths: list[str], runs: int, *, as_json: bool) -> None:
    """All three ways of one closure, in turn."""
    ours: list[float] = []
    file: list[float] = []
    http: list[float] = []
    used: list[tuple[float, float, float]] = []
    for run in range(runs):
        with tempfile.TemporaryDirectory(prefix=f"{run}-", dir=root) as directory:
            own = Path(directory)
            took_s, nix_s = nix_copy(root / "store", f"file://{own}/copied", own / "file", paths)
            file.append(took_s)
            server = Server(own / "farm")
            try:
                before, children = server.processor_s(), os.times()
                ours.append(push(server, root / "store", paths)[0])
                pusher = os.times()
                used.append(
                    (
                        sum(pusher[2:4]) - sum(children[2:4]),
                        server.processor_s() - before,
                        nix_s,
                    )
                )
            finally:
                server.stop()
            server = Server(own / "farm-of-nix")
            try:
                (own / "http").mkdir()
                token = (server.state_dir / "api-token").read_text().strip()
                (own / "http/netrc").write_text(f"machine 127.0.0.1 login ci password {token}\n")
                http.append(nix_copy(root / "store", server.cache_url, own / "http", paths)[0])
            finally:
                server.stop()
        pusher_s, coordinator_s, nix_s = used[-1]
        progress(
            f"{name}, run {run + 1}: drover cache push {ours[-1]:.2f} s, nix copy file:// {file[-1]:.2f} s, "
            f"http:// {http[-1]:.2f} s; processor: {pusher_s:.2f} + {coordinator_s:.2f}, nix copy file:// {nix_s:.2f}"
        )
    for peer, their, target in (("file", file, 1.0), ("http", http, 4.0)):
        publish(
            f"push-{name}-beside-{peer}",
            ours=ours,
            peer=their,
            unit="s",
            bigger_is_better=False,
            as_json=as_json,
            peer_is=f"nix copy --to {peer}://…?compression=zstd",
            target=target,
            paths=len(paths),
            processor_s=used,
        )


def main() -> None:
    parser = arguments("seconds to push closures", runs=3)
    parser.add_argument("--count", type=int, default=100, help="paths of the first closure (default: %(default)s)")
    parser.add_argument("--small", type=int, default=2000, help="small paths (default: %(default)s)")
    parser.add_argument("--large", type=int, default=1000, help="MB of the large path (default: %(default)s)")
    parser.add_argument("--only", choices=("mixed", "small", "large"), help="one closure")
    parser.add_argument("--memory", action="store_true", help="measure peaks of memory too")
    options = parser.parse_args()
    closures: dict[str, Callable[[Path], list[str]]] = {
        "mixed": lambda root: make_closure(root, options.count, 1),
        "small": lambda root: make_small(root, options.small, 1),
        "large": lambda root: make_large(root, options.large),
    }
    with tempfile.TemporaryDirectory(prefix="drover-push-") as directory:
        root = Path(directory)
        if options.memory:
            progress(f"peak memory in MB: {memory(root)}")
        for name, make in closures.items():
            if options.only in {None, name}:
                measure(root, name, make(root), options.runs, as_json=options.json)


if __name__ == "__main__":
    main()
