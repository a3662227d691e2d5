"""A builder prints whatever it likes: its log is cut and says so, and nobody else's build is the worse for it."""

from __future__ import annotations

import json
import subprocess
import threading
from typing import Any

import pytest

from tests.support.attack import FarmUnderAttack

pytestmark = pytest.mark.e2e

#: Builds of one stranger: what they print, and whether Nix 2.8 takes it.
WILD = r"""
    phase = shell "phase" ''echo before; echo '@nix {"action":"setPhase","phase":7}' >&2; sleep 1; : > $out'';
    shape = shell "shape" ''echo '@nix [1,2]' >&2; sleep 1; : > $out'';
    wide = shell "wide" ''echo first; head -c 100000000 /dev/zero | tr '\0' x; echo; echo last; : > $out'';
    binary = shell "binary" ''head -c 300000 /dev/urandom; printf '\033]0;unterminated'; : > $out'';
    good = shell "good" "sleep 2; echo good > $out";
"""


def test_wild_logs_are_their_own_recipes_trouble_only(readme_farm: FarmUnderAttack) -> None:
    farm = readme_farm
    file = farm.expression(f"{{ {WILD} }}")
    ended: dict[str, subprocess.CompletedProcess[str]] = {}

    def build(name: str, *attributes: str) -> None:
        asked = [word for attribute in attributes for word in ("-A", attribute)]
        ended[name] = farm.build(file, *asked, "--json")

    stranger = threading.Thread(target=build, args=("stranger", "phase", "shape", "wide", "binary"))
    stranger.start()
    build("other", "good")
    stranger.join()

    assert ended["other"].returncode == 0, ended["other"].stderr
    roots: dict[str, dict[str, Any]] = {
        root["attr"]: root for root in json.loads(ended["stranger"].stdout.splitlines()[-1])["roots"]
    }
    for attribute in ("wide", "binary"):
        assert roots[attribute]["state"] == "done", ended["stranger"].stderr
    for attribute in ("phase", "shape"):
        if roots[attribute]["state"] != "done":  # a later Nix takes the line for text
            step = farm.api(f"steps/{roots[attribute]['step']}")
            assert "the builder printed an @nix line that Nix cannot read" in json.dumps(step)
            begun = [attempt["outcome"] for attempt in farm.begun(roots[attribute]["step"])]
            assert begun == ["failed"], "it is the recipe's fault, and is not tried again"
    log = farm.drover("log", roots["wide"]["drv"]).stdout
    assert "cut here, 100000000 bytes in all" in log
    assert log.startswith("first\n")
    assert log.endswith("last\n")
    assert len(log) < 2 * 1024 * 1024
    assert [worker["state"] for worker in farm.api("workers")] == ["online"]
    assert all(not worker.get("trouble") for worker in farm.api("workers"))
