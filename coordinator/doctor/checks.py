"""Findings about a machine: pure judgements of its facts, each with the line that mends it.

A finding is a problem where Nix will not fetch what it could, or not safely; advice where it works, but worse than it
might; fine where neither is so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit

from coordinator.doctor.facts import CacheFacts, MachineFacts, NixSettings

Level: TypeAlias = Literal["fine", "advice", "problem"]

#: Oldest Nix that this project tests.
OLDEST: Final = (2, 8)
#: Seconds that clocks may differ: certificates and signed addresses bear little more than minutes.
CLOCK_S: Final = 120.0
#: Seconds for one small answer above which thousands of them are felt.
SLOW_S: Final = 0.5
#: Packages of a lock that a sentence names.
NAMED: Final = 5
#: Room in which a closure of some size still fits.
LITTLE_BYTES: Final = 5 * 10**9
#: `name:` and 32 bytes of Ed25519 in base64.
_KEY: Final = re.compile(r"[^:\s]+:[A-Za-z0-9+/]{43}=")
_RESTART: Final = {
    True: "sudo launchctl kickstart -k system/org.nixos.nix-daemon",
    False: "sudo systemctl restart nix-daemon",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One judgement: what it is about, how it is, and the line that mends it (empty where nothing is to be mended)."""

    level: Level
    about: str
    sentence: str
    mend: str = ""


def diagnoses(facts: MachineFacts) -> list[Diagnosis]:
    """Return the judgements, in the order in which a person would mend them."""
    if not facts.nix_version:
        install = "install it, for example from https://nixos.org/download"
        return [Diagnosis("problem", "nix", "there is no Nix on PATH", install)]
    found = [*_nix(facts), *_store(facts), *_disk(facts)]
    if facts.settings is not None:
        force = in_force(facts, facts.settings)
        for cache in facts.caches:
            found += _cache(cache, facts, force)
        found += _keys(facts, force)
        found += _netrc(facts)
        found += _safety(facts, facts.settings)
    found += [Diagnosis("advice", "doctor", trouble) for trouble in facts.troubles]
    return [*found, *_plans(facts)]


def is_trusted(facts: MachineFacts, settings: NixSettings) -> bool:
    """Return whether settings of this user that concern caches count: as the store says, else by `trusted-users`."""
    if facts.trusted is not None:
        return facts.trusted
    if not facts.daemon or facts.user == "root":
        return True
    names = {"*", facts.user, *(f"@{group}" for group in facts.groups)}
    return not names.isdisjoint(settings.trusted_users)


def in_force(facts: MachineFacts, settings: NixSettings) -> NixSettings:
    """Return the settings that count: a daemon passes over what a user who is not trusted sets about caches.

    It takes such a user's caches as far as they are among the machine's trusted ones. Source: Nix, daemon.cc.
    """
    machine = facts.machine
    if machine is None or not facts.daemon or is_trusted(facts, settings):
        return settings
    allowed = {normal(url) for url in (*machine.substituters, *machine.trusted_substituters)}
    return replace(
        settings,
        substituters=tuple(url for url in settings.substituters if normal(url) in allowed),
        trusted_public_keys=machine.trusted_public_keys,
        require_sigs=machine.require_sigs,
    )


def normal(url: str) -> str:
    """Return an address as caches are compared: without its parameters and the slash at its end."""
    return url.partition("?")[0].rstrip("/")


def _nix(facts: MachineFacts) -> Iterator[Diagnosis]:
    found = re.search(r"(\d+)\.(\d+)", facts.nix_version)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        yield Diagnosis("problem", "nix", f"{facts.nix_version} is older than {oldest}", "sudo -i nix upgrade-nix")
        return
    how = "with its daemon" if facts.daemon else "without a daemon"
    yield Diagnosis("fine", "nix", f"{facts.nix_version}, {how}")


def _store(facts: MachineFacts) -> Iterator[Diagnosis]:
    if facts.store_trouble:
        restart = _RESTART[facts.settings is not None and facts.settings.system.endswith("-darwin")]
        yield Diagnosis("problem", "store", f"the store does not answer: {facts.store_trouble}", restart)


def _disk(facts: MachineFacts) -> Iterator[Diagnosis]:
    if facts.free_bytes is None:
        return
    free = f"{facts.free_bytes / 1e9:.1f} GB free below {facts.store_dir}"
    if facts.free_bytes < LITTLE_BYTES:
        yield Diagnosis("problem", "disk", free, "nix-collect-garbage --delete-older-than 30d")
    else:
        yield Diagnosis("fine", "disk", free)


