"""Errors between this process and a Nix daemon.

Only `DaemonOperationError` and `DaemonSourceError` leave a connection usable. After any other error, and after a
cancelled call, every further call raises `DaemonGone` with the first reason.
"""


class DaemonError(Exception):
    """Root of every error that infra.daemon raises."""


class DaemonProtocolError(DaemonError):
    """The peer sent bytes that the worker protocol does not allow, or more of them than a named limit."""


class DaemonUnsupportedError(DaemonError):
    """The peer speaks a version of the protocol that is too old for this client (before 1.32, Nix 2.4)."""


class DaemonGone(DaemonError):  # noqa: N818 - "gone" is the fact; callers read `except DaemonGone`
    """The connection ended: the peer hung up or died, could not be reached, or the connection was given up before.

    Attributes:
        unanswered: No byte came back for the request: the daemon was gone before, or did not take it up.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.unanswered = False


class DaemonSourceError(DaemonError):
    """The bytes that the caller gave for an upload are not as many as it declared. The connection stays usable."""


class DaemonOperationError(DaemonError):
    """The daemon refused or failed one operation and sent the reason. The connection stays usable.

    Attributes:
        level: Verbosity level that the daemon gave the error; 0 is error.
        message: The daemon's text without terminal escapes.
        builder_ran: The request was a build, and its builder had been started.
    """

    def __init__(self, level: int, message: str) -> None:
        super().__init__(message)
        self.level = level
        self.message = message
        self.builder_ran = False
