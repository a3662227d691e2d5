"""The services of infra/deploy as text: what their files say, and the commands that they start."""

from __future__ import annotations

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

DEPLOY: Final = Path(__file__).resolve().parents[2] / "infra" / "deploy"
#: The program in the files.
PROGRAM: Final = "/opt/drover/.venv/bin/drover"


def service(name: str) -> dict[str, list[str]]:
    """Return the [Service] section of a unit: the values of each name, in order."""
    text = (DEPLOY / "systemd" / f"{name}.service").read_text()
    found = defaultdict(list)
    for line in text.split("[Service]\n")[1].split("\n[")[0].splitlines():
        if line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[key].append(value)
    return dict(found)


def command(name: str, values: Mapping[str, str | Path]) -> list[str]:
    """Return what a unit starts, without its program: `values` stand for its variables and for its paths."""
    program, *words = shlex.split(service(name)["ExecStart"][0])
    assert program == PROGRAM
    found: list[str] = []
    for word in words:
        variable = re.fullmatch(r"\$\{?(\w+)\}?", word)
        value = str(values[variable[1]]) if variable else str(values.get(word, word))
        # Without braces a variable is as many words as it has.
        found += shlex.split(value) if variable and "{" not in word else [value]
    return found


def confined(name: str) -> Sequence[str]:
    """Return a command that becomes the one behind it, with no more rights than a unit gives to root."""
    section = service(name)
    assert section["NoNewPrivileges"] == ["yes"]
    if os.geteuid() != 0:
        return ()
    kept = "".join(f",+{word.removeprefix('CAP_').lower()}" for word in section["CapabilityBoundingSet"][0].split())
    return ("setpriv", "--no-new-privs", f"--bounding-set=-all{kept}", "--inh-caps=-all")
