"""Words of an evaluation: places of a value, and what stands there.

A *place* is one attribute of one evaluated value. A visit of a place ends in one *finding*: a
derivation, the places below it, something that is left out as Nix leaves it out, nothing, or an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from coordinator.api.root_limits import RootLimits
from infra.nix.store_path import drv_name_of
from infra.records import record

#: Attributes that a sentence names; it counts the rest.
MAX_NAMED = 8
#: What Nix prints of an attribute's name without quotes, and all that it looks at inside of a set.
BARE_NAME = re.compile(r"[A-Za-z_][-A-Za-z0-9_+]*")
_NUMBER = re.compile(r"[0-9]+")
_ATTR_NAME = re.compile(r'(?:"[^"]*"|[^."])+')
_DRV = re.compile(r"(/[^!]+/[0-9a-z]{32}-[^/!]+\.drv)(?:!([^!]+))?")


@record(frozen=True, slots=True)
class AttrPlace:
    """One attribute of an evaluated value."""

    #: Index of the evaluated value.
    source: int
    #: Index of the asked attribute path that it lies at or below.
    at: int
    #: Names (and indices of lists) from there.
    path: tuple[str, ...] = ()
    #: Whether it was asked for itself, as with `-A`, and not found in a set that was entered.
    asked: bool = True

    def below(self, name: str, *, asked: bool) -> AttrPlace:
        """Return the place of one name (or index) below this one."""
        return AttrPlace(self.source, self.at, (*self.path, name), asked)

    @property
    def order(self) -> tuple[int, int, tuple[tuple[int, bytes], ...]]:
        """Sorts places as Nix goes through them: the names of a set by their bytes, the elements of a list by index."""
        return self.source, self.at, tuple((int(name) if name.isdecimal() else -1, name.encode()) for name in self.path)


@record(frozen=True, slots=True)
class EvaluatedRoot:
    """One derivation that an attribute stands for; `outputs` empty: all of them."""

    #: The attribute's path as `-A` takes it; the derivation's name where the whole file is that derivation.
    attr: str
    #: Full store path.
    drv: str
    outputs: tuple[str, ...] = ()
    #: What its `meta` says; None where it says nothing.
    limits: RootLimits | None = None
    #: What its `meta` calls its maintainers, by their first name of these: on GitHub, name, address.
    maintainers: tuple[str, ...] = ()


@record(frozen=True, slots=True)
class LeftOut:
    """An attribute that nothing was built of, though it may hold derivations, as Nix leaves it out."""

    attr: str
    #: Whether it is a set that does not ask to be entered; else its name has characters that Nix passes over.
    is_set: bool


@record(frozen=True, slots=True)
class FailedAttr:
    """An attribute that could not be evaluated."""

    #: Its path as `-A` takes it; empty: the file itself.
    attr: str
    #: The first line of Nix's error, without "error:".
    error: str
    #: All that Nix printed of it, with the trace.
    text: str = ""
    #: `FILE:LINE:COLUMN` of the innermost place that Nix names; empty where it names none.
    position: str = ""


Finding = EvaluatedRoot | LeftOut | FailedAttr


@record(frozen=True, slots=True)
class Evaluation:
    """Result of an evaluation of attributes."""

    wanted: tuple[EvaluatedRoot, ...]
    left_out: tuple[LeftOut, ...] = ()
    failed: tuple[FailedAttr, ...] = ()
    #: Further attributes of derivations that are wanted already.
    aliases: tuple[EvaluatedRoot, ...] = ()


def parse_drv(text: str) -> EvaluatedRoot | None:
    """Read `/nix/store/….drv` or `/nix/store/….drv!out,dev`; None if it is neither."""
    match = _DRV.fullmatch(text)
    if match is None:
        return None
    outputs = tuple(match[2].split(",")) if match[2] else ()
    return EvaluatedRoot(drv_name_of(match[1]), match[1], outputs)


def split_attr(attr: str) -> tuple[str, ...]:
    """Split an attribute path as Nix does: at dots outside double quotes."""
    return tuple(name.replace('"', "") for name in _ATTR_NAME.findall(attr) if name)


def join_attr(asked: str, path: Sequence[str]) -> str:
    """Return the attribute path of a place; names with other characters than Nix prints bare stand in quotes."""
    names = [name if BARE_NAME.fullmatch(name) or _NUMBER.fullmatch(name) else f'"{name}"' for name in path]
    return ".".join(([asked] if asked else []) + names)


def some(names: Sequence[str]) -> str:
    """Return the first of `names` as one text, with how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def left_out_text(file: str, left_out: Sequence[LeftOut]) -> str:
    """Return the message about attributes that were left out; empty where there are none."""
    if not left_out:
        return ""
    advice = f"-A '{left_out[0].attr}'" if '"' in left_out[0].attr else f"-A {left_out[0].attr}"
    if any(each.is_set for each in left_out):
        advice += " or with recurseForDerivations = true in the set"
    names = some([each.attr for each in left_out])
    return f"left out of {file}, as Nix leaves them out: {names}; build them with {advice}"
