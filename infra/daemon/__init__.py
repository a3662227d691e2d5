"""An asyncio client of the Nix daemon's worker protocol.

`wire` is the codec without I/O, `values` what travels, `events` what a build reports, `bare_child`, `child` and
`channel` the stream, `framed` uploads, `conversation` and `connection` the requests, `opening` makes one, `proxy` what
stands between another client and a daemon. Everything that other rooms need is named here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from infra.daemon.connection import BuildInOneGo, DaemonConnection
from infra.daemon.errors import (
    DaemonError,
    DaemonGone,
    DaemonOperationError,
    DaemonProtocolError,
    DaemonSourceError,
    DaemonUnsupportedError,
)
from infra.daemon.events import BuildEvent, Message, Phase, PrintedLines
from infra.daemon.framed import Upload
from infra.daemon.opening import open_questions, open_socket, open_stdio
from infra.daemon.values import (
    BasicDerivation,
    BasicOutput,
    BuildMode,
    BuildResult,
    BuildStatus,
    Collected,
    GcAction,
    Options,
)

if TYPE_CHECKING:
    from infra.daemon.confinement import UNCONFINED, Confinement, Network
    from infra.daemon.control_groups import ControlGroups

__all__ = [
    "UNCONFINED",
    "BasicDerivation",
    "BasicOutput",
    "BuildEvent",
    "BuildInOneGo",
    "BuildMode",
    "BuildResult",
    "BuildStatus",
    "Collected",
    "Confinement",
    "ControlGroups",
    "DaemonConnection",
    "DaemonError",
    "DaemonGone",
    "DaemonOperationError",
    "DaemonProtocolError",
    "DaemonSourceError",
    "DaemonUnsupportedError",
    "GcAction",
    "Message",
    "Network",
    "Options",
    "Phase",
    "PrintedLines",
    "Upload",
    "open_questions",
    "open_socket",
    "open_stdio",
]

#: Names that only builds need -> their module: a question to a store does not wait until these are imported.
_OF_BUILDS: Final = {
    "UNCONFINED": "confinement",
    "Confinement": "confinement",
    "ControlGroups": "control_groups",
    "Network": "confinement",
}


def __getattr__(name: str) -> Any:
    """Return a name that only builds need. Raises `AttributeError`."""
    if name not in _OF_BUILDS:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{_OF_BUILDS[name]}"), name)