def _cache(cache: CacheFacts, facts: MachineFacts, settings: NixSettings) -> Iterator[Diagnosis]:
    about = cache.url
    asked = {normal(each) for each in settings.substituters}
    if normal(cache.url) not in asked:
        # The user named it, here or in a file of their own that does not count.
        yield _not_asked(cache, facts, settings)
    if cache.trouble is not None:
        yield _trouble(cache, facts)
        return
    if cache.store_dir and cache.store_dir != facts.store_dir:
        yield Diagnosis(
            "problem", about,
            f"it has paths of {cache.store_dir}, this machine's store is {facts.store_dir}: Nix can use none of them",
            f"take {cache.url} out of substituters",
        )  # fmt: skip
        return
    if cache.clock_ahead_s is not None and abs(cache.clock_ahead_s) > CLOCK_S:
        way = "ahead of" if cache.clock_ahead_s > 0 else "behind"
        set_clock = (
            "sudo sntp -sS time.apple.com" if settings.system.endswith("-darwin") else "sudo timedatectl set-ntp true"
        )
        yield Diagnosis(
            "problem", about, f"this machine's clock is {abs(cache.clock_ahead_s):.0f} s {way} the cache's", set_clock
        )
    if cache.denied and cache.denied_until > facts.now:
        minutes = max(1, round((cache.denied_until - facts.now) / 60))
        yield Diagnosis(
            "advice", about,
            f"Nix believes that it lacks {cache.denied} paths and does not ask for them again for up to {minutes} min",
            "add --option narinfo-cache-negative-ttl 0 to the command, once",
        )  # fmt: skip
    if cache.took_s > SLOW_S:
        yield Diagnosis(
            "advice", about, f"it answers after {cache.took_s:.1f} s; Nix asks once for each path of a closure",
            f"drover cache proxy --upstream {cache.url}, and the line that it prints into nix.conf",
        )  # fmt: skip
    else:
        rank = "" if cache.priority is None else f", priority {cache.priority}"
        yield Diagnosis("fine", about, f"answers in {cache.took_s * 1000:.0f} ms{rank}")


def _not_asked(cache: CacheFacts, facts: MachineFacts, settings: NixSettings) -> Diagnosis:
    line = f"extra-substituters = {cache.url}"
    named = facts.settings is not None and normal(cache.url) in {normal(url) for url in facts.settings.substituters}
    if named:
        return Diagnosis(
            "problem", cache.url,
            f"a file of {facts.user}'s own names it, which the daemon passes over: {facts.user} is no trusted user",
            _for_the_machine(facts, line),
        )  # fmt: skip
    allowed = normal(cache.url) in {normal(each) for each in settings.trusted_substituters}
    if is_trusted(facts, settings) or allowed:
        return Diagnosis("problem", cache.url, "Nix does not ask this cache", _for_the_user(facts, line))
    return Diagnosis(
        "problem", cache.url,
        f"Nix does not ask this cache, and {facts.user} is no trusted user, so that only an administrator can add it",
        _for_the_machine(facts, line),
    )  # fmt: skip


def _for_the_user(facts: MachineFacts, line: str) -> str:
    """Return how a trusted user adds a line to the settings."""
    if facts.user == "root" and facts.conf_generated:
        return _for_the_machine(facts, line)
    return f"echo '{line}' >> {facts.conf if facts.user == 'root' else '~/.config/nix/nix.conf'}"


def _for_the_machine(facts: MachineFacts, line: str) -> str:
    """Return how an administrator adds a line to the machine's settings."""
    if facts.conf_generated:
        return f"add it to nix.settings of this machine's configuration, and switch to that: {line}"
    return f"echo '{line}' | sudo tee -a {facts.conf}, and restart the daemon"


def _trouble(cache: CacheFacts, facts: MachineFacts) -> Diagnosis:
    host = urlsplit(cache.url).hostname or cache.url
    match cache.trouble:
        case "address":
            sentence, mend = "this is no address of a cache", "write it like https://farm.example.org/cache"
        case "refused":
            known = facts.netrc is not None and not facts.netrc.machines.isdisjoint({host, "default"})
            netrc = facts.netrc.path if facts.netrc is not None else "/etc/nix/netrc"
            sentence = (
                f"it wants a token and {'did not accept the one' if known else 'there is none for it'} in {netrc}"
            )
            mend = f"put `machine {host} login drover password TOKEN` into {netrc} (mode 0600, owner root)"
        case "not_a_cache":
            sentence, mend = "what answers there is no binary cache", "check the address; a farm's cache ends in /cache"
        case "status":
            sentence, mend = f"it answered with status {cache.reason}", "ask its operator, or use --fallback meanwhile"
        case "tls":
            sentence = f"its certificate is not accepted: {cache.reason}"
            mend = "name your certificates in nix.conf: ssl-cert-file = PATH"
        case "slow":
            sentence = "it did not answer in time"
            mend = "set connect-timeout = 5 and fallback = true in nix.conf, so that it costs seconds and no build"
        case _:
            sentence = f"it cannot be reached: {cache.reason}"
            mend = "set connect-timeout = 5 and fallback = true in nix.conf, so that it costs seconds and no build"
    return Diagnosis("problem", cache.url, sentence, mend)


