"""Sizes of modules and functions, and modules that nothing uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("coordinator", "workers", "scheduler", "infra")
MODULE_LINES = 500
FUNCTION_LINES = 70
#: Modules that are longer, and why: none by now. An entry that is not needed any more fails the test.
LONG_MODULES: dict[str, str] = {}
#: Functions that are longer, and why.
LONG_FUNCTIONS = {
    "scheduler.state.apply": "one match over all facts: a case each",
}
#: Modules that no other module imports, and who does.
USED_FROM_ELSEWHERE = {
    "infra.compiled.build": "./run compile",
    "infra.compiled.extension": "python -m of infra.compiled.build",
    "infra.cache.catalog.migrations.env": "alembic",
    "infra.cache.catalog.migrations.versions.v0001_baseline": "alembic",
    "infra.cache.catalog.migrations.versions.v0002_reign": "alembic",
    "coordinator.intake.verifier_child": "a process of its own",
    "infra.cache.catalog.migrations.versions.v0003_contents": "alembic",
    "infra.cache.catalog.migrations.versions.v0004_recorded": "alembic",
    "scheduler.invariants": "what tests and the simulation hold the core against, kept beside it",
}


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the product by its dotted name."""
    found = {}
    for program in PROGRAMS:
        for path in sorted((ROOT / program).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = (path, ast.parse(path.read_text()))
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """The names that a module imports, at its top or later."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_is_longer_than_what_one_reads_at_a_time() -> None:
    long = {name for name, (path, _) in modules().items() if len(path.read_text().splitlines()) > MODULE_LINES}
    assert long == LONG_MODULES.keys()


def test_no_function_is_longer_than_a_screen_or_two() -> None:
    long = {
        f"{name}.{node.name}"
        for name, (_, tree) in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES
    }
    assert long == LONG_FUNCTIONS.keys()


def test_every_module_is_imported_by_another_one_or_is_an_entry_point() -> None:
    users = {used for name, (_, tree) in modules().items() for used in imported(tree) if used != name}
    unused = {name for name, (path, _) in modules().items() if path.name != "__init__.py"} - users
    assert unused == USED_FROM_ELSEWHERE.keys()
