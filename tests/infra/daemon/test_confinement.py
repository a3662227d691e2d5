"""The namespaces of a daemon leave the machine as it is."""

from __future__ import annotations

import subprocess
import sys

from infra.daemon import netlink, owner
from infra.daemon.confinement import Confinement, Network
from tests.support.link import open_link
from tests.support.patience import PATIENCE_S
from workers.agent.isolation import RELAY_SWITCHES


def test_a_relay_unmounts_nothing_of_the_machine() -> None:
    """slirp4netns 1.2 took away the named network namespaces of the whole machine."""
    network = Network(("slirp4netns", *RELAY_SWITCHES), "10.213.255.0/24")
    with open_link() as link:
        words = [sys.executable, "-I", "-S", owner.__file__, *Confinement(network=network).words(), "true"]
        subprocess.run(words, check=True, timeout=PATIENCE_S)
        assert link.here in netlink.ipv4_addresses()
        subprocess.run([*link.prefix(), "true"], check=True, timeout=PATIENCE_S)
