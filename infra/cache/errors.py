"""The root of the cache's exceptions. Every message is one sentence, and none holds a secret."""

from __future__ import annotations


class CacheError(Exception):
    """Root of all errors of this package."""


class ObjectKeyError(CacheError):
    """A text is not a key of an object: empty, too long, or with a segment that could leave the store."""


class ObjectStoreError(CacheError):
    """The object store failed: full, unreachable, refused. Trying again may help."""


class ObjectMissingError(ObjectStoreError):
    """The named object is not in the store."""


class StoreFullError(ObjectStoreError):
    """No room is left in the object store, or where uploads wait for it."""


class StoreUnreachableError(ObjectStoreError):
    """This machine does not see the farm's object store, only (at most) one of the same name."""


class CorruptNarError(CacheError):
    """An object is not the NAR that was promised. `store_path` is the full path, `reason` one clause."""

    def __init__(self, store_path: str, reason: str) -> None:
        super().__init__(f"the NAR of {store_path} is corrupt: {reason}")
        self.store_path = store_path
        self.reason = reason


class MetadataError(CacheError):
    """The metadata database failed: full, damaged, unreachable."""


class MetadataBusyError(MetadataError):
    """Others kept the metadata database locked for too long. Trying again helps."""


class ReignOverError(CacheError):
    """Another coordinator has taken over the cache; nothing was written."""


class CollectorBusyError(CacheError):
    """Another process is collecting this cache's garbage."""


class SchemaTooNewError(CacheError):
    """The metadata was written by a newer release; nothing was touched."""


class ClosureTooLargeError(CacheError):
    """A closure has more members than one answer may hold."""


class KeyFileError(CacheError):
    """A signing key cannot be used: unreadable, readable by others, or not a key. Never quotes the content."""
