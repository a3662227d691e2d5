"""Addresses in settings: of databases, and of what speaks HTTP."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit


def server_url(url: str) -> str:
    """Return the address of a database server, "" for a file or none."""
    return url if url.startswith("postgresql") else ""


def cache_database_url(url: str, name: str) -> str:
    """Return the address of a named cache's metadata: a file beside that of the default cache, or a schema."""
    parts = urlsplit(url)
    if parts.scheme.startswith("sqlite"):
        file = Path(parts.path)
        return f"{parts.scheme}://{file.with_name(f'cache-{name}{file.suffix}')}?{parts.query}".rstrip("?")
    schema = f"cache_{name.replace('-', '_')}"
    query = "&".join(filter(None, (parts.query, f"options=-csearch_path%3D{schema}")))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))


def is_http_address(text: str) -> bool:
    """Return whether a text is the address of something that speaks HTTP."""
    try:
        parts = urlsplit(text)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:
        return False
