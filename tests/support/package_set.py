"""A small package set in a git repository of its own: what a mass rebuild, a bisection and a stream of attributes need.

It has more than 60 packages for two systems, all of which need `stdenv`, in a tree with two nested sets that ask to be
entered. Builders are the sandbox's /bin/sh. Each package is one file below `pkgs`, and each change of the set is a
commit. An output holds

- `content`: the package's own text and, unless it is `data`, a checksum of the contents of what it needs;
- `needs`: the store paths of what it needs.

So a change of `stdenv`'s text really changes every output but those of `data` packages, which are rebuilt and differ in
store-path hashes alone; and a new `comment` does so with a package and all above it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.support.patience import PATIENCE_S

SYSTEMS: Final = ("x86_64-linux", "aarch64-darwin")
#: Needed by every other package.
ROOT: Final = "stdenv"
#: Packages whose outputs depend on nothing that they need, so that a changed root makes them no-op rebuilds.
DATA: Final = ("fonts", "icons", "manual", "timezones")

_DEFAULT: Final = """\
{ system ? builtins.currentSystem }:
let
  make = { name, needs ? [ ], text, comment ? "", isData ? false, seconds ? "", script ? "", meta ? { } }:
    derivation {
      inherit name system needs text comment;
      salt = builtins.readFile ./salt;
      builder = "/bin/sh";
      args = [
        "-c"
        ''
          set -eu
          echo "building ${name}"
          ${if seconds == "" then "" else "sleep ${seconds}"}
          mkdir -p $out
          echo "$text" > $out/content
          for need in $needs; do echo "$need" >> $out/needs; done
          ${if isData then "" else "for need in $needs; do cat $need/content; done | md5sum >> $out/content"}
          ${script}
        ''
      ];
    } // { inherit meta; };
  # Files of a directory, by name: packages, and directories as nested sets.
  packagesOf = directory:
    let
      entries = builtins.readDir directory;
      nameOf = entry: builtins.head (builtins.split "\\\\.nix$" entry);
    in
    builtins.listToAttrs (map
      (entry: {
        name = nameOf entry;
        value =
          if entries.${entry} == "directory"
          then packagesOf (directory + "/${entry}") // { recurseForDerivations = true; }
          else import (directory + "/${entry}") { inherit make set system; };
      })
      (builtins.attrNames entries));
  set = packagesOf ./pkgs;
