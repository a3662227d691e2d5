"""Exceptions of the cache's database, keys and collector. Every message is one sentence, and none holds a secret."""

from __future__ import annotations

from infra.objects.errors import CacheError


class MetadataError(CacheError):
    """The metadata database failed: full, damaged, unreachable."""


class MetadataBusyError(MetadataError):
    """Others kept the metadata database locked for too long. Trying again helps."""


class CacheFencedError(CacheError):
    """Another coordinator has taken over the cache; nothing was written."""


class CollectorBusyError(CacheError):
    """Another process is collecting this cache's garbage."""


class SchemaTooNewError(CacheError):
    """The metadata was written by a newer release; nothing was touched."""


class ClosureTooLargeError(CacheError):
    """A closure has more members than one answer may hold."""


class KeyFileError(CacheError):
    """A signing key cannot be used: unreadable, readable by others, or not a key. Never quotes the content."""
