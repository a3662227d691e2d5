"""`drover cache proxy`: runs the proxy until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import uvloop

from coordinator.cache_proxy.model import ProxySettings
from coordinator.cache_proxy.proxy import running
from coordinator.cli import exit_status
from coordinator.cli.printing import size
from coordinator.stop_signals import StopSignals

#: Nix's own file of tokens.
NETRC = "/etc/nix/netrc"


def settings_of(options: Mapping[str, Any]) -> ProxySettings:
    """Return the settings that the options of the command say."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    netrc = options["netrc"]
    if netrc is None:
        netrc = NETRC if os.access(NETRC, os.R_OK) else ""
    return ProxySettings(
        upstreams=options["upstreams"],
        directory=options["directory"] or Path(home) / "drover" / "proxy",
        max_bytes=options["max_size"],
        listen=options["listen"],
        port=options["port"],
        netrc=netrc,
    )


def proxy(settings: ProxySettings) -> int:
    """Run the proxy; returns the exit status once it has ended in order."""
    logging.basicConfig(level=logging.WARNING, format="drover: %(message)s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings))
    return exit_status.OK


async def _run(settings: ProxySettings) -> None:
    signals = StopSignals.install()
    async with running(settings) as address:
        upstreams = ", ".join(settings.upstreams)
        click.echo(f"asks {upstreams}; keeps up to {size(settings.max_bytes)} in {settings.directory}")
        click.echo(f"one line for nix.conf: extra-substituters = {address}")
        await signals.stop.wait()
