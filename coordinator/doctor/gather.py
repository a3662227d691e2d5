"""Gathering of facts: Nix's own answers, files of this machine, and one question to each cache.

Nothing is changed and nothing is sent but a request for `nix-cache-info`, with the password that Nix itself would send.
"""

from __future__ import annotations

import asyncio
import base64
import getpass
import grp
import netrc
import os
import re
import shutil
import sqlite3
import ssl
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import orjson

from coordinator.client.errors import reason_of
from coordinator.doctor.checks import normal
from coordinator.doctor.dry_runs import dry_run, last_line, lock_plans
from coordinator.doctor.facts import CacheFacts, CacheTrouble, MachineFacts, Netrc, NixSettings, Plan
from infra.exchange import AddressError, Answer, BadAnswerError, exchange
from infra.process import Completed, ProcessError, ProcessNotFound, run

#: Seconds for a question to Nix, for an answer of a cache.
ASK_S: Final = 30.0
CACHE_S: Final = 10.0
MAX_OUTPUT_BYTES: Final = 16 * 1024 * 1024
MAX_CONF_BYTES: Final = 1024 * 1024
MAX_NETRC_BYTES: Final = 1024 * 1024
#: Caches that are asked, and lines that are read of what one says of itself.
MAX_CACHES: Final = 20
MAX_INFO_LINES: Final = 100
#: Directories, buckets, other machines' stores: Nix asks them in ways of their own.
_NOT_HTTP: Final = frozenset({"file", "s3", "ssh", "ssh-ng", "local", "daemon", "unix"})
_FEATURES: Final = ("--extra-experimental-features", "nix-command")
#: Settings without those of the user. Source: Nix manual, nix.conf.
_NO_USER_FILES: Final = {"NIX_USER_CONF_FILES": os.devnull, "NIX_CONFIG": ""}
#: Number of the feature in Nix up to 2.17, which show numbers.
_FLAKES: Final = 2
_SOCKET: Final = "/nix/var/nix/daemon-socket/socket"


async def gather(
    caches: Sequence[str], keys: Sequence[str], directory: Path, env: Mapping[str, str], *, plan: bool
) -> MachineFacts:
    """Return what can be found out about this machine, the caches its Nix asks and those that are named.

    Args:
        caches: Addresses that should be among the substituters.
        keys: Public keys that should be trusted.
        directory: Where a flake or a file is looked for.
        env: Environment of Nix.
        plan: Ask Nix what it would do for the directory, which evaluates it.
    """
    version = await _nix(["--version"], env)
    user, groups = _user()
    facts = MachineFacts("" if version is None else _text(version), user, groups, time.time(), wanted_keys=tuple(keys))
    if version is None:
        return facts
    troubles: list[str] = []
    settings = await _settings(env, troubles)
    machine = await _settings({**env, **_NO_USER_FILES}, troubles) if settings is not None else None
    store, trusted = await _store(env)
    conf, generated = await asyncio.to_thread(_conf, env)
    file = _netrc(settings.netrc_file) if settings is not None else None
    wanted = {normal(url): url for url in caches}
    asked = {normal(url): url for url in (settings.substituters if settings is not None else ())}
    urls = [*wanted.values(), *(url for name, url in asked.items() if name not in wanted)]
    if len(urls) > MAX_CACHES:
        troubles.append(f"{len(urls) - MAX_CACHES} more caches were not asked")
    found = await asyncio.gather(*(_cache(url, normal(url) in wanted, file) for url in urls[:MAX_CACHES]))
    ttl_s = settings.negative_ttl_s if settings is not None else 0
    denied = await asyncio.to_thread(_denied, env, ttl_s)
    usage = shutil.disk_usage(_existing(Path("/nix/store")))
    return replace(
        facts,
        settings=settings,
        machine=machine,
        conf=conf,
        conf_generated=generated,
        daemon=_uses_daemon(env, user),
        store_trouble=store,
        trusted=trusted,
        netrc=file,
        caches=tuple(_with_denied(each, denied) for each in found),
        free_bytes=usage.free,
        total_bytes=usage.total,
        plans=await _plans(directory, env, settings) if plan else (),
        troubles=tuple(troubles),
    )


def _user() -> tuple[str, frozenset[str]]:
    names = set()
    for group in os.getgroups():
        try:
            names.add(grp.getgrgid(group).gr_name)
        except KeyError:
            continue
    try:
        return getpass.getuser(), frozenset(names)
    except (KeyError, OSError):
        return str(os.getuid()), frozenset(names)


async def _nix(arguments: Sequence[str], env: Mapping[str, str], timeout_s: float = ASK_S) -> Completed | None:
    """Run `nix`; None where there is none. Raises `ProcessError` otherwise."""
    try:
        return await run(["nix", *arguments], env=env, timeout_s=timeout_s, max_output_bytes=MAX_OUTPUT_BYTES)
    except ProcessNotFound:
        return None


