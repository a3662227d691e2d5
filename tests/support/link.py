"""A second machine as far as the network goes: a namespace behind one cable, which can be pulled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

#: Nobody's: what is sent there is heard by no one.
NOWHERE = "02:00:00:00:00:99"


@dataclass(frozen=True, slots=True)
class Link:
    """The cable, and the addresses at its ends."""

    name: str
    here: str
    there: str

    def cut(self) -> None:
        """Lose every packet from now on, in both directions and without a word, as a broken switch does."""
        self._neighbours("replace", "lladdr", NOWHERE, "nud", "permanent")

    def heal(self) -> None:
        """Let packets through again."""
        self._neighbours("del")

    @property
    def is_cut(self) -> bool:
        shown = subprocess.run(["ip", "neigh", "show", self.there], check=True, capture_output=True, text=True)
        return NOWHERE in shown.stdout

    def _neighbours(self, verb: str, *told: str) -> None:
        run("ip", "neigh", verb, self.there, *told, "dev", f"{self.name}h")
        run("ip", "-n", self.name, "neigh", verb, self.here, *told, "dev", f"{self.name}t")

    def prefix(self, *hidden: Path) -> Sequence[str]:
        """Return the words that make a command run there; the hidden directories of this machine are empty to it."""
        hide = "".join(f"mount -t tmpfs tmpfs '{directory}' && " for directory in hidden)
        return ("ip", "netns", "exec", self.name, "sh", "-c", f'{hide}exec "$@"', "sh")


@contextmanager
def open_link() -> Iterator[Link]:
    """Lay a cable; needs root, as the sandbox does."""
    # One network of four addresses for each process of tests, below that of `test_confinement`.
    number = os.getpid() % (255 * 64)
    network = f"10.213.{number // 64}.{number % 64 * 4}".rpartition(".")
    base = int(network[2])
    link = Link(f"drv{os.getpid()}", f"{network[0]}.{base + 1}", f"{network[0]}.{base + 2}")
    run("ip", "netns", "add", link.name)
    try:
        run("ip", "link", "add", f"{link.name}h", "type", "veth", "peer", "name", f"{link.name}t", "netns", link.name)
        run("ip", "addr", "add", f"{link.here}/30", "dev", f"{link.name}h")
        run("ip", "link", "set", f"{link.name}h", "up")
        run("ip", "-n", link.name, "addr", "add", f"{link.there}/30", "dev", f"{link.name}t")
        for device in ("lo", f"{link.name}t"):
            run("ip", "-n", link.name, "link", "set", device, "up")
        yield link
    finally:
        # By itself it goes with the namespace, which a busy kernel takes away later, when another may have its name.
        subprocess.run(["ip", "link", "del", f"{link.name}h"], check=False, capture_output=True)
        run("ip", "netns", "del", link.name)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
