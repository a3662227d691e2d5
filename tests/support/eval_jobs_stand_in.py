"""A stand-in for nix-eval-jobs, for machines that have none: its arguments and wire format, with the real Nix below.

It goes through a value by the rules of src/worker.cc: the root's attributes always, those of other sets where
`recurseForDerivations` is true; everything else that is no derivation is passed over. An attribute whose evaluation
fails is a line with `error`, and is printed on standard error too. Keys are sorted. Attributes are visited in the order
of their paths, one after the other, whatever `--workers` says.

`DROVER_STAND_IN` chooses how it misbehaves: `die AFTER` ends it like a worker's overflow after so many lines, `noise`
writes bytes that are no text to standard error, `garbage` prints a line that is none, `hang` prints nothing more after
the first.
`DROVER_STAND_IN_ARGUMENTS` names a file that gets its arguments.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

#: What is said of one value: worker.cc `processDerivation` and drv.cc `to_json`.
LOOK = """
let
  root = (%s);
  value = builtins.foldl' (set: name: set.${name}) root (builtins.fromJSON %s);
in
if !builtins.isAttrs value then { attrs = [ ]; }
else if value.type or null == "derivation" then {
  inherit (value) name system meta;
  drvPath = builtins.unsafeDiscardStringContext value.drvPath;
  outputs = builtins.listToAttrs (map
    (name: { inherit name; value = builtins.unsafeDiscardStringContext value.${name}.outPath; })
    (value.outputs or [ "out" ]));
}
else { attrs = if %s || value.recurseForDerivations or false then builtins.attrNames value else [ ]; }
"""


def look(expression: str, path: list[str], flags: list[str]) -> dict[str, Any]:
    """Evaluate one attribute."""
    quoted = json.dumps(json.dumps(path)).replace("${", "\\${")
    asked = LOOK % (expression, quoted, "true" if not path else "false")
    done = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", "--read-write-mode", *flags, "-E", asked],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode == 0:
        for line in done.stderr.splitlines():
            if line.startswith("trace:"):
                print(line, file=sys.stderr)
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    error = done.stderr[done.stderr.index("error:") :]
    print(error, file=sys.stderr)
    return {"error": error}


def read_arguments() -> tuple[str, list[str]]:
    """Read arguments as eval-args.cc does; returns the expression, and the flags that are Nix's own."""
    words, flags, expression = iter(sys.argv[1:]), [], ""
    for word in words:
        if word == "--option":
            flags += [word, next(words), next(words)]
        elif word in {"-I", "--store"}:
            flags += [word, next(words)]
        elif word in {"--workers", "--max-memory-size"}:
            next(words)
        elif word == "--expr":
            expression = next(words)
        elif word != "--meta":
            sys.exit(f"error: unrecognised flag '{word}'")
    return expression, flags


def main() -> int:
    """Visit all attributes and print a line for each job."""
    expression, flags = read_arguments()
    if arguments := os.environ.get("DROVER_STAND_IN_ARGUMENTS"):
        Path(arguments).write_text(json.dumps(sys.argv[1:]))
    how, _, after = os.environ.get("DROVER_STAND_IN", "").partition(" ")
    if how == "noise":
        sys.stderr.buffer.write(b'\xff\xfe\x00 {"attr": [\n' + b"x" * 100_000 + b"\n")
    printed = 0
    todo: list[list[str]] = [[]]
    while todo:
        path = todo.pop(0)
        if how == "die" and printed == int(after):
            named = ".".join(path)
            sys.exit(
                f"error: while reading result for attrPath '{named}', evaluation worker got killed by SIGSEGV, "
                "(possible infinite recursion)"
            )
        found = look(expression, path, flags)
        if "attrs" in found:
            todo = sorted([*todo, *([*path, name] for name in found["attrs"])])
            continue
        attr = ".".join(f'"{name}"' if "." in name else name for name in path)
        print(json.dumps({"attr": attr, "attrPath": path, **found}, sort_keys=True, separators=(",", ":")), flush=True)
        printed += 1
        if how == "garbage":
            print("Segmentation fault", flush=True)
        if how == "hang":
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