async def _settings(env: Mapping[str, str], troubles: list[str]) -> NixSettings | None:
    done: Completed | None = None
    # The first is older, and was taken out in 2024.
    for words in (("show-config", "--json"), ("config", "show", "--json")):
        try:
            done = await _nix([*words, *_FEATURES], env)
        except ProcessError as error:
            troubles.append(f"Nix does not show its settings: {error}")
            return None
        if done is not None and done.returncode == 0:
            break
    try:
        values = {name: each.get("value") for name, each in orjson.loads(done.stdout if done else b"").items()}
        return _read_settings(values)
    except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
        said = last_line(done.stderr) if done else ""
        troubles.append(f"Nix does not show its settings: {said or 'its answer cannot be read'}")
        return None


def _read_settings(values: Mapping[str, Any]) -> NixSettings:
    def words(name: str) -> tuple[str, ...]:
        value = values.get(name) or ()
        return tuple(value.split()) if isinstance(value, str) else tuple(map(str, value))

    sandbox = values.get("sandbox", True)
    features = values.get("experimental-features") or ()
    return NixSettings(
        substituters=words("substituters"),
        trusted_substituters=words("trusted-substituters"),
        trusted_public_keys=words("trusted-public-keys"),
        trusted_users=words("trusted-users"),
        netrc_file=str(values.get("netrc-file") or "/etc/nix/netrc"),
        system=str(values.get("system") or ""),
        require_sigs=bool(values.get("require-sigs", True)),
        sandbox=str(sandbox).lower(),
        negative_ttl_s=int(values.get("narinfo-cache-negative-ttl") or 0),
        flakes="flakes" in features or _FLAKES in features,
    )


async def _store(env: Mapping[str, str]) -> tuple[str, bool | None]:
    """Return why the store does not answer ("" where it does), and whether it trusts this user, where it says so."""
    try:
        done = await _nix(["store", "ping", *_FEATURES], env)
    except ProcessError as error:
        return str(error), None
    if done is None or done.returncode != 0:
        return last_line(done.stderr) if done else "", None
    # Newer versions print it there, older ones nothing.
    found = re.search(r"^Trusted: *([01])$", (done.stdout + done.stderr).decode(errors="replace"), re.MULTILINE)
    return "", None if found is None else found[1] == "1"


def _conf(env: Mapping[str, str]) -> tuple[str, bool]:
    """Return the file for an administrator's own lines, and whether a program writes it anew.

    Determinate Nix replaces nix.conf, which includes nix.custom.conf for others' lines; nix-darwin and NixOS make it a
    link to what they wrote.
    """
    file = Path(env.get("NIX_CONF_DIR") or "/etc/nix", "nix.conf")
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_CONF_BYTES)
    except OSError:
        return str(file), False
    if re.search(rb"^!?include +(\S*/)?nix[.]custom[.]conf *$", text, re.MULTILINE):
        return str(file.with_name("nix.custom.conf")), False
    return str(file), file.is_symlink()


def _uses_daemon(env: Mapping[str, str], user: str) -> bool:
    remote = env.get("NIX_REMOTE", "")
    if remote:
        return remote == "daemon" or remote.startswith("unix:")
    return user != "root" and Path(_SOCKET).exists()


def _netrc(path: str) -> Netrc:
    try:
        status = Path(path).stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return Netrc(path, exists=not missing, unreadable="" if missing else reason_of(error))
    open_to_all = bool(status.st_mode & stat.S_IROTH)
    if status.st_size > MAX_NETRC_BYTES:
        return Netrc(path, exists=True, open_to_all=open_to_all, unreadable=f"it has {status.st_size} bytes")
    try:
        hosts = frozenset(netrc.netrc(path).hosts)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is malformed"
        return Netrc(path, exists=True, open_to_all=open_to_all, unreadable=reason)
    return Netrc(path, exists=True, machines=hosts, open_to_all=open_to_all)


class _CacheError(Exception):
    """A cache did not say what it is."""

    def __init__(self, trouble: CacheTrouble, reason: str = "") -> None:
        super().__init__(trouble)
        self.trouble = trouble
        self.reason = reason


async def _cache(url: str, wanted: bool, file: Netrc | None) -> CacheFacts:
    found = CacheFacts(url, wanted=wanted)
    scheme = urlsplit(normal(url)).scheme
    if scheme in _NOT_HTTP:
        return found
    began, sent_at = time.monotonic(), time.time()
    try:
        answer = await _info(normal(url), file)
        found = replace(found, took_s=time.monotonic() - began, clock_ahead_s=_ahead(answer, sent_at))
        fields = _fields(answer)
    except _CacheError as fault:
        return replace(found, trouble=fault.trouble, reason=fault.reason)
    priority = fields.get("Priority", "")
    return replace(found, store_dir=fields["StoreDir"], priority=int(priority) if priority.isdecimal() else None)


