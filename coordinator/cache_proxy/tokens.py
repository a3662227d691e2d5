"""Tokens for upstreams, from a netrc file as Nix has it: the password of the entry for a host, by its name alone."""

from __future__ import annotations

import base64
import netrc
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from coordinator.cache_proxy.errors import ProxySettingsError

MAX_NETRC_BYTES: Final = 1024 * 1024


def upstream_headers(file: str, urls: tuple[str, ...]) -> Mapping[str, Mapping[str, str]]:
    """Return what to send with each request to each of `urls`; `file` is "" for none.

    Raises:
        ProxySettingsError: the file cannot be read.
    """
    if not file:
        return {url: {} for url in urls}
    try:
        if Path(file).stat().st_size > MAX_NETRC_BYTES:
            raise ProxySettingsError(f"{file} is larger than a netrc file; name another --netrc")
        entries = netrc.netrc(file)
    except OSError as error:
        raise ProxySettingsError(f"cannot read {file}: {error.strerror}; name another --netrc") from None
    except (netrc.NetrcParseError, UnicodeDecodeError):
        raise ProxySettingsError(
            f"{file} is no netrc file: `machine HOST login drover password TOKEN` is a line of one"
        ) from None
    return {url: _header(entries, urlsplit(url).hostname or "") for url in urls}


def _header(entries: netrc.netrc, host: str) -> dict[str, str]:
    entry = entries.authenticators(host)
    if entry is None:
        return {}
    login, _, password = entry
    return {"Authorization": "Basic " + base64.b64encode(f"{login}:{password or ''}".encode()).decode()}
