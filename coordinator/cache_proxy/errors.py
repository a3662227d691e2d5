"""Exceptions of the proxy. Every message is one sentence with a way on."""

from __future__ import annotations

from typing import ClassVar

from coordinator.errors import CoordinatorError


class ProxyError(CoordinatorError):
    """The proxy cannot start, or cannot go on."""

    code: ClassVar[str] = "proxy"


class ProxySettingsError(ProxyError):
    """Settings that no proxy can have."""

    code: ClassVar[str] = "proxy_settings"
