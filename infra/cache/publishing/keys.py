"""Signing keys, from files and from the environment: readable by their owner alone, never quoted.

A source is written as the path of a file or as `env:NAME`. Either holds one key as Nix writes it, `name:base64`, so
that `nix store sign --key-file` reads a file too. To rotate: configure the new key beside the old one and sign anew
(`resign`), tell clients the new public key, and take the old one away later.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path

from infra.cache.errors import KeyFileError
from infra.nix.errors import FormatError
from infra.nix.signing import SEED_SIZE, SecretKey, generate

#: A key file is a line of about 100 characters.
MAX_KEY_FILE_BYTES = 4096
#: What a source begins with that is a variable of the environment, not a file.
ENVIRONMENT = "env:"


def load_key(path: Path) -> SecretKey:
    """Return the key in `path`.

    Raises:
        KeyFileError: the file is missing, not a regular file, accessible to anyone but its owner, or holds no key.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KeyFileError(f"cannot read the signing key {path}: {error.strerror}") from error
    try:
        # Asked of the open file, not of the path, which might be swapped in between.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"the signing key {path} is not a regular file")
        if status.st_mode & 0o077:
            raise KeyFileError(
                f"the signing key {path} is accessible to others (mode {stat.S_IMODE(status.st_mode):04o}): "
                f"run `chmod 600 {path}`, and replace the key if somebody may have read it"
            )
        content = os.read(descriptor, MAX_KEY_FILE_BYTES)
    finally:
        os.close(descriptor)
    try:
        return SecretKey.parse(content.decode("ascii").strip())
    except (FormatError, UnicodeDecodeError):
        # Without a cause: no part of the content may reach a log.
        raise KeyFileError(f"the signing key {path} is not in the form name:base64") from None


def load_or_create_key(path: Path, name: str) -> SecretKey:
    """Return the key in `path`, made first if there is no such file; `name` is for a new key only.

    The file appears whole, with mode 0600, or not at all; of two who make it at once one wins and both use its key.

    Raises:
        KeyFileError: as `load_key`, or the file cannot be written, or `name` cannot name a key.
    """
    with suppress(FileNotFoundError):
        path.lstat()
        return load_key(path)
    try:
        key = generate(name, secrets.token_bytes(SEED_SIZE))
    except FormatError as error:
        raise KeyFileError(f"{name!r} cannot name a signing key: {error.message}") from None
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(f"{key.reveal()}\n".encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            # A link, unlike a rename, does not replace what another process may have made meanwhile.
            with suppress(FileExistsError):
                os.link(staged, path)
        finally:
            staged.unlink()
    except OSError as error:
        raise KeyFileError(f"cannot write the signing key {path}: {error.strerror}") from None
    return load_key(path)


def read_key(source: str, environment: Mapping[str, str] = os.environ) -> SecretKey:
    """Return the key that `source` names: the path of a file, or `env:NAME`, a variable with what a file would hold.

    Raises:
        KeyFileError: as `load_key`; or the variable is not set, or holds no key.
    """
    if not source.startswith(ENVIRONMENT):
        return load_key(Path(source).expanduser())
    name = source.removeprefix(ENVIRONMENT)
    try:
        return SecretKey.parse(environment[name].strip())
    except KeyError:
        raise KeyFileError(f"the environment variable {name}, which should hold a signing key, is not set") from None
    except FormatError:
        # Without a cause: no part of the content may reach a log.
        raise KeyFileError(f"the environment variable {name} holds no signing key in the form name:base64") from None


def read_keys(sources: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[SecretKey, ...]:
    """Return the keys of several sources (see `read_key`), in order; everything is signed by each of them.

    Raises:
        KeyFileError: as `read_key`, or two keys have one name: a client that knows one of them would refuse what the
            other signed.
    """
    keys = tuple(read_key(source, environment) for source in sources)
    names = [key.name for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise KeyFileError(f"two signing keys are called {name!r}: give each its own name")
    return keys


def forget_keys(sources: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Take the variables that `sources` name out of the environment, which every child process would inherit.

    To be called once all caches have read their keys, before anything is started.
    """
    for source in sources:
        if source.startswith(ENVIRONMENT):
            environment.pop(source.removeprefix(ENVIRONMENT), None)