async def _info(url: str, file: Netrc | None) -> Answer:
    """Request `nix-cache-info`. Raises `_CacheError`."""
    try:
        headers = _credentials(urlsplit(url).hostname or "", file)
        async with asyncio.timeout(CACHE_S):
            return await exchange(
                "GET", f"{url}/nix-cache-info", params={}, headers=headers, body=None, connect_s=CACHE_S
            )
    except (AddressError, ValueError):
        raise _CacheError("address") from None
    except TimeoutError:
        raise _CacheError("slow") from None
    except ssl.SSLError as error:
        raise _CacheError("tls", error.reason or str(error)) from None
    except BadAnswerError:
        raise _CacheError("not_a_cache") from None
    except OSError as error:
        raise _CacheError("unreachable", reason_of(error)) from None


def _fields(answer: Answer) -> dict[str, str]:
    """Return what a cache says of itself. Raises `_CacheError` where it does not."""
    if answer.status in {401, 403}:
        raise _CacheError("refused")
    if answer.status >= 500:
        raise _CacheError("status", str(answer.status))
    lines = answer.body.decode(errors="replace").splitlines()[:MAX_INFO_LINES]
    fields = {name: value.strip() for name, found, value in (line.partition(":") for line in lines) if found}
    if answer.status != 200 or "StoreDir" not in fields:
        raise _CacheError("not_a_cache")
    return fields


def _credentials(host: str, file: Netrc | None) -> dict[str, str]:
    """Return the header that Nix would send: the password of netrc, by the host alone."""
    if file is None or not file.exists or file.unreadable:
        return {}
    entry = netrc.netrc(file.path).authenticators(host)
    if entry is None:
        return {}
    login, _, password = entry
    return {"Authorization": "Basic " + base64.b64encode(f"{login}:{password or ''}".encode()).decode()}


def _ahead(answer: Answer, sent_at: float) -> float | None:
    try:
        return sent_at - parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def _denied(env: Mapping[str, str], ttl_s: int) -> dict[str, tuple[int, float]]:
    """Return by cache how many paths Nix believes that it lacks, and until when; of this user's own memory.

    Source: Nix, nar-info-disk-cache.cc. A daemon has one of its own, which only its user can read.
    """
    home = env.get("XDG_CACHE_HOME") or str(Path(env.get("HOME") or "/") / ".cache")
    found: dict[str, tuple[int, float]] = {}
    for file in sorted(Path(home, "nix").glob("binary-cache-v[0-9]*.sqlite")):
        try:
            with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=1.0)) as database:
                rows = database.execute(
                    "select c.url, count(*), max(n.timestamp) from NARs n join BinaryCaches c on n.cache = c.id "
                    "where n.present = 0 and n.timestamp > ? group by c.url",
                    (time.time() - ttl_s,),
                ).fetchall()
        except sqlite3.Error:
            # Another version's, or in use: it is only advice.
            continue
        for url, count, newest in rows:
            before, until = found.get(normal(url), (0, 0.0))
            found[normal(url)] = (before + count, max(until, newest + ttl_s))
    return found


def _with_denied(cache: CacheFacts, denied: Mapping[str, tuple[int, float]]) -> CacheFacts:
    count, until = denied.get(normal(cache.url), (0, 0.0))
    return replace(cache, denied=count, denied_until=until)


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


async def _plans(directory: Path, env: Mapping[str, str], settings: NixSettings | None) -> tuple[Plan, ...]:
    """Return what Nix would do for the flake or the file of a directory; nothing where there is none."""
    features = ("--extra-experimental-features", "nix-command flakes")
    system = settings.system if settings is not None else ""
    plans = await lock_plans(directory, system, env) if system else []
    if (directory / "flake.nix").exists():
        for target in (".", f".#devShells.{system}.default"):
            command = ["nix", "build", "--dry-run", "--no-link", target, *features]
            plans.append(await dry_run(target, command, directory, env))
        # A flake need not have both.
        found = [plan for plan in plans if not plan.trouble]
        return tuple(found or plans[:1])
    if plans:
        return tuple(plans)
    for name, more in (("default.nix", ()), ("shell.nix", ("-A", "inputDerivation"))):
        if (directory / name).exists():
            command = ["nix-build", "--dry-run", "--no-out-link", name, *more]
            plans.append(await dry_run(name, command, directory, env))
    return tuple(plans)


def _text(done: Completed) -> str:
    return done.stdout.decode(errors="replace").strip()
