"""Exceptions of objects and NARs, and the root of the cache's. A message is one sentence and holds no secret."""

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


class WrongNarError(CacheError):
    """A NAR is another one than was promised."""


class CorruptNarError(CacheError):
    """An object is not the NAR that was promised. `store_path` is the full path, `reason` one clause."""

    def __init__(self, store_path: str, reason: str) -> None:
        super().__init__(f"the NAR of {store_path} is corrupt: {reason}")
        self.store_path = store_path
        self.reason = reason
