"""Modules that may run compiled or native, and the sources that a build of them is made of.

Those of the scheduler without dataclasses: mypyc makes of a dataclass with inherited defaults one that cannot be
imported. All of them are pure and work on the event loop between pauses. What works in threads is not among them:
compiled code keeps the interpreter's lock for as long as it calls nothing but compiled code.
"""

from __future__ import annotations

from typing import Final

#: Compiled into one shared library, so that they call each other directly.
MODULES: Final = tuple(
    f"scheduler.{name}"
    for name in (
        *("admission", "builder_rules", "builders", "deadlines", "decide", "early", "ended_leases", "farm"),
        *("forsaken", "grants", "graph", "locality", "moves", "opening", "pauses", "placement", "positions"),
        *("react", "ready", "records", "references", "resource_limits", "shares", "state", "step_rules"),
        *("succession", "transitions", "wanted"),
    )
)
#: The one module in C, which has no source in Python (record 79); what imports it does without where it is not built.
NATIVE: Final = "infra.nix.verify_native"
NATIVE_SOURCE: Final = "infra/nix/verify_native.c"
#: Package whose sources say whether a build is fresh: constants and types of all of its modules are compiled in.
PACKAGE: Final = "scheduler"