def _keys(facts: MachineFacts, settings: NixSettings) -> Iterator[Diagnosis]:
    for key in settings.trusted_public_keys:
        if not _KEY.fullmatch(key):
            yield Diagnosis(
                "problem", "keys", f"{key[:60]!r} in trusted-public-keys is no public key (`name:` and 44 characters)",
                "take it out of trusted-public-keys, or copy it again from the cache's owner",
            )  # fmt: skip
    known = set(settings.trusted_public_keys)
    own = set(facts.settings.trusted_public_keys if facts.settings is not None else ()) - known
    for key in (*facts.wanted_keys, *(key for key in sorted(own) if key not in facts.wanted_keys)):
        if key in known:
            yield Diagnosis("fine", "keys", f"{key.partition(':')[0]} is trusted")
            continue
        line = f"extra-trusted-public-keys = {key}"
        name = key.partition(":")[0]
        other = next((each for each in known if each.partition(":")[0] == name), None)
        said = f"the key that is trusted as {name} is another one" if other else f"the key {name} is not trusted"
        if is_trusted(facts, settings):
            mend = _for_the_user(facts, line)
            yield Diagnosis("problem", "keys", f"{said}: Nix passes over what it has signed", mend)
        else:
            yield Diagnosis(
                "problem", "keys", f"{said}, and {facts.user} is no trusted user",
                _for_the_machine(facts, line),
            )  # fmt: skip


def _netrc(facts: MachineFacts) -> Iterator[Diagnosis]:
    netrc = facts.netrc
    if netrc is None or not netrc.exists:
        return
    if netrc.open_to_all:
        yield Diagnosis(
            "problem", "netrc", f"everybody on this machine can read the tokens in {netrc.path}",
            f"sudo chmod 600 {netrc.path}",
        )  # fmt: skip
    elif netrc.unreadable and not facts.daemon:
        yield Diagnosis(
            "problem", "netrc", f"{netrc.path} cannot be read by {facts.user}: {netrc.unreadable}",
            f"chown {facts.user} {netrc.path}",
        )  # fmt: skip


def _safety(facts: MachineFacts, settings: NixSettings) -> Iterator[Diagnosis]:
    if not settings.require_sigs:
        yield Diagnosis(
            "problem", "signatures", "require-sigs is off: Nix takes whatever a cache sends",
            "set require-sigs = true in nix.conf",
        )  # fmt: skip
    if "*" in settings.trusted_users:
        yield Diagnosis(
            "problem", "trusted-users", "everybody is trusted: any user of this machine can become root through Nix",
            "set trusted-users = root in nix.conf",
        )  # fmt: skip
    if settings.sandbox == "false" and settings.system.endswith("-linux"):
        yield Diagnosis(
            "advice", "sandbox", "builds on this machine are not sandboxed", "set sandbox = true in nix.conf"
        )
    if any(plan.target.startswith(".#") or plan.target == "." for plan in facts.plans) and not settings.flakes:
        yield Diagnosis(
            "advice", "flakes", "this directory has a flake, and flakes are off",
            "set experimental-features = nix-command flakes in nix.conf",
        )  # fmt: skip


def _plans(facts: MachineFacts) -> Iterator[Diagnosis]:
    for plan in facts.plans:
        if plan.trouble:
            yield Diagnosis("advice", plan.target, f"Nix cannot tell what it would do: {plan.trouble}")
            continue
        size = f" ({plan.download} to download, {plan.unpacked} unpacked)" if plan.download else ""
        if not plan.built and not plan.fetched:
            yield Diagnosis("fine", plan.target, "all of it is here already")
        else:
            level: Level = "advice" if plan.built else "fine"
            named = ", ".join(plan.lacking[:NAMED]) + f" and {len(plan.lacking) - NAMED} more" * (
                len(plan.lacking) > NAMED
            )
            which = f" ({named}), which no cache has," if plan.lacking else ""
            sentence = f"Nix would build {plan.built} derivations{which} here and fetch {plan.fetched} paths{size}"
            mend = "have the farm build it first: drover build" if plan.built else ""
            if plan.lacking:
                mend = f"see what the farm can do about it: drover plan {plan.target}"
            yield Diagnosis(level, plan.target, sentence, mend)
