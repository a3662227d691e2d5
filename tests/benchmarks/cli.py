"""Processor of short commands, start of the interpreter included, beside `python -c pass` and `nix --version`.

Each run starts all of them in turn: `drover --help`, `status`, `log` of a step that is not there, and the completion of
a submission's name as bash asks for it, against a coordinator without workers. Target of `status` and completion: at
most 8 times `python -c pass`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.push import Server
from tests.benchmarks.report import arguments, machine, progress, publish

DROVER = Path(sys.executable).parent / "drover"
TARGET_TIMES = 8.0


def processor_s(command: list[str | Path], environment: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    options = arguments("processor milliseconds of short commands", runs=15).parse_args()
    with tempfile.TemporaryDirectory(prefix="drover-cli-") as directory:
        server = Server(Path(directory) / "farm")
        try:
            # Modules are compiled once, as on a person's machine.
            kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
            farm = {**kept, "DROVER_URL": server.url, "DROVER_TOKEN_FILE": str(server.state_dir / "api-token")}
            completion = {"_DROVER_COMPLETE": "bash_complete", "COMP_WORDS": "drover status ", "COMP_CWORD": "2"}
            commands: dict[str, tuple[list[str | Path], dict[str, str]]] = {
                "python -c pass": ([sys.executable, "-c", "pass"], kept),
                "nix --version": (["nix", "--version"], kept),
                "drover --help": ([DROVER, "--help"], farm),
                "drover status": ([DROVER, "status"], farm),
                "drover log": ([DROVER, "log", "nothing"], farm),
                "completion": ([DROVER], farm | completion),
            }
            measured: dict[str, list[float]] = {name: [] for name in commands}
            for number in range(options.runs + 1):
                for name, (command, environment) in commands.items():
                    took_s = processor_s(command, environment)
                    if number:
                        measured[name].append(took_s * 1000)
                progress(f"run {number} of {options.runs}")
        finally:
            server.stop()
    bare = measured.pop("python -c pass")
    for name, values in measured.items():
        publish(
            f"cli, {name}",
            ours=values,
            peer=bare,
            unit="ms of processor",
            bigger_is_better=False,
            as_json=options.json,
            peer_is="python -c pass",
            times=round(sorted(values)[len(values) // 2] / sorted(bare)[len(bare) // 2], 1),
            target_times=TARGET_TIMES,
            machine=machine(),
        )


if __name__ == "__main__":
    main()
