"""Help of the commands: listed by what they are for, and examples of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from importlib import import_module
from typing import Final

import click

#: Heading -> commands below it. A command of none stands below the last heading.
SECTIONS: Final = {
    "Build": ("build", "rebuild", "watch", "wait", "status", "submissions", "bump", "cancel", "retry"),
    "Ask": ("why", "log", "story", "diff", "bisect", "eta", "demand", "sources", "history", "trace", "top", "workers"),
    "Use a cache": ("plan", "populate", "doctor", "environments", "coverage"),
    "Run a farm": ("up", "worker", "head", "drain", "cache", "completion"),
}

#: Command -> how it is called, at the end of its help.
EXAMPLES: Final = {
    "up": (
        "drover up",
        "drover up --slots 4 --emulate aarch64-linux",
        "drover up --config farm.toml --no-workers",
    ),
    "head": ("drover head --state-dir /var/lib/drover-head --listen 10.0.0.1:6379",),
    "worker": ("drover worker --head farm:6379 --ray-token ray-token --name mac1 --state-dir /var/lib/drover",),
    "build": (
        "drover build default.nix -A hello -A curl",
        "drover build release.nix --label nightly --detach",
        "drover build .#checks",
        "drover build default.nix -A hello --fetch",
    ),
    "rebuild": (
        "drover rebuild --base main",
        "drover rebuild --base main --head my-branch --dry-run",
        "drover rebuild --base main --only 'python3*' --markdown comment.markdown",
    ),
    "watch": (
        "drover watch 4f086d30cb",
        "drover watch 4f086d30cb --ci github",
    ),
    "wait": ("drover wait 4f086d30cb", "drover wait 4f086d30cb 8c1b2f9a00 --timeout 2h"),
    "submissions": (
        "drover submissions --branch main --since 2d",
        "drover submissions --state failed --tag nightly=yes --json",
    ),
    "bump": ("drover bump 4f086d30cb",),
    "status": (
        "drover status",
        "drover status 4f086d30cb",
        "drover status hello-2.12",
    ),
    "cancel": ("drover cancel 4f086d30cb",),
    "retry": (
        "drover retry 4f086d30cb",
        "drover retry perl-5.40",
    ),
    "log": (
        "drover log hello",
        "drover log perl-5.40 --attempt 1",
        "drover log perl-5.40 --search error",
    ),
    "why": (
        "drover why hello",
        "drover why 7kfa6f625iik",
    ),
    "top": ("drover top",),
    "story": ("drover story hello",),
    "diff": ("drover diff hello", "drover diff hello-2.12 7kfa6f625iik"),
    "bisect": (
        "drover bisect -A hello --good v1.0 --bad main",
        "drover bisect release.nix -A hello --good HEAD~40 --bad HEAD --until slower",
    ),
    "eta": ("drover eta 4f086d30cb",),
    "trace": ("drover trace 4f086d30cb -o trace.json",),
    "history": (
        "drover history hello",
        "drover history hello --system aarch64-linux",
    ),
    "sources": ("drover sources", "drover sources --trouble gone"),
    "demand": ("drover demand", "drover demand --json"),
    "workers": ("drover workers",),
    "plan": (
        "drover plan",
        "drover plan manifest.lock --systems all",
        "drover plan .#nixosConfigurations.box",
        "drover plan -",
    ),
    "populate": (
        "drover populate manifest.lock --systems x86_64-linux,aarch64-darwin",
        "drover populate --diff old.lock manifest.lock --markdown report.markdown",
        "drover populate paths.txt --no-build",
    ),
    "doctor": (
        "drover doctor",
        "drover doctor https://farm.example.org/cache --key farm-1:…",
    ),
    "coverage": ("drover coverage", "drover coverage dev --json"),
    "drain": (
        "drover drain mac1 --wait",
        "drover drain mac1 --off",
    ),
}


class ExampledCommand(click.Command):
    """A command whose help ends with examples."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's
        """Write the examples."""
        if found := EXAMPLES.get(self.name or "", ()):
            with formatter.section("Examples"):
                formatter.write("".join([f"  {line}\n" for line in found]))


class LateCommands(MutableMapping[str, click.Command]):
    """Commands by name, of which those of other modules are imported when they are looked up."""

    def __init__(self, modules: Mapping[str, Sequence[str]]) -> None:
        """`modules` are names of `coordinator.cli`, each with those of its commands."""
        self._late = {name: module for module, names in modules.items() for name in names}
        self._there: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._there:
            self._there[name] = getattr(import_module(f"coordinator.cli.{self._late[name]}"), name)
        return self._there[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._there[name] = command

    def __delitem__(self, name: str) -> None:
        del self._there[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._late.keys() | self._there.keys())

    def __len__(self) -> int:
        return len(self._late.keys() | self._there.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._there or name in self._late


class SectionedGroup(click.Group):
    """A group with sections."""

    command_class = ExampledCommand

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, each with its first sentence, which is never cut."""
        others = self.commands.keys() - {name for names in SECTIONS.values() for name in names}
        last = list(SECTIONS)[-1]
        for heading, names in SECTIONS.items():
            listed = [*names, *(sorted(others) if heading == last else ())]
            found = [(name, self.get_command(ctx, name)) for name in listed]
            rows = [(name, each.get_short_help_str(limit=200)) for name, each in found if each and not each.hidden]
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=12)
