"""`./run bench fetch`: closures into an empty store by plain Nix: from the farm, from a directory, and from nginx.

Ours: `nix copy --from` a coordinator on this machine, which has the closure from `drover cache push`. Peers: `nix copy
--from file://…` of what `nix copy` wrote there with zstd, and `nix copy --from` nginx, which serves those same files.
All go into a new chroot store with empty memory of caches. Three closures: 100 paths of 4 KB to 3 MB, 2,000 small
paths, one path of 1 GB. Seconds of each, smaller is better; the target is to be as fast as the faster of both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks.cache import nginx
from tests.benchmarks.push import FLAGS, Server, make_closure, make_large, make_small, nix_copy, push
from tests.benchmarks.report import arguments, progress, publish


def fetch(source: str, store: Path, paths: list[str]) -> float:
    """Seconds of one fetch into a new store, which is removed again."""
    command: list[str | Path] = ["nix", "copy", "--from", source, "--to", store, "--no-check-sigs", *FLAGS, *paths]
    began = time.monotonic()
    # It names each path on standard error.
    subprocess.run(
        command,
        check=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": f"{store}.cache"},
    )
    took_s = time.monotonic() - began
    shutil.rmtree(store)
    return took_s


def measure(top: Path, name: str, paths: list[str], runs: int, *, as_json: bool) -> None:
    """All three ways of one closure, in turn."""
    www = top / f"www-{name}"
    nix_copy(top / "store", f"file://{www}", top / f"memory-{name}", paths)
    times: dict[str, list[float]] = {"farm": [], "file": [], "nginx": []}
    with ExitStack() as stack:
        server = Server(top / f"farm-{name}")
        stack.callback(server.stop)
        push(server, top / "store", paths)
        (top / f"nginx-{name}").mkdir()
        beside = stack.enter_context(nginx(top / f"nginx-{name}", www))
        sources = {"farm": server.cache_url, "file": f"file://{www}", "nginx": f"{beside.url}/cache"}
        for run in range(runs):
            for side, source in sources.items():
                times[side].append(fetch(source, top / f"into-{name}-{run}-{side}", paths))
            figures = ", ".join(f"{side} {figures[-1]:.2f} s" for side, figures in times.items())
            progress(f"{name}, run {run + 1}: {figures}")
    for peer, theirs in (("file", "nix copy --from file://…"), ("nginx", "nix copy --from nginx over the same files")):
        publish(
            f"fetch-{name}-beside-{peer}",
            ours=times["farm"],
            peer=times[peer],
            unit="s",
            bigger_is_better=False,
            as_json=as_json,
            peer_is=theirs,
            target=1.0,
            paths=len(paths),
        )


def main() -> None:
    parser = arguments("seconds to fetch closures into an empty store", runs=3)
    parser.add_argument("--count", type=int, default=100, help="paths of the first closure (default: %(default)s)")
    parser.add_argument("--small", type=int, default=2000, help="small paths (default: %(default)s)")
    parser.add_argument("--large", type=int, default=1000, help="MB of the large path (default: %(default)s)")
    parser.add_argument("--only", choices=("mixed", "small", "large"), help="one closure")
    options = parser.parse_args()
    closures: dict[str, Callable[[Path], list[str]]] = {
        "mixed": lambda top: make_closure(top, options.count, 1),
        "small": lambda top: make_small(top, options.small, 1),
        "large": lambda top: make_large(top, options.large),
    }
    with tempfile.TemporaryDirectory(prefix="drover-fetch-") as directory:
        top = Path(directory)
        for name, make in closures.items():
            if options.only in {None, name}:
                measure(top, name, make(top), options.runs, as_json=options.json)


if __name__ == "__main__":
    main()
