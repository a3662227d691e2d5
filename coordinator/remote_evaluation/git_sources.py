"""Sources of remote evaluations: refusals of requests that name none, or one that this farm does not fetch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from coordinator.api.requests import RemoteEvaluationRequest
from coordinator.errors import IntakeError
from coordinator.remote_evaluation.gateway import Gateway

_PORTS = {"https": 443, "http": 80}


def refuse_url(url: str, gateway: Gateway, schemes: Collection[str], hosts: Sequence[str]) -> None:
    """Raise `IntakeError` where the operator does not allow a git address, before anything is fetched."""
    if not hosts:
        raise IntakeError(
            "this farm fetches no git repositories; its operator names hosts in remote_evaluation.allowed_hosts, or "
            "send your working tree: leave --git out."
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise IntakeError("the address of the git repository cannot be read.") from None
    if parts.scheme not in schemes:
        raise IntakeError(
            f"this farm fetches git repositories by {', '.join(sorted(schemes))} only, and not by "
            f"{parts.scheme[:20] or 'a path'}."
        )
    if parts.username is not None or parts.password is not None:
        raise IntakeError("the address of the git repository has a name or password in it; take it out.")
    if not url.isprintable() or " " in url:
        raise IntakeError("the address of the git repository has blanks or control characters in it.")
    if not gateway.allows_host(host, port or _PORTS[parts.scheme]):
        raise IntakeError(
            f"this farm does not fetch from {host[:100]}; its operator allows {', '.join(hosts[:8])} "
            "(remote_evaluation.allowed_hosts)."
        )


def require_source(ask: RemoteEvaluationRequest) -> None:
    """Raise `IntakeError` where a request does not name one source, and one thing in it."""
    if bool(ask.tree) == bool(ask.git) or bool(ask.git) != bool(ask.rev):
        raise IntakeError("an evaluation wants `tree`, or `git` and `rev`.")
    if bool(ask.file) == bool(ask.expression):
        raise IntakeError("an evaluation wants `file` or `expression`.")
    for path in (ask.directory, ask.file.partition("#")[0]):
        if path.startswith("/") or ".." in path.split("/"):
            raise IntakeError("a path of the evaluation lies outside of the tree.")
