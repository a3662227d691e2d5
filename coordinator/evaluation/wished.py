"""Wishes that are attributes, evaluated: each becomes the derivations that it stands for, or stays with the reason.

All attributes of one flake, or of one file on one system, are one evaluation. What Nix refuses (unfree, insecure,
broken, unsupported) stays an attribute with that mark; what does not exist is left out.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Final

from coordinator.errors import CoordinatorError
from coordinator.evaluation.errors import EvaluationError
from coordinator.evaluation.findings import findings_of
from coordinator.evaluation.flakes import flake_value
from coordinator.evaluation.model import AttrPlace, EvaluatedRoot, FailedAttr, Finding, join_attr, split_attr
from coordinator.evaluation.source import Asked, NixValue, file_expression, is_url, sources_of
from coordinator.evaluation.source_plan import EvaluationMeans
from coordinator.wishes.model import (
    MAX_NOTES,
    Wish,
    WishedAttribute,
    WishedDerivation,
    WishedOutput,
    WishedPaths,
    WishList,
    WishMark,
    WishSource,
    is_known_system,
    unique,
)
from infra.nix import aterm
from infra.nix.errors import FormatError
from infra.records import record

#: Words of nixpkgs' refusals (pkgs/stdenv/generic/check-meta.nix).
_REFUSALS: Final = (
    (re.compile(r"has an unfree license|unfree", re.IGNORECASE), WishMark.UNFREE),
    (re.compile(r"is marked as insecure|insecure", re.IGNORECASE), WishMark.INSECURE),
    (re.compile(r"is marked as broken", re.IGNORECASE), WishMark.BROKEN),
    (re.compile(r"is not (?:available on|supported on)|unsupported system", re.IGNORECASE), WishMark.UNSUPPORTED),
)
#: Nix's words for an attribute that is not there.
_ABSENT: Final = re.compile(r"attribute '.*' (?:in selection path '.*' not found|missing)|does not provide attribute")


@record(frozen=True, slots=True)
class _WishGroup:
    """Wishes that one evaluation is for; `attributes` has those of one attribute together."""

    source: NixValue
    wishes: tuple[Wish, ...]


async def evaluated(
    wishes: WishList, means: EvaluationMeans, *, flags: Sequence[str], read: Callable[[str], bytes]
) -> WishList:
    """Return the list with its attributes evaluated; one without attributes is returned as it is.

    `read` returns the bytes of a .drv, and may raise a `CoordinatorError`.

    Raises:
        EvaluationError: A flake or file is not there, or no evaluator can be started.
        WishListError: Evaluated wishes contradict each other.
    """
    asked = [wish for wish in wishes.wishes if isinstance(wish.target, WishedAttribute)]
    if not asked:
        return wishes
    groups = await _groups(asked, means, flags)
    found: dict[tuple[str, str], list[Wish]] = {}
    notes: list[str] = []
    async with aclosing(findings_of([group.source for group in groups], means)) as findings:
        gathered = [each async for each in findings]
    for place, finding in sorted(gathered, key=lambda each: each[0].order):
        wish = groups[place.source].wishes[place.at]
        made = await asyncio.to_thread(_wish_of, wish, place, finding, read)
        if made is not None:
            found.setdefault(wish.key, []).append(made)
        # A flake need not have all outputs that its lock stands for.
        is_optional = wishes.source is WishSource.FLAKE_LOCK and _is_absent(finding)
        if isinstance(finding, FailedAttr) and not is_optional and len(notes) < MAX_NOTES:
            notes.append(f"{_name_at(wish, place)} on {wish.system}: {finding.error}")
    made_wishes, repeats = unique(wishes.place, _merged(wishes.wishes, found))
    systems = tuple(dict.fromkeys([*wishes.systems, *(wish.system for wish in made_wishes)]))
    if not made_wishes and notes:
        raise EvaluationError(f"{notes[0]}; correct it, or ask for what is there")
    return replace(wishes, wishes=made_wishes, systems=systems, notes=(*wishes.notes, *notes, *repeats)[:MAX_NOTES])


def described(wishes: WishList, read: Callable[[str], bytes]) -> WishList:
    """Return the list with the derivations that can be read as the paths that they make, for the systems they name."""
    found = []
    for wish in wishes.wishes:
        target = wish.target
        if isinstance(target, WishedDerivation):
            try:
                found.append(_derived(wish, target.path, target.outputs, read))
            except CoordinatorError:
                # It is not on this machine; the farm may know it.
                found.append(wish)
        else:
            found.append(wish)
    made, notes = unique(wishes.place, found)
    systems = tuple(dict.fromkeys(wish.system for wish in made)) if made != wishes.wishes else wishes.systems
    return replace(wishes, wishes=made, systems=systems, notes=(*wishes.notes, *notes)[:MAX_NOTES])


async def _groups(asked: Sequence[Wish], means: EvaluationMeans, flags: Sequence[str]) -> list[_WishGroup]:
    flakes: dict[str, list[Wish]] = {}
    files: dict[tuple[str, str], list[Wish]] = {}
    for wish in asked:
        if isinstance(wish.target, WishedAttribute) and wish.target.is_flake:
            flakes.setdefault(wish.target.source, []).append(wish)
        elif isinstance(wish.target, WishedAttribute):
            files.setdefault((wish.target.source, wish.system), []).append(wish)
    groups = []
    for reference, wishes in flakes.items():
        # Arguments are for files: a flake takes none.
        value = await flake_value(reference, flags=_settings(flags), env=means.env, on_messages=means.on_messages)
        groups.append(_WishGroup(replace(value, asked=tuple(map(_asked, wishes))), tuple(wishes)))
    for (file, system), wishes in files.items():
        attrs = [wish.target.attribute for wish in wishes if isinstance(wish.target, WishedAttribute)]
        expression = await asyncio.to_thread(_file, file)
        (source,) = sources_of(file, expression, attrs, flags=flags, systems=(system,))
        groups.append(_WishGroup(source, tuple(wishes)))
    return groups


def _settings(flags: Sequence[str]) -> tuple[str, ...]:
    """Return the flags that are no arguments of functions."""
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        if word in {"--arg", "--argstr"}:
            next(words)
            next(words)
        else:
            kept.append(word)
    return tuple(kept)


def _file(file: str) -> str:
    if not file.startswith("<") and not is_url(file) and not Path(file).exists():
        raise EvaluationError(f"{file} does not exist; name the Nix file to evaluate")
    return file_expression(file)


def _asked(wish: Wish) -> Asked:
    """Return the places where an attribute may stand, as `nix build` looks for packages."""
    attribute = wish.target.attribute if isinstance(wish.target, WishedAttribute) else ""
    names = split_attr(attribute)
    if len(names) > 2 and names[0] == "packages":
        return Asked(attribute, (names, ("legacyPackages", *names[1:]), names[2:]))
    return Asked(attribute, (names,))


def _is_absent(finding: Finding) -> bool:
    return isinstance(finding, FailedAttr) and _ABSENT.search(finding.text or finding.error) is not None


def _name_at(wish: Wish, place: AttrPlace) -> str:
    return join_attr(wish.name, place.path) if place.path else wish.name


def _wish_of(wish: Wish, place: AttrPlace, finding: Finding, read: Callable[[str], bytes]) -> Wish | None:
    """Return what an attribute turned out to be; None where it is no package."""
    name = _name_at(wish, place)
    if isinstance(finding, FailedAttr):
        if _is_absent(finding):
            return None
        text = finding.text or finding.error
        marks = frozenset(mark for pattern, mark in _REFUSALS if pattern.search(text))
        return replace(wish, name=name, marks=wish.marks | marks)
    if not isinstance(finding, EvaluatedRoot):
        return None
    return _derived(replace(wish, name=name), finding.drv, finding.outputs, read)


def _derived(wish: Wish, drv: str, wanted: tuple[str, ...], read: Callable[[str], bytes]) -> Wish:
    """Return a wish for outputs of a derivation, none: all; what `read` raises is passed on."""
    unread = replace(wish, target=WishedDerivation(drv, wanted))
    try:
        derivation = aterm.parse(read(drv))
    except FormatError:
        return unread
    system = derivation.system if is_known_system(derivation.system) else wish.system
    names = wanted or tuple(output.name for output in derivation.outputs)
    outputs = tuple(WishedOutput(each.name, each.path) for each in derivation.outputs if each.name in names)
    others = tuple(WishedOutput(each.name, each.path) for each in derivation.outputs if each.name not in names)
    if len(outputs) < len(names) or not all(output.path for output in (*outputs, *others)):
        # Its paths are known after the build alone, or it has no such output.
        return replace(unread, system=system)
    return replace(wish, system=system, target=WishedPaths(outputs, drv, "", others))


def _merged(wishes: Sequence[Wish], found: Mapping[tuple[str, str], Sequence[Wish]]) -> Iterator[Wish]:
    for wish in wishes:
        if isinstance(wish.target, WishedAttribute):
            yield from found.get(wish.key, ())
        else:
            yield wish
