"""An asyncio client of the Nix daemon's worker protocol.

`wire` is the codec without I/O, `values` what travels, `events` what a build reports, `child` and `channel` the stream,
`framed` uploads, `conversation` and `connection` the requests, `opening` makes one, `proxy` what stands between another
client and a daemon. Everything that other rooms need is named here.
"""

from infra.daemon.confinement import UNCONFINED, Confinement, Network
from infra.daemon.connection import BuildInOneGo, DaemonConnection
from infra.daemon.control_groups import ControlGroups
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
from infra.daemon.opening import open_socket, open_stdio
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
    "open_socket",
    "open_stdio",
]
