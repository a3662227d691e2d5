"""The installed Nix and this code say the same of derivations, paths, archives, references, narinfo, keys."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from infra import nar_files
from infra.nix import aterm, base32, hashing, nar, narinfo, signing
from infra.nix.ca import verify_source
from infra.nix.derivation import DerivationKind
from infra.nix.path_info import PathInfo
from infra.nix.store_path import StoreDir
from infra.nix.verify import VerifiedDerivation, Verifier
from tests.infra.nix.test_canonical import agree
from tests.support.sources import hashes_of

FEATURES = "nix-command ca-derivations impure-derivations"
EXPRESSION = r"""
let
  make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  hash = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
  fixed = mode: attrs: make ({ outputHash = hash; outputHashAlgo = "sha256"; outputHashMode = mode; } // attrs);
  base = make { name = "base"; args = [ "-c" "echo hi > $out" ]; };
  flat1 = fixed "flat" { name = "src-1.0.tar.gz"; args = [ "a" ]; };
  flat2 = fixed "flat" { name = "src-1.0.tar.gz"; args = [ "b" ]; };
  tree = fixed "recursive" { name = "tree"; };
  md5 = make {
    name = "md5"; outputHash = "d41d8cd98f00b204e9800998ecf8427e"; outputHashAlgo = "md5"; outputHashMode = "recursive";
  };
  sri = make {
    name = "sri";
    outputHash = "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg==";
  };
  odd = make {
    name = "odd+a.b?c=d_e-f"; builder = base; outputs = [ "out" "dev" "lib" ];
    args = [ "q\"uote\\ back\nnl\ttab\rcr ü → (\"out\",\"" "" ];
    trap = "\\\"\n\\n(\"dev\",\"x\")"; fetched = [ flat1 flat2 tree md5 sri ]; "k\"ey\\" = "v\\";
  };
  structured = make {
    name = "structured"; builder = "${odd.dev}/bin/x"; __structuredAttrs = true; outputs = [ "bin" "out" ];
    requiredSystemFeatures = [ "kvm" "big-parallel" ]; preferLocalBuild = true; allowSubstitutes = false;
    nested = { a = [ 1 2.5 "ü\n\"" null ]; };
  };
  floating = make {
    name = "floating"; outputs = [ "out" "dev" ];
    __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";
  };
  deferred = make { name = "deferred"; args = [ floating.dev odd ]; outputs = [ "out" "lib" ]; };
  impure = make { name = "impure"; __impure = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
  source = builtins.path { path = ./tree; name = "tree-source"; };
in [
  (make { name = "reads"; script = "${structured.drvPath} ${base}"; })
  (make { name = "reads-one"; drv = builtins.unsafeDiscardOutputDependency odd.drvPath; })
  (make {
    name = "top"; builder = builtins.toFile "builder.sh" "use ${source} ${builtins.toFile "lib.sh" "x"}";
    args = [ structured.bin structured.out odd.lib ]; requiredSystemFeatures = "kvm nixos-test";
  })
  (make { name = "over-deferred"; args = [ deferred.lib ]; })
  (make { name = "over-impure"; args = [ impure ]; __impure = true; })
]
"""


class Nix:
    """Runs Nix programs on a store of their own; `real` is where the store directory `logical` lies on disk."""

    def __init__(self, root: Path, logical: str) -> None:
        self.root = root
        self.logical = logical
        own = logical != "/nix/store"
        self.real = Path(logical) if own else root / "nix/store"
        self.flags = [] if own else ["--store", str(root)]
        self.env = os.environ | {
            "HOME": str(root / "home"),
            "NIX_CONF_DIR": str(root / "conf"),
            "NIX_CONFIG": f"build-users-group =\nsubstituters =\nexperimental-features = {FEATURES}\nsandbox = true\n"
            "sandbox-fallback = false\nsandbox-paths = /bin/sh=/bin/busybox\n",
        }
        self.env.pop("NIX_REMOTE", None)
        if own:
            self.env |= {
                "NIX_STORE_DIR": logical,
                "NIX_STATE_DIR": str(root / "state"),
                "NIX_LOG_DIR": str(root / "log"),
            }
            (root / "state").mkdir()

    def run(self, program: str, *args: str | Path, stdin: bytes = b"") -> bytes:
        flags = self.flags if program in {"nix-instantiate", "nix-store"} else []
        done = subprocess.run(
            [program, *flags, *args], env=self.env, cwd=self.root, input=stdin, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def lines(self, program: str, *args: str | Path) -> list[str]:
        return self.run(program, *args).decode().splitlines()

    def on_disk(self, path: str) -> Path:
        return self.real / path.rsplit("/", 1)[1]


@pytest.fixture(scope="module", params=["default", "other"])
def nix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Nix:
    root = tmp_path_factory.mktemp("nix")
    (root / "tree").mkdir()
    (root / "tree/run").write_text("#!/bin/sh\n")
    (root / "tree/run").chmod(0o755)
    (root / "tree/link").symlink_to("../dangling")
    (root / "tree/empty").mkdir()
    (root / "graph.nix").write_text(EXPRESSION)
    return Nix(root, "/nix/store" if request.param == "default" else str(root / "other/store"))


def closure(nix: Nix, roots: list[str]) -> dict[str, VerifiedDerivation]:
    """Every derivation at or below `roots`, verified inputs first."""
    verifier = Verifier(StoreDir(nix.logical))
    verified: dict[str, VerifiedDerivation] = {}
    pending = list(roots)
    while pending:
        path = pending[-1]
        data = nix.on_disk(path).read_bytes()
        missing = [below for below, _ in aterm.parse(data).input_drvs if below not in verified]
        if missing:
            pending += missing
            continue
        pending.pop()
        verified[path] = verifier.add(path, data)
    return verified


def test_derivations_of_every_kind_verify_and_render_to_their_bytes(nix: Nix) -> None:
    verified = closure(nix, nix.lines("nix-instantiate", "graph.nix"))
    by_name = {member.name: member for member in verified.values()}
    assert len(verified) == 16
    assert {member.kind for member in verified.values()} == set(DerivationKind)
    assert by_name["deferred"].kind is by_name["over-deferred"].kind is DerivationKind.DEFERRED
    assert by_name["structured"].options.required_system_features == ("kvm", "big-parallel")
    assert not by_name["structured"].options.allow_substitutes
    assert by_name["top"].options.required_system_features == ("kvm", "nixos-test")
    taken: list[bool] = []
    for path in verified:
        data = nix.on_disk(path).read_bytes()
        assert aterm.render(aterm.parse(data)) == data
        assert aterm.scan_canonical(data) == aterm.scan_by_token(data)
        taken.append(agree(data))
    assert sum(taken) > len(taken) // 2
    known = {path: m for path, m in verified.items() if all(m.outputs.values())}
    outputs = nix.lines("nix-store", "--query", "--outputs", *known)
    assert sorted(outputs) == sorted(path for m in known.values() for path in m.outputs.values())


def test_sources_of_a_graph_are_what_their_paths_say(nix: Nix) -> None:
    store_dir = StoreDir(nix.logical)
    top = next(root for root in nix.lines("nix-instantiate", "graph.nix") if root.endswith("-top.drv"))
    methods: dict[str, str] = {}
    for source in nix.lines("nix-store", "--query", "--requisites", top):
        if not source.endswith(".drv"):
            hashes = hashes_of(nar_files.dump(nix.on_disk(source)))
            refs = nix.lines("nix-store", "--query", "--references", source)
            methods[store_dir.parse(source).name] = verify_source(store_dir, source, hashes, refs)
    assert set(methods) == {"tree-source", "builder.sh", "lib.sh"}
    assert methods["tree-source"].startswith("fixed:r:sha256:")
    assert methods["builder.sh"].startswith("text:sha256:")


def test_added_files_get_the_same_paths_by_every_method(nix: Nix) -> None:
    store_dir = StoreDir(nix.logical)
    (nix.root / "a+b.c?d=e_f-g").write_text("abc")
    (nix.root / ".hidden").write_text("")
    for name, content in (("a+b.c?d=e_f-g", b"abc"), (".hidden", b"")):
        flat = nix.lines("nix-store", "--add-fixed", "sha256", name)
        assert flat == [store_dir.make_fixed_output_path(name, "", "sha256", sha256(content).hexdigest())]
        archive = b"".join(nar_files.dump(nix.root / name))
        assert nix.lines("nix-store", "--add", name) == [store_dir.make_source_path(name, sha256(archive).hexdigest())]


def test_archives_are_equal_in_both_directions(nix: Nix, tmp_path: Path) -> None:
    tree = nix.root / "tree"
    archive = nix.run("nix-store", "--dump", tree)
    assert b"".join(nar_files.dump(tree)) == archive
    nar_files.restore([archive], tmp_path / "ours")
    nix.run("nix-store", "--restore", tmp_path / "theirs", stdin=archive)
    for copy in ("ours", "theirs"):
        assert b"".join(nar_files.dump(tmp_path / copy)) == archive
    reader = nar.NarReader()
    assert b"".join(nar.write_events(reader.feed(archive))) == archive
    reader.close()


def test_a_tree_that_nix_adds_however_deep_is_packed_to_the_same_archive(nix: Nix) -> None:
    """Nix reaches every file by its whole path, and so ends where the kernel does."""
    place = nix.root / "deep"
    for _ in range((4000 - len(str(nix.on_disk(f"{nix.logical}/{'0' * 32}-deep")))) // 2):
        place.mkdir()
        place /= "d"
    added = nix.lines("nix-store", "--add", "deep")
    archive = b"".join(nar_files.dump(nix.on_disk(added[0])))
    assert added == [StoreDir(nix.logical).make_source_path("deep", sha256(archive).hexdigest())]
    assert nix.run("nix-store", "--dump", nix.on_disk(added[0])) == archive


@pytest.mark.parametrize("algo", ["md5", "sha1", "sha256", "sha512"])
def test_hash_texts_are_equal(algo: str, tmp_path: Path) -> None:
    nix = Nix(tmp_path, "/nix/store")
    (tmp_path / "file").write_text("abc")
    text, base16 = (nix.lines("nix-hash", "--type", algo, "--flat", *flag, "file")[0] for flag in (["--base32"], []))
    sri = nix.lines("nix", "hash", "to-sri", "--type", algo, base16)[0]
    digest = bytes.fromhex(base16)
    assert base32.encode(digest) == text
    assert base32.decode(text) == digest
    for written in (f"{algo}:{text}", f"{algo}:{base16}", sri):
        assert hashing.parse_hash(written) == (algo, digest)


BUILT = """
let make = attrs: derivation ({ system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
    used = make { name = "used"; args = [ "-c" "echo used > $out" ]; };
    unused = make { name = "unused"; args = [ "-c" "echo unused > $out" ]; };
in make { name = "user"; args = [ "-c" "echo ${used} $out > $out; : ${unused}" ]; }
"""


def test_a_built_output_has_the_same_hash_references_narinfo_and_signature(tmp_path: Path) -> None:
    system = os.uname()
    nix = Nix(tmp_path, "/nix/store")
    store_dir = StoreDir(nix.logical)
    (tmp_path / "built.nix").write_text(BUILT.replace("x86_64-linux", f"{system.machine}-linux"))
    (drv_path,) = nix.lines("nix-instantiate", "built.nix")
    verified = closure(nix, [drv_path])
    (output,) = nix.lines("nix-store", "--realise", drv_path)
    assert verified[drv_path].outputs["out"] == output
    candidates = {store_dir.parse(path).hash_part: path for path in [*verified[drv_path].inputs, output]}
    content = b"".join(nar_files.dump(nix.on_disk(output)))
    references = sorted(path for digits, path in candidates.items() if digits.encode() in content)
    assert references == sorted(nix.lines("nix-store", "--query", "--references", output))
    assert len(references) == 2
    hashes = hashes_of([content])
    assert nix.lines("nix-store", "--query", "--hash", output) == [hashes.nar_hash]
    (tmp_path / "key").write_bytes(nix.run("nix", "key", "generate-secret", "--key-name", "test-1"))
    key = signing.SecretKey.parse((tmp_path / "key").read_text())
    assert nix.run("nix", "key", "convert-secret-to-public", stdin=key.reveal().encode()).decode() == str(key.public)
    nix.run("nix", "store", "sign", "--store", str(tmp_path), "--key-file", tmp_path / "key", output)
    nix.run("nix", "copy", "--from", str(tmp_path), "--to", f"file://{tmp_path}/cache?compression=none", output)
    text = (tmp_path / "cache" / f"{store_dir.parse(output).hash_part}.narinfo").read_bytes()
    info = narinfo.parse(text, store_dir)
    assert info.render() == text
    assert (info.path.nar_hash, info.path.nar_size) == (hashes.nar_hash, len(content))
    assert info.path.references == tuple(store_dir.base_name(path) for path in references)
    assert info.path.sigs == (key.sign(info.path.fingerprint()),)
    assert key.public.verify(info.path.fingerprint(), info.path.sigs[0])


def test_nix_accepts_a_cache_that_only_this_code_wrote_and_signed(tmp_path: Path) -> None:
    nix = Nix(tmp_path, "/nix/store")
    store_dir = StoreDir("/nix/store")
    key = signing.generate("ours-1", bytes(range(32)))
    archive = b"".join(nar.write_events([nar.NarFile(b"", False, 3), nar.NarData(b"abc")]))
    path = "/nix/store/vylz2d5mzcgx8z67q4xi43zhzf5zrld5-signed"
    text = hashing.sha256_text(sha256(archive).digest())
    info = narinfo.NarInfo(
        PathInfo(path, text, len(archive)), narinfo.StoredNar("nar/x.nar", "none", text, len(archive))
    )
    info = narinfo.parse(info.render() + f"Sig: {key.sign(info.path.fingerprint())}\n".encode(), store_dir)
    cache = tmp_path / "cache"
    (cache / "nar").mkdir(parents=True)
    (cache / "nar/x.nar").write_bytes(archive)
    (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    (cache / f"{store_dir.parse(path).hash_part}.narinfo").write_bytes(info.render())
    fetch = ["copy", "--from", f"file://{cache}", "--to", str(tmp_path), path, "--option", "trusted-public-keys"]
    with pytest.raises(AssertionError, match="lacks a valid signature"):
        nix.run("nix", *fetch, f"ours-1:{base64.b64encode(bytes(32)).decode()}")
    nix.run("nix", *fetch, str(key.public))
    assert nix.on_disk(path).read_bytes() == b"abc"
    shown = json.loads(nix.run("nix", "path-info", "--json", "--store", str(tmp_path), path))
    assert shown[0]["narSize"] == len(archive)
