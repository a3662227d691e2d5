"""`./run demo`: a farm of two systems on this machine, from nothing to a plain Nix client fetching the result.

Everything lives in one temporary directory and is gone afterwards; the machine's own Nix store is not touched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.farm import Farm, WorkerSpec, nix_store
from tests.support.patience import PATIENCE_S

GRAPH = Path(__file__).parent / "graph.nix"
WORKERS = (
    WorkerSpec("linux", slots=2, features=("large-memory",)),
    WorkerSpec("mac", slots=2, features=("large-memory",), emulate=("aarch64-darwin",)),
)


class DemoError(Exception):
    """The farm did not do what this program shows."""


def step(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def build(farm: Farm) -> dict[str, Any]:
    """Submit the graph with the terminal attached, so that the live view shows; return the JSON result."""
    process = subprocess.run(
        farm.build_command(GRAPH, "-A", "linux", "-A", "darwin", "--json"),
        env=farm.environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if process.returncode != 0:
        raise DemoError(f"drover build ended with status {process.returncode}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def prove(farm: Farm, paths: list[str], store: Path) -> int:
    """Fetch with a plain Nix client into an empty store that trusts only the farm's key; count what arrived."""
    fetched = farm.fetch(store, *paths)
    if fetched.returncode != 0:
        raise DemoError(f"nix-store -r could not fetch the result:\n{fetched.stderr}")
    verified = nix_store(store, "--verify", "--check-contents")
    if verified.returncode != 0:
        raise DemoError(f"the fetched store does not verify:\n{verified.stderr}")
    return len(nix_store(store, "-qR", *paths).stdout.split())


def run(root: Path) -> None:
    began = time.monotonic()
    step("1. Starting a farm: coordinator, Ray head, an x86_64-linux worker and an emulated aarch64-darwin worker")
    farm = Farm(root, WORKERS)
    try:
        farm.start()
        for worker in farm.wait_for_workers(len(WORKERS)):
            emulated = f" (emulated: {', '.join(worker['emulated'])})" if worker["emulated"] else ""
            print(f"   {worker['name']}: {', '.join(worker['systems'])}{emulated}, {worker['slots']} slots")
        print(f"   ready after {time.monotonic() - began:.1f} s at {farm.url}")

        step("2. Building the graph on both systems")
        built_at = time.monotonic()
        first = build(farm)
        build_s = time.monotonic() - built_at
        paths = sorted(path for root_view in first["roots"] for path in root_view["outputs"].values())

        step("3. Fetching the results with a plain `nix-store -r` into an empty store that trusts only the farm's key")
        arrived = prove(farm, paths, root / "plain-client")
        print(f"   {arrived} store paths fetched, signatures checked, contents verified")

        step("4. Submitting the same graph again")
        again = build(farm)
        counts, repeat = first["counts"], again["counts"]
        if repeat["done"] or repeat["held"] != repeat["total"]:
            raise DemoError(f"the second submission built {repeat['done']} steps; it should build none")

        step("Done")
        print(f"   built         {counts['done']} steps in {build_s:.1f} s")
        same = first["derivations"] - counts["total"]
        print(f"   deduplicated  {same} of {first['derivations']} derivations make what another one makes")
        print(f"   uploaded      {first['uploaded_bytes']:,} bytes, compressed")
        print(f"   second time   {repeat['done']} built, {repeat['held']} already in the cache")
    finally:
        farm.stop()
    if left := farm.processes_left():
        raise DemoError("still running: " + "; ".join(f"{pid} {command}" for pid, command in left.items()))
    print(f"   left running  nothing; the whole demo took {time.monotonic() - began:.1f} s")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="drover-demo-") as directory:
        try:
            run(Path(directory))
        except (DemoError, RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("demo: interrupted; the farm was stopped", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