in
set
"""


@dataclass(frozen=True, slots=True)
class Package:
    """One package, by the path of its attribute."""

    attr: str
    needs: tuple[str, ...] = (ROOT,)
    version: str = "1.0"
    #: What its output is made of.
    text: str = "first"
    #: Given to the builder, which makes nothing of it.
    comment: str = ""
    is_data: bool = False
    #: Shell lines at the end of its builder; `false` breaks it.
    script: str = ""
    #: Seconds that its builder sleeps, as `sleep` takes them.
    seconds: str = ""
    maintainers: tuple[str, ...] = ()
    #: A Nix expression that is forced before the package; `throw "…"` breaks its evaluation.
    forced: str = "null"

    @property
    def file(self) -> str:
        """The path of its file in the repository."""
        return f"pkgs/{self.attr.replace('.', '/')}.nix"

    def nix(self) -> str:
        """Write the file."""
        name = self.attr.rpartition(".")[2]
        people = " ".join(f'{{ github = "{each}"; email = "{each}@example.org"; }}' for each in self.maintainers)
        return f"""\
{{ make, set, system, ... }}: builtins.seq ({self.forced}) (make {{
  name = "{name}-{self.version}";
  needs = [ {" ".join(f"set.{each}" for each in self.needs)} ];
  text = "{name}: {self.text}";
  comment = "{self.comment}";
  isData = {"true" if self.is_data else "false"};
  seconds = "{self.seconds}";
  script = ''
    {self.script}
  '';
  meta.maintainers = [ {people} ];
}})
"""


def _packages() -> list[Package]:
    """The set as it begins: `stdenv`, libraries, tools, two nested sets, programs and data."""
    ada, bob = ("ada",), ("bob",)
    libraries = ["bzip2", "expat", "gmp", "libffi", "ncurses", "pcre", "xz", "zlib"]
    above = {
        "curl": ("openssl", "zlib"),
        "git": ("curl", "expat", "perl", "zlib"),
        "libxml2": ("xz", "zlib"),
        "openssl": ("zlib",),
        "perl": ("bzip2", "zlib"),
        "python3": ("expat", "libffi", "openssl", "readline", "sqlite"),
        "readline": ("ncurses",),
        "ruby": ("libffi", "openssl", "readline"),
        "sqlite": ("readline", "zlib"),
    }
    python = [
        "attrs",
        "click",
        "idna",
        "jinja2",
        "lxml",
        "numpy",
        "pip",
        "pytest",
        "pyyaml",
        "requests",
        "six",
        "wheel",
    ]
    perl = ["carp", "dbi", "json", "moose", "pod", "uri", "xml", "yaml"]
    return [
        Package(ROOT, needs=()),
        *(Package(name, maintainers=ada) for name in libraries),
        *(Package(name, (ROOT, *needs), maintainers=bob if name == "git" else ()) for name, needs in above.items()),
        *(Package(f"python3Packages.{name}", (ROOT, "python3"), maintainers=ada) for name in python),
        *(Package(f"perlPackages.{name}", (ROOT, "perl")) for name in perl),
        *(Package(f"app{n:02d}", (ROOT, "curl" if n % 2 else "libxml2")) for n in range(1, 21)),
        *(Package(name, is_data=True, maintainers=bob) for name in DATA),
    ]


class PackageSet:
    """The set in a new git repository: `default.nix` takes a `system`, and every attribute of it is a package or a set.

    Changes are made by the methods named after them; each takes effect with the next `commit`.
    """

    def __init__(self, directory: Path, *, salt: str = "") -> None:
        """Make the repository in `directory`, with one commit.

        `salt` goes into every path; by default it is the directory, so that no farm has built anything of it.
        """
        self.directory = directory
        self.packages: dict[str, Package] = {}
        directory.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main")
        self.write("default.nix", _DEFAULT)
        for package in _packages():
            self.put(package)
        self.write("salt", salt or str(directory))
        self.first = self.commit("the set")

    def git(self, *arguments: str) -> str:
        """Run git in the repository, apart from this machine's settings; return what it printed."""
        done = subprocess.run(
            ["git", "-C", str(self.directory), *arguments],
            env={
                **os.environ,
                "GIT_CONFIG_GLOBAL": os.devnull,
                "GIT_CONFIG_SYSTEM": os.devnull,
                **{f"GIT_{role}_NAME": "Ada" for role in ("AUTHOR", "COMMITTER")},
                **{f"GIT_{role}_EMAIL": "ada@example.org" for role in ("AUTHOR", "COMMITTER")},
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout.strip()

    @property
    def file(self) -> Path:
        """The file to evaluate in the working tree."""
        return self.directory / "default.nix"

    def write(self, name: str, text: str) -> None:
        """Write any file of the working tree."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def put(self, package: Package) -> None:
        """Add a package, or put it in the place of another."""
        self.packages[package.attr] = package
        self.write(package.file, package.nix())

    def commit(self, message: str) -> str:
        """Commit the working tree as it is; return the revision."""
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    # Changes.

    def edit(self, attr: str, **fields: object) -> None:
        """Change fields of a package."""
        self.put(replace(self.packages[attr], **fields))  # type: ignore[arg-type]  # fields of a test's own

    def change(self, attr: str, text: str) -> None:
        """Give a package another output, and with it all above it that are no data."""
        self.edit(attr, text=text)

    def touch(self, attr: str, comment: str) -> None:
        """Have a package rebuilt, and all above it, with outputs that are equal but for store-path hashes."""
        self.edit(attr, comment=comment)

    def fail(self, attr: str, message: str = "no rule to make target") -> None:
        """Have the build of a package fail, after it printed `message`."""
        self.edit(attr, script=f'echo "{message}" >&2; false')

    def fix(self, attr: str) -> None:
        """Have a package build and evaluate again."""
        self.edit(attr, script="", forced="null")

    def fail_evaluation(self, attr: str, message: str = "is marked as broken") -> None:
        """Have the evaluation of a package fail, and of all that need it."""
        self.edit(attr, forced=f'throw "{attr} {message}"')

    def remove(self, attr: str) -> None:
        """Take a package out that no other needs."""
        assert not any(attr in each.needs for each in self.packages.values()), f"{attr} is needed"
        (self.directory / self.packages.pop(attr).file).unlink()

    def spoil(self) -> None:
        """Have nothing evaluate: `default.nix` is no Nix any more."""
        self.write("default.nix", "{ this is no Nix")

    def mend(self) -> None:
        """Undo `spoil`."""
        self.write("default.nix", _DEFAULT)

    # Histories.

    def history(self, count: int, at: Mapping[int, Callable[[PackageSet], None]] | None = None) -> list[str]:
        """Make `count` commits and return their revisions, oldest first.

        Every third one changes no package at all, the others one or another leaf; commit number n (from 0) makes the
        change `at[n]` besides.
        """
        leaves = [attr for attr in self.packages if attr.startswith(("app", "perlPackages."))]
        revisions = []
        for number in range(count):
            attr = leaves[number % len(leaves)]
            match number % 3:
                case 0:
                    self.write("README", f"commit {number}\n")
                case 1 if attr in self.packages:
                    self.touch(attr, f"commit {number}")
                case 2 if attr in self.packages:
                    self.edit(attr, version=f"1.{number}")
            if at is not None and number in at:
                at[number](self)
            revisions.append(self.commit(f"commit {number}"))
        return revisions
