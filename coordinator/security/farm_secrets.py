"""Secrets of the farm, and the fingerprints by which coordinators that share a database compare theirs.

    api-token        opens the API
    upload-secret    makes and checks the tokens of leases (`upload_tokens`)
    cache-key        signs what the farm builds, unless `signing_keys` names others; cache-NAME-key for the cache NAME
    ray-token        opens the Ray cluster

They lie in the state directory, or in `secrets_dir`, and each is made on the first start of a farm. Clients, running
builds and workers know those of the coordinator before, so the next one must have the same. The journal keeps a
*fingerprint* of each, 30 bits of a hash: enough to notice a mistake, of no use for finding the secret. Rules:

1. A standby takes over only with the same secrets and the same object store. Of the signing keys of a cache one is
   enough, so that keys can be changed at one coordinator after the other.
2. A coordinator that found no other at work may have other secrets: an operator changed them. But no key is made where
   the farm has had one, because that is a state directory that was lost, or one that never belonged to the farm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Final

from coordinator.config import DEFAULT_CACHE, CacheSettings, Settings
from coordinator.errors import CoordinatorError
from coordinator.security.tokens import load_token, read_token
from infra.cache.publishing.keys import load_key, load_or_create_key, read_keys
from infra.nix.signing import SecretKey
from infra.objects.errors import StoreUnreachableError
from infra.objects.store import ObjectStore, open_object_store

API_TOKEN: Final = "api-token"  # noqa: S105 - a file's name
UPLOAD_SECRET: Final = "upload-secret"  # noqa: S105
RAY_TOKEN: Final = "ray-token"  # noqa: S105
_STORE: Final = "object-store"

#: Fingerprints by name, as the journal keeps them: non-negative, 30 bits.
Fingerprints = Mapping[str, int]


class SuccessionError(CoordinatorError):
    """This coordinator must not take over; the sentence says what differs and what to do."""

    code: ClassVar[str] = "succession"


@dataclass(frozen=True, slots=True)
class Secrets:
    """Secrets of a coordinator; `keys` are the signing keys of each cache by its name."""

    api_token: str
    upload_secret: str
    keys: Mapping[str, Sequence[SecretKey]]
    fingerprints: Fingerprints


class Succession:
    """Loads the secrets that the settings name, and compares them with a farm's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._caches: dict[str, CacheSettings] = {DEFAULT_CACHE: settings.cache}
        self._caches.update((cache.name, cache) for cache in settings.caches)
        self._objects: ObjectStore = open_object_store(settings.objects_url)
        #: The object store's fingerprint, once it has been seen.
        self._store = 0

    async def check(self, known: Fingerprints) -> None:
        """Return whether this coordinator, as it is now, could take over from the one that left `known`.

        Raises:
            SuccessionError: it could not.
            TokenError, CacheError: what is there cannot be used.
        """
        for setting in ("derivations_database_url", "cache_database_url"):
            if self._settings.database_url(setting.partition("_")[0]).startswith("sqlite"):
                raise SuccessionError(
                    f"this coordinator cannot stand by: {setting} is not set, and the coordinator that works on the "
                    "same journal has another one; give both the same databases."
                )
        if RAY_TOKEN in known and not self._settings.ray_address:
            raise SuccessionError(
                "this coordinator cannot stand by: ray_address is not set, and the coordinator that works on the same "
                "database shares its Ray cluster; set it to the same, or running builds would be lost."
            )
        if known and (wrong := _difference(await self._present(), known, self._caches)):
            where = self._settings.secrets
            settings = "object_store_url" if wrong == _STORE else f"secrets (copy them to {where}, or set secrets_dir)"
            raise SuccessionError(
                f"this coordinator cannot stand by: its {_words(wrong)} is missing or is not that of the coordinator "
                f"that works on the same database; give both the same {settings}."
            )

    async def load(self, known: Fingerprints, *, stood_by: bool) -> Secrets:
        """Return the secrets to work with, made where they are not there; `known` is what the farm has had.

        Raises as `check`.
        """
        if stood_by:
            await self.check(known)
        for name, cache in self._caches.items():
            file = self.key_file(name)
            if not cache.signing_keys and not file.exists() and _keys_of(name, known):
                raise SuccessionError(
                    f"the farm on this database has a {_words(f'key {name}')} and {file} is not there; copy the "
                    "secrets of the coordinator that worked on it before, or set secrets_dir or signing_keys."
                )
        self._settings.secrets.mkdir(mode=0o700, parents=True, exist_ok=True)
        api_token = load_token(self._settings.secrets / API_TOKEN)
        upload_secret = load_token(self._settings.secrets / UPLOAD_SECRET)
        keys = {name: self._keys(name, cache, make=True) for name, cache in self._caches.items()}
        self._store = _fingerprint(await self._objects.write_marker())
        return Secrets(api_token, upload_secret, keys, await self._present())

    def key_file(self, cache: str) -> Path:
        """Return where the signing key of a cache lies if none is configured."""
        return self._settings.secrets / ("cache-key" if cache == DEFAULT_CACHE else f"cache-{cache}-key")

    async def _present(self) -> dict[str, int]:
        """Fingerprints of what is here."""
        fingerprints = {}
        files = {name: self._settings.secrets / name for name in (API_TOKEN, UPLOAD_SECRET)}
        if self._settings.ray_address:
            # Otherwise the cluster is this coordinator's own.
            files[RAY_TOKEN] = self._settings.ray_token_file
        for name, file in files.items():
            fingerprints[name] = _fingerprint(read_token(file)) if file.exists() else -1
        for name, cache in self._caches.items():
            for number, key in enumerate(self._keys(name, cache, make=False)):
                fingerprints[f"key {name} {number}"] = _fingerprint(str(key.public))
        fingerprints[_STORE] = await self._store_fingerprint()
        return fingerprints

    async def _store_fingerprint(self) -> int:
        if not self._store:
            try:
                self._store = _fingerprint(await self._objects.check_marker())
            except StoreUnreachableError:
                return -1
        return self._store

    def _keys(self, name: str, cache: CacheSettings, *, make: bool) -> Sequence[SecretKey]:
        if cache.signing_keys:
            return read_keys(cache.signing_keys)
        file = self.key_file(name)
        if make:
            key_name = self._settings.key_name
            return (load_or_create_key(file, key_name if name == DEFAULT_CACHE else f"{name}-{key_name}"),)
        return (load_key(file),) if file.exists() else ()


def _difference(mine: Fingerprints, known: Fingerprints, caches: Mapping[str, CacheSettings]) -> str:
    """Return the name of the first thing that differs, "" if nothing does; what only one of both has counts not."""
    for name in mine:
        if not name.startswith("key ") and name in known and mine[name] != known[name]:
            return name
    for cache in caches:
        theirs = _keys_of(cache, known)
        if theirs and not theirs & _keys_of(cache, mine):
            return f"key {cache}"
    return ""


def _keys_of(cache: str, fingerprints: Fingerprints) -> set[int]:
    return {value for name, value in fingerprints.items() if name.startswith(f"key {cache} ")}


def _words(name: str) -> str:
    words = {API_TOKEN: "API token", UPLOAD_SECRET: "upload secret", RAY_TOKEN: "Ray token", _STORE: "object store"}
    if name in words:
        return words[name]
    cache = name.removeprefix("key ")
    return "signing key" if cache == DEFAULT_CACHE else f"signing key of the cache {cache}"


def _fingerprint(secret: str) -> int:
    return int.from_bytes(sha256(f"drover mark {secret}".encode()).digest()[:4], "big") >> 2
