"""`drover doctor`: real Nix with settings of its own, real servers that behave well and badly, and judgements alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from coordinator.cli.doctor import diagnosis_lines
from coordinator.doctor import gather as gathering
from coordinator.doctor.checks import Diagnosis, diagnoses, in_force, is_trusted
from coordinator.doctor.facts import CacheFacts, MachineFacts, Netrc, NixSettings, Plan
from coordinator.doctor.gather import gather
from infra.process import run
from tests.support.patience import PATIENCE_S
from tests.support.served import served
from tests.support.wishes import catalog_entry, flox_lock, store_path

KEY = "farm-1:" + "A" * 43 + "="
URL = "https://farm.example.org/cache"
INFO = "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"


async def info(_request: web.Request) -> web.Response:
    return web.Response(text=INFO)


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """An environment in which Nix has settings, a home and a store of its own."""
    for name in ("conf", "home/.config/nix", "store"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "conf/nix.conf").write_text("substituters =\n")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "NIX_CONF_DIR": str(tmp_path / "conf"),
        "NIX_REMOTE": str(tmp_path / "store"),
    }


def conf(machine: dict[str, str], *lines: str) -> None:
    Path(machine["NIX_CONF_DIR"], "nix.conf").write_text("".join(f"{line}\n" for line in lines))


async def examined(machine: dict[str, str], *caches: str, keys: tuple[str, ...] = ()) -> dict[str, list[Diagnosis]]:
    """Return the judgements by what they are about."""
    facts = await gather(caches, keys, Path(machine["HOME"]), machine, plan=False)
    found: dict[str, list[Diagnosis]] = {}
    for each in diagnoses(facts):
        found.setdefault(each.about, []).append(each)
    return found


async def test_the_line_that_mends_a_finding_does_mend_it(machine: dict[str, str]) -> None:
    async with served(info, "/cache") as url:
        before = await examined(machine, url, keys=(KEY,))
        [asked, fine] = before[url]
        assert (asked.level, fine.level) == ("problem", "fine")
        [key] = before["keys"]
        assert key.level == "problem"
        for each in (asked, key):
            # As root: into the machine's file, which is another one here.
            command = each.mend.replace("/etc/nix/nix.conf", machine["NIX_CONF_DIR"] + "/nix.conf")
            command = command.replace("~", machine["HOME"])
            done = await run(["/bin/sh", "-c", command], env=machine, timeout_s=PATIENCE_S, max_output_bytes=10_000)
            assert done.returncode == 0, done.stderr
        after = await examined(machine, url, keys=(KEY,))
        assert [each.level for each in (*after[url], *after["keys"])] == ["fine", "fine"]
        assert "priority 30" in after[url][0].sentence


async def test_each_kind_of_cache_that_nix_cannot_use_is_told_apart(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        match request.path.split("/")[2]:
            case "private":
                return web.Response(status=401)
            case "page":
                return web.Response(text="<html>", content_type="text/html")
            case "broken":
                return web.Response(status=502)
            case "elsewhere":
                return web.Response(text="StoreDir: /gnu/store\n")
            case "late":
                await hold.wait()
        return web.Response(text=INFO, headers={"Date": "Sun, 29 Nov 2020 12:00:00 GMT"})

    async with served(handler, "/cache") as url:
        names = {
            "private": "wants a token and there is none for it",
            "page": "is no binary cache",
            "broken": "status 502",
            "elsewhere": "has paths of /gnu/store",
            "ahead": "clock is ",
        }
        urls = {f"{url}/{name}": words for name, words in names.items()} | {
            "http://127.0.0.1:1/x": "cannot be reached: connection refused",
            "nonsense": "no address of a cache",
        }
        conf(machine, f"substituters = {' '.join(urls)}")
        # A busy machine may take long for those that answer.
        monkeypatch.setattr(gathering, "CACHE_S", PATIENCE_S)
        found = await examined(machine)
        urls[late := f"{url}/late"] = "did not answer in time"
        conf(machine, f"substituters = {late}")
        monkeypatch.setattr(gathering, "CACHE_S", 0.1)
        found |= {late: (await examined(machine))[late]}
        hold.set()
    for each, words in urls.items():
        [problem] = [one for one in found[each] if one.level == "problem"]
        assert words in problem.sentence, each
        assert problem.mend


async def test_a_token_in_netrc_is_sent_as_nix_would_and_one_that_all_may_read_is_a_problem(
    machine: dict[str, str], tmp_path: Path
) -> None:
    seen: list[str | None] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        return web.Response(status=401) if seen[-1] != "Basic ZHJvdmVyOnNlY3JldA==" else web.Response(text=INFO)

    file = tmp_path / "netrc"
    async with served(handler, "/cache") as url:
        conf(machine, f"substituters = {url}", f"netrc-file = {file}")
        [found] = (await examined(machine))[url]
        assert "there is none for it" in found.sentence
        assert f"machine 127.0.0.1 login drover password TOKEN` into {file}" in found.mend
        file.write_text("machine 127.0.0.1 login drover password wrong\n")
        file.chmod(0o600)
        [found] = (await examined(machine))[url]
        assert "did not accept the one" in found.sentence
        file.write_text("machine 127.0.0.1 login drover password secret\n")
        file.chmod(0o644)
        after = await examined(machine)
        assert [each.level for each in after[url]] == ["fine"]
        assert "everybody on this machine can read" in after["netrc"][0].sentence
        assert after["netrc"][0].mend == f"sudo chmod 600 {file}"
    assert seen[0] is None


async def test_what_nix_believes_that_a_cache_lacks_is_advice(machine: dict[str, str]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=404) if request.path.endswith(".narinfo") else web.Response(text=INFO)

    async with served(handler, "/cache") as url:
        conf(machine, f"substituters = {url}", "narinfo-cache-negative-ttl = 3600")
        assert [each.level for each in (await examined(machine))[url]] == ["fine"]
        paths = [f"/nix/store/{letter * 32}-x" for letter in "ab"]
        fetched = await run(["nix-store", "-r", *paths], env=machine, timeout_s=PATIENCE_S, max_output_bytes=100_000)
        assert fetched.returncode != 0
        [advice, _] = (await examined(machine))[url]
        assert (advice.level, "lacks 2 paths" in advice.sentence) == ("advice", True)
        conf(machine, f"substituters = {url}", "narinfo-cache-negative-ttl = 0")
        assert [each.level for each in (await examined(machine))[url]] == ["fine"]


async def test_the_plan_of_a_directory_is_nix_s_own(machine: dict[str, str], tmp_path: Path) -> None:
    expression = 'name: derivation { inherit name; system = builtins.currentSystem; builder = "/x"; }'
    (tmp_path / "default.nix").write_text(f'let make = {expression}; in [ (make "a") (make "b") ]')
    facts = await gather((), (), tmp_path, machine, plan=True)
    assert facts.plans == (Plan("default.nix", built=2),)
    (tmp_path / "default.nix").write_text('throw "not today"')
    facts = await gather((), (), tmp_path, machine, plan=True)
    [plan] = [each for each in diagnoses(facts) if each.about == "default.nix"]
    assert (plan.level, "not today" in plan.sentence) == ("advice", True)


async def test_the_plan_of_a_lock_is_what_the_caches_in_force_have_of_it(
    machine: dict[str, str], tmp_path: Path
) -> None:
    have, lack = store_path("have-1"), store_path("lack-1")

    async def answer(request: web.Request) -> web.Response:
        if not request.path.endswith(f"{have[11:43]}.narinfo"):
            return await info(request) if request.path.endswith("nix-cache-info") else web.Response(status=404)
        fields = {"StorePath": have, "URL": "nar/a.nar", "Compression": "none", "NarHash": f"sha256:{'0' * 52}"}
        text = "".join(f"{key}: {value}\n" for key, value in fields.items())
        return web.Response(text=f"{text}NarSize: 2048\nFileSize: 1024\nReferences: \n")

    here = (await gather((), (), tmp_path, machine, plan=False)).settings
    assert here is not None
    packages = [{**catalog_entry(path[44:48], here.system), "outputs": {"out": path}} for path in (have, lack)]
    (tmp_path / "manifest.lock").write_bytes(flox_lock(packages, systems=[here.system]))
    (tmp_path / "devbox.lock").write_text("{")
    async with served(answer) as url:
        conf(machine, f"substituters = {url}", "require-sigs = false")
        found = await gather((), (), tmp_path, machine, plan=True)
    plan, torn = found.plans
    assert (plan.target, plan.fetched, plan.built, plan.lacking) == ("manifest.lock", 1, 1, ("lack",))
    assert "it is not whole or no JSON" in torn.trouble
    [said] = [each for each in diagnoses(found) if each.about == "manifest.lock"]
    assert said.sentence.startswith("Nix would build 1 derivations (lack), which no cache has, here and fetch 1 paths")
    assert said.mend == "see what the farm can do about it: drover plan manifest.lock"


async def test_a_machine_without_nix_is_one_problem(tmp_path: Path) -> None:
    found = await examined({"PATH": str(tmp_path), "HOME": str(tmp_path)}, URL)
    assert list(found) == ["nix"]
    assert "no Nix on PATH" in found["nix"][0].sentence


SETTINGS = NixSettings((), (), (), ("root",), "/etc/nix/netrc", "aarch64-darwin")
MAC = MachineFacts("nix (Nix) 2.24.9", "ada", frozenset({"staff"}), 1000.0, SETTINGS, SETTINGS, daemon=True)


@pytest.mark.parametrize(
    ("trusted_users", "said", "expected"),
    [(("root",), None, False), (("root", "ada"), None, True), (("@staff",), None, True), (("*",), None, True),
     (("root",), True, True), (("ada",), False, False)],
)  # fmt: skip
def test_a_user_is_trusted_as_the_store_says_or_the_settings_do(
    trusted_users: tuple[str, ...], said: bool | None, expected: bool
) -> None:
    settings = replace(SETTINGS, trusted_users=trusted_users)
    assert is_trusted(replace(MAC, settings=settings, trusted=said), settings) is expected


def test_what_a_user_who_is_not_trusted_sets_does_not_count_and_only_an_administrator_can_mend_it() -> None:
    own = replace(SETTINGS, substituters=(f"{URL}/?priority=1", "https://other"), trusted_public_keys=(KEY,))
    facts = replace(MAC, settings=own, caches=(CacheFacts(URL, wanted=True, store_dir="/nix/store"),))
    assert in_force(facts, own).substituters == ()
    about = {each.about: each for each in diagnoses(facts) if each.level == "problem"}
    assert "the daemon passes over" in about[URL].sentence
    assert about[URL].mend.startswith(f"echo 'extra-substituters = {URL}' | sudo tee -a /etc/nix/nix.conf")
    assert "no trusted user" in about["keys"].sentence
    allowed = replace(facts, machine=replace(SETTINGS, trusted_substituters=(URL,), trusted_public_keys=(KEY,)))
    assert not [each for each in diagnoses(allowed) if each.level == "problem"]


async def test_a_line_goes_into_the_file_that_no_program_writes_anew(machine: dict[str, str], tmp_path: Path) -> None:
    conf(machine, "!include nix.custom.conf", "substituters =")
    async with served(info, "/cache") as url:
        mend = (await examined(machine, url))[url][0].mend
        assert str(tmp_path / "conf/nix.custom.conf") in mend
        (tmp_path / "conf/nix.conf").rename(tmp_path / "written")
        (tmp_path / "written").write_text("substituters =\n")
        (tmp_path / "conf/nix.conf").symlink_to(tmp_path / "written")
        mend = (await examined(machine, url))[url][0].mend
    assert ("nix.settings" in mend, f"extra-substituters = {url}" in mend) == (True, True)


def test_dangerous_settings_and_a_full_disk_are_problems() -> None:
    settings = replace(SETTINGS, require_sigs=False, trusted_users=("*",), trusted_public_keys=("broken",))
    netrc = Netrc("/etc/nix/netrc", exists=True, open_to_all=True)
    facts = replace(MAC, settings=settings, machine=settings, netrc=netrc, free_bytes=10**9, store_trouble="no socket")
    problems = {each.about for each in diagnoses(facts) if each.level == "problem"}
    assert problems == {"store", "disk", "keys", "netrc", "signatures", "trusted-users"}
    old = diagnoses(replace(MAC, nix_version="nix (Nix) 2.3.16"))
    assert "older than 2.8" in old[0].sentence


def test_lines_show_no_controls_of_what_others_wrote() -> None:
    settings = replace(SETTINGS, substituters=(URL,))
    cache = CacheFacts(URL, trouble="unreachable", reason="\x1b]0;x\x07\nfine")
    facts = replace(MAC, settings=settings, machine=settings, caches=(cache,))
    lines = diagnosis_lines(diagnoses(facts))
    assert not any(character in line for line in lines for character in "\x1b\x07\n")
    assert lines[-1].startswith("1 problem")


def test_the_command_ends_with_1_where_there_is_a_problem(machine: dict[str, str]) -> None:
    command = [str(Path(sys.executable).with_name("drover")), "doctor", "--no-plan", "http://127.0.0.1:1/cache"]
    done = subprocess.run(command, env=machine, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1, done.stderr
    assert "http://127.0.0.1:1/cache: it cannot be reached: connection refused" in done.stdout
