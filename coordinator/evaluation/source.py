"""Sources of an evaluation: a value of Nix, its arguments and the attributes asked of it, written as Nix reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Final

from coordinator.evaluation.model import AttrPlace, split_attr
from infra.records import record

#: The file that makes a value's tree of places.
TREE: Final = Path(__file__).with_name("tree.nix")
#: Names of the longest attribute path. A set that asks to be entered may lead to itself, and has no end then.
MAX_DEPTH: Final = 64
_ESCAPES: Final = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "${": "\\${"}


@record(frozen=True, slots=True)
class Asked:
    """One attribute path that is asked of a value."""

    #: What people call it, as `-A` takes it; empty: the whole value.
    label: str
    #: Names from the value down. Of several paths the first that exists is meant.
    paths: tuple[tuple[str, ...], ...] = ((),)


@record(frozen=True, slots=True)
class FlakeOrigin:
    """A flake that a value comes from."""

    reference: str
    #: What `nix flake metadata --json` printed of it.
    metadata: str


@record(frozen=True, slots=True)
class TreeOrigin:
    """A directory that a file lies in, or that an expression is evaluated in."""

    directory: Path


@record(frozen=True, slots=True)
class NixValue:
    """A value of Nix and what is asked of it."""

    #: What people call it: the file's name as they gave it.
    name: str
    #: A Nix expression of the value.
    expression: str
    asked: tuple[Asked, ...] = (Asked(""),)
    #: Nix expressions of the arguments that functions in it are called with, by name.
    arguments: Mapping[str, str] = field(default_factory=dict)
    #: What `builtins.currentSystem` is; empty: that of this machine.
    system: str = ""
    #: Further arguments of the evaluator: `-I PATH`, `--option NAME VALUE`, `--store DIR`.
    flags: tuple[str, ...] = ()
    #: Where it comes from, if that can be known whole.
    origin: FlakeOrigin | TreeOrigin | None = None

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Further arguments of the evaluator, with its system."""
        return (*self.flags, "--option", "system", self.system) if self.system else self.flags

    def prelude(self, token: str) -> str:
        """Return the lines that bind the visit of a place to `drover` in an evaluator."""
        return "".join(f"{name} = {expression}\n" for name, expression in self._bindings(token).items())

    def alone(self, place: AttrPlace) -> str:
        """Return an expression that visits a place, without an evaluator."""
        bindings = "".join(f"{name} = {expression}; " for name, expression in self._bindings("drover").items())
        return f"let {bindings}in {visit(place)}"

    def jobs(self, token: str) -> str:
        """Return an expression of the tree that nix-eval-jobs goes through; `token` marks what is no derivation."""
        bindings = "".join(f"{name} = {expression}; " for name, expression in self._bindings(token).items())
        return f"let {bindings}in drover_tree.jobs"

    def _bindings(self, token: str) -> dict[str, str]:
        given = "".join(f"{nix_text(name)} = (\n{text}\n); " for name, text in self.arguments.items())
        asked = _nix_list(_nix_list(_nix_list(map(nix_text, path)) for path in each.paths) for each in self.asked)
        return {
            "drover_arguments": f"{{ {given}}}",
            "drover_root": f"(\n{self.expression}\n)",
            "drover_tree": f"import {nix_path(str(TREE))} {{ token = {nix_text(token)}; args = drover_arguments; "
            f"root = drover_root; asked = {asked}; maxDepth = {MAX_DEPTH}; }}",
            "drover": "drover_tree.visit",
        }


def sources_of(
    name: str,
    expression: str,
    attrs: Sequence[str],
    *,
    flags: Sequence[str] = (),
    systems: Sequence[str] = (),
    origin: TreeOrigin | None = None,
) -> list[NixValue]:
    """Return what is to be evaluated of an expression: once for this machine's system, or for each of `systems`.

    Args:
        name: What people call the expression.
        expression: A Nix expression.
        attrs: Attribute paths as `-A` takes them; none: the whole value.
        flags: What `nix-instantiate` takes: `--arg`, `--argstr`, `-I`, `--option`, `--store`.
        systems: Where there are several, each label starts with its own.
        origin: Where the expression comes from.
    """
    arguments, others = _split_flags(flags)

    def asked(attr: str, system: str) -> Asked:
        names = [each for each in (system if len(systems) > 1 else "", attr) if each]
        return Asked(".".join(names), (split_attr(attr),))

    return [
        NixValue(
            name, expression, tuple(asked(attr, system) for attr in attrs or [""]), arguments, system, others, origin
        )
        for system in systems or [""]
    ]


def visit(place: AttrPlace) -> str:
    """Return the line that visits a place."""
    asked = "true" if place.asked else "false"
    return f"drover {asked} {place.at} {_nix_list(map(nix_text, place.path))}\n"


def _nix_list(elements: Iterable[str]) -> str:
    return f"[ {' '.join(elements)} ]"


def file_expression(file: str) -> str:
    """Write what nix-instantiate takes for a file as a Nix expression; `import` refuses a URL."""
    if file.startswith("<"):
        return f"import {file}"
    if is_url(file):
        return f"import (builtins.fetchTarball {nix_text(file)})"
    path = Path(file).absolute()
    return f"import {nix_path(str(path / 'default.nix' if path.is_dir() else path))}"


def is_flake(text: str) -> bool:
    """Return whether a person's text names an output of a flake, `REF#ATTR`."""
    return "#" in text


def is_url(file: str) -> bool:
    """Return whether nix-instantiate would fetch `file`."""
    return "://" in file or file.startswith("channel:")


def nix_path(path: str) -> str:
    """Write an absolute path as Nix reads it back, whatever its characters are."""
    return f"(/. + {nix_text(path)})"


def nix_text(text: str) -> str:
    """Write a string as Nix reads it back, on one line."""
    for plain, escaped in _ESCAPES.items():
        text = text.replace(plain, escaped)
    return f'"{text}"'


def store_root(flags: Sequence[str]) -> str:
    """Return the directory of `--store DIR`; empty: the machine's own store."""
    return flags[flags.index("--store") + 1].rstrip("/") if "--store" in flags else ""


def _split_flags(flags: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Take `--arg NAME EXPRESSION` and `--argstr NAME TEXT` out of an evaluation's flags.

    Returns Nix expressions by name, and the other flags.
    """
    arguments: dict[str, str] = {}
    others: list[str] = []
    words = iter(flags)
    for word in words:
        if word == "--arg":
            name = next(words)
            arguments[name] = next(words)
        elif word == "--argstr":
            name = next(words)
            arguments[name] = nix_text(next(words))
        else:
            others.append(word)
    return arguments, tuple(others)
