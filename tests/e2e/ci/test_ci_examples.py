"""Examples for continuous integration: each is parsed, and its commands run as its forge would run them, on a farm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.support.farm import Farm
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "infra" / "deploy" / "ci"
#: Steps that are the forge's own, whose effect is there already: a checkout, and a Nix.
ACTIONS = {"actions/checkout@v4", "cachix/install-nix-action@v31", "actions/upload-artifact@v4"}
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
STEP_S = PATIENCE_S


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel of this checkout, made without an index."""
    source = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    wheels = tmp_path_factory.mktemp("wheels")
    offline = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(wheels), str(source)]
    subprocess.run(command, check=True, timeout=STEP_S)
    [made] = wheels.glob("drover-*.whl")
    return made


@dataclass
class Job:
    """A job on a runner of its own: a checkout, a home, temporary files and a Nix store that has nothing in it."""

    directory: Path
    environment: dict[str, str]
    token: str
    output: str = ""
    status: int = 0
    #: Command lines in which the token was seen.
    leaks: list[bytes] = field(default_factory=list)

    @property
    def checkout(self) -> Path:
        return self.directory / "checkout"

    def run(self, script: str, env: Mapping[str, str], shell: tuple[str, ...] = ("bash", "-eo", "pipefail")) -> int:
        """Run a script as a forge does: from a file, in the checkout, in the runner's own name space."""
        file = self.directory / "script"
        file.write_text(script)
        # The runner is another machine: its /nix is its own.
        mounted = 'mount --bind "$0" /nix && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mounted, str(self.directory / "nix"), *shell, str(file)]
        with self._watching():
            done = subprocess.run(
                command,
                cwd=self.checkout,
                env={**self.environment, **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=STEP_S,
                check=False,
            )
        self.output += done.stdout.decode()
        self.status = done.returncode
        return done.returncode

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Read the command lines of the job's processes again and again, as any user of the machine could."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,))
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _watch(self, ended: threading.Event) -> None:
        # What ran before cannot be the job's, and reading all of a busy machine takes half of a processor.
        before = {*Path("/proc").iterdir()}
        while not ended.wait(0.05):
            now = {*Path("/proc").iterdir()}
            before &= now
            for process in now - before:
                with contextlib.suppress(OSError):
                    command = (process / "cmdline").read_bytes()
                    if self.token.encode() in command:
                        self.leaks.append(command)


@pytest.fixture
def job(farm: Farm, wheel: Path, tmp_path: Path) -> Job:
    for name in ("checkout", "nix", "home", "temporary", "etc"):
        (tmp_path / name).mkdir()
    # A single-user Nix of root's, as in a container.
    (tmp_path / "etc/nix.conf").write_text("build-users-group =\nsubstituters =\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
        "NIX_CONF_DIR": str(tmp_path / "etc"),
        "LANG": "C.UTF-8",
        "CI": "true",
        # The drover of this checkout, whose dependencies are those of the tests: no index is asked.
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PYTHONPATH": sysconfig.get_paths()["purelib"],
    }
    token = (farm.secrets / "api-token").read_text().strip()
    return Job(tmp_path, environment, token)


@dataclass
class Settings:
    """Variables and the secret of a repository."""

    variables: dict[str, str]
    token: str


@pytest.fixture
def settings(farm: Farm, wheel: Path, job: Job) -> Settings:
    variables = {"DROVER_URL": farm.url, "DROVER_CACHE_KEY": farm.public_keys, "DROVER_REQUIREMENT": str(wheel)}
    return Settings(variables, job.token)


def evaluated(text: str, contexts: Mapping[str, str]) -> str:
    """Put the values of the forge's expressions into a value of a workflow."""
    return _EXPRESSION.sub(lambda found: contexts[found[1]], text)


def run_workflow(name: str, job: Job, settings: Settings) -> None:
    """Run the steps of a workflow as GitHub's and Forgejo's runners do."""
    workflow: dict[Any, Any] = yaml.safe_load((EXAMPLES / name).read_text())
    [steps_of] = workflow["jobs"].values()
    temporary = job.directory / "runner"
    temporary.mkdir()
    files = {each: job.directory / each.lower() for each in ("GITHUB_PATH", "GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.touch()
    contexts = {f"vars.{key}": value for key, value in settings.variables.items()}
    contexts |= {"secrets.DROVER_TOKEN": settings.token, "runner.temp": str(temporary), "github.ref": "refs/heads/main"}
    assert evaluated(workflow["concurrency"]["group"], contexts) == "drover-refs/heads/main"
    given = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_REPOSITORY": "ada/set",
        "GITHUB_REF_NAME": "main",
        "GITHUB_REF": "refs/heads/main",
        "RUNNER_TEMP": str(temporary),
        **{key: str(file) for key, file in files.items()},
        **{key: evaluated(value, contexts) for key, value in steps_of["env"].items()},
    }
    assert workflow["defaults"]["run"]["shell"] == "bash"
    for step in steps_of["steps"]:
        if "uses" in step:
            assert step["uses"] in ACTIONS
            continue
        # An expression in a script is code of whoever named the branch.
        assert "${{" not in step["run"]
        path = os.pathsep.join([*files["GITHUB_PATH"].read_text().split()[::-1], job.environment["PATH"]])
        env = {key: evaluated(value, contexts) for key, value in step.get("env", {}).items()}
        if job.run(step["run"], {**given, "PATH": path, **env}, ("bash", "--noprofile", "--norc", "-eo", "pipefail")):
            return


def run_gitlab(job: Job, settings: Settings) -> None:
    """Run the job as GitLab's runner does: all lines of `before_script` and `script` in one shell."""
    described = yaml.safe_load((EXAMPLES / "gitlab.yml").read_text())["drover"]
    token = job.directory / "DROVER_TOKEN_FILE"
    token.write_text(settings.token)
    given = {
        "GITLAB_CI": "true",
        "CI_PROJECT_PATH": "ada/set",
        "CI_COMMIT_REF_NAME": "main",
        "CI_COMMIT_BRANCH": "main",
        "DROVER_TOKEN_FILE": str(token),
        **settings.variables,
    }
    job.run("\n".join([*described["before_script"], *described["script"]]), given)
    for name in described["artifacts"]["paths"]:
        assert (job.checkout / name).exists()


def run_shell(job: Job, settings: Settings) -> None:
    """Run the plain script, with the token in the environment."""
    given = {**settings.variables, "DROVER_TOKEN": settings.token}
    job.run(f"exec {EXAMPLES / 'drover-ci.sh'} default.nix", given)


def run_example(name: str, job: Job, settings: Settings) -> None:
    match name:
        case "gitlab.yml":
            run_gitlab(job, settings)
        case "drover-ci.sh":
            run_shell(job, settings)
        case _:
            run_workflow(name, job, settings)


def write_set(job: Job, name: str, script: str) -> None:
    """Write a set of two packages, one of them with a script; an evaluation that could read the token would fail."""
    (job.checkout / "default.nix").write_text(
        f"""
        assert builtins.getEnv "DROVER_TOKEN" == "";
        let
          shell = name: script: derivation {{
            inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ];
            salt = "{job.directory}";
          }};
        in {{ good = shell "good-{name}" "echo good > $out"; other = shell "other-{name}" ''{script}''; }}
        """
    )


def result_of(job: Job) -> dict[str, Any]:
    [file] = [*job.directory.glob("*/result.json")]
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def summary_of(job: Job) -> str:
    [file] = [*job.checkout.glob("summary.*"), *job.directory.glob("github_step_summary")]
    return file.read_text()


def assert_no_secret(job: Job) -> None:
    assert job.leaks == []
    assert job.token not in job.output
    written = [job.directory / "runner", job.checkout, job.directory / "home", job.directory / "temporary"]
    for file in (each for directory in written for each in directory.rglob("*") if each.is_file()):
        assert job.token.encode() not in file.read_bytes(), file


def older_push(farm: Farm, directory: Path, name: str) -> str:
    """Submit, as the job of an older push of the same branch did, what has no worker and so waits."""
    file = directory / "older.nix"
    file.write_text(f'derivation {{ name = "older-{name}"; system = "riscv64-linux"; builder = "/bin/sh"; }}')
    words = ("--label", "ada/set main", "--branch", "main", "--tag", "repository=ada/set")
    done = farm.build(file, *words, "--detach", "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout.splitlines()[-1])["id"])


@pytest.mark.parametrize("name", ["github.yml", "forgejo.yml", "gitlab.yml", "drover-ci.sh"])
def test_an_example_builds_on_the_farm_and_uses_what_was_built(
    farm: Farm, job: Job, settings: Settings, tmp_path: Path, name: str
) -> None:
    older = older_push(farm, tmp_path, name)
    write_set(job, name, "echo other > $out")
    run_example(name, job, settings)
    assert job.status == 0, job.output
    result = result_of(job)
    if name != "drover-ci.sh":
        view = farm.api(f"submissions/{older}")
        assert (view["state"], view["superseded_by"]) == ("superseded", result["id"])
    assert result["state"] == "succeeded"
    assert {root["attr"] for root in result["roots"]} == {"good", "other"}
    # Fetched by the job's own Nix, which had nothing and built nothing.
    assert "copying path" in job.output
    assert {link.name for link in job.checkout.glob("result*") if link.is_symlink()} == {"result", "result-2"}
    assert "everything is built" in summary_of(job)
    [submission] = [each for each in farm.api("submissions") if each["id"] == result["id"]]
    assert submission["label"] == ("" if name == "drover-ci.sh" else "ada/set main")
    paths = [path for root in result["roots"] for path in root["outputs"].values()]
    fetched = farm.fetch(tmp_path / "client", *paths)
    assert fetched.returncode == 0, fetched.stderr
    assert_no_secret(job)


#: What stands around a failed step's log, by example.
SECTIONS = {
    "github.yml": r"^::error title=other-\S+ failed::.*\n::group::log of other-\S+\n(?s:.*)no rule(?s:.*)^::endgroup",
    "gitlab.yml": r"section_start:\d+:(\w+)\r\x1b\[0Klog of other-\S+\n(?s:.*)no rule(?s:.*)section_end:\d+:\1\r",
    "drover-ci.sh": r"^✘ other-\S+ failed",
}


@pytest.mark.parametrize("name", SECTIONS)
def test_an_example_whose_set_has_a_broken_package_fails_with_its_log_and_a_summary(
    farm: Farm, job: Job, settings: Settings, tmp_path: Path, name: str
) -> None:
    write_set(job, name, "echo 'no rule <b>|@ada'; echo ::set-output name=a::b; exit 1")
    run_example(name, job, settings)
    assert job.status == 1, job.output
    result = result_of(job)
    assert result["state"] == "failed"
    assert re.search(SECTIONS[name], job.output, re.MULTILINE), job.output
    assert "\n::set-output" not in job.output
    summary = summary_of(job)
    assert "not everything is built" in summary
    assert "attributes that need it: <code>other</code>" in summary
    assert "no rule &#60;b&#62;&#124;&#64;ada" in summary
    assert "copying path" not in job.output
    # What could be built is in the cache.
    [good] = [root for root in result["roots"] if root["attr"] == "good"]
    assert farm.fetch(tmp_path / "client", good["outputs"]["out"]).returncode == 0
    assert_no_secret(job)
