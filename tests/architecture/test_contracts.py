"""The shape of the tree: what ARCHITECTURE.md says of it, checked."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("coordinator", "workers", "scheduler", "infra")


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_ours_and_not_one_of_the_same_name_from_elsewhere(package: str) -> None:
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).is_relative_to(ROOT)


def test_the_top_level_holds_what_its_owner_fixed() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert top <= {
        "coordinator", "workers", "scheduler", "infra", "tests", "terraform", "pyproject.toml", "run", ".ci",
        ".gitignore",
        "README.md", "ARCHITECTURE.md", "THREAT_MODEL.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
    }  # fmt: skip


def test_the_lock_has_hashes_and_no_address() -> None:
    lock = (ROOT / "infra" / "requirements.lock").read_text()
    assert "://" not in lock
    assert "index" not in {line.split("=")[0].lstrip("-") for line in lock.splitlines() if line.startswith("--")}
    packages = re.split(r"\n(?=[a-z0-9])", lock.strip())
    assert all("--hash=sha256:" in package for package in packages)


def test_no_file_names_this_checkout_or_a_package_index() -> None:
    places = ["py" + "pi.org", "files.python" + "hosted", "deb.deb" + "ian.org", "registry.np" + "mjs"]
    if len(ROOT.parts) > 2:  # a checkout at /src would find its name in innocent text
        places.append(f"{ROOT}/")
    for path in tracked():
        text = path.read_bytes()
        assert not [place for place in places if place.encode() in text], path


def test_no_class_name_stands_twice_in_the_product() -> None:
    seen: dict[str, Path] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    assert node.name not in seen, f"{node.name}: {seen.get(node.name)} and {path}"
                    seen[node.name] = path


def test_every_module_says_what_it_is_for() -> None:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_a_command_with_a_short_question_imports_no_library_of_streams_models_or_servers() -> None:
    slow = "('aiohttp', 'pydantic', 'rich.text')"
    # Of infra only what sends a question, what reads its answer, and the records of both.
    own = "('infra.exchange', 'infra.decoding', 'infra.field_bounds', 'infra.records')"
    ours = "[name for name in sys.modules if name.startswith('infra.') and name not in own]"
    # Where modules are compiled, the interpreter has their finder when it starts.
    code = f"import sys; own = {{*{own}, *sys.modules}}; import coordinator.cli.status; "
    code += f"print([name for name in {slow} if name in sys.modules] + {ours})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_build_loads_late_what_few_builds_need() -> None:
    """Its first build starts the sooner: pydantic, a client of Nix's daemon, archives, trees that are sent."""
    late = "('pydantic', 'zstandard', 'infra.daemon', 'infra.nix.nar', 'coordinator.api.trees', 'coordinator.wishes',"
    late += "'coordinator.evaluation.pool', 'coordinator.evaluation.flakes', 'coordinator.cli.remote')"
    code = f"import sys, coordinator.cli.build; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_is_there_at_once() -> None:
    """Heavy libraries are imported by the command that needs them, not by `drover --help`."""
    heavy = "('ray', 'sqlalchemy', 'aiohttp', 'obstore', 'asyncio', 'tempfile')"
    # Nor are the words of other commands than the one that is called.
    others = "[name for name in sys.modules if name.endswith('_command') or name.endswith('_commands')]"
    code = f"import sys, coordinator.cli.commands; print([name for name in {heavy} if name in sys.modules] + {others})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("program", "foreign"),
    [
        # Keys sign in the coordinator alone; a worker has cryptography, to check the signatures of its inputs.
        (
            "workers.agent.agent",
            (
                "sqlalchemy",
                "alembic",
                "infra.cache.cache",
                "infra.cache.publishing.signer",
                "infra.cache.publishing.keys",
            ),
        ),
        # What a push imports is half of what a small one takes.
        (
            "coordinator.cli.cache_sending",
            (
                "sqlalchemy",
                "alembic",
                "cryptography",
                "infra.cache.cache",
                "aiohttp",
                "coordinator.client.api_client",
                "pydantic",
                "obstore",
            ),
        ),
    ],
)
def test_a_worker_and_a_push_load_no_database_and_no_keys(program: str, foreign: tuple[str, ...]) -> None:
    code = f"import sys, {program}; print([name for name in {foreign} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
