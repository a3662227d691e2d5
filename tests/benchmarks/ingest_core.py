"""A synthetic graph of derivations like a package set's, and what each stage of its intake costs on one core.

A pure helper: the caller brings the clock. Members have some 40 variables, 2 to 5 KB of text with escapes in
it, some twelve inputs, one to three outputs; one in six is fixed-output. Every path in the graph is true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from random import Random
from typing import Final

from infra.nix import aterm
from infra.nix.derivation import Derivation, DerivationOutput
from infra.nix.store_path import StoreDir, output_path_name
from infra.nix.verify import Verifier

STORE_DIR: Final = StoreDir("/nix/store")
#: One .drv file: its full path and its content.
Member = tuple[str, bytes]

_SYSTEM: Final = "x86_64-linux"
_PHASE: Final = b'runHook preBuild\nif [ -n "$flags" ]; then\n\techo "building with \\$flags"\nfi\nrunHook postBuild\n'


def _fixed(name: str, random: Random) -> Derivation:
    digest = random.randbytes(32).hex()
    path = STORE_DIR.make_fixed_output_path(name, "", "sha256", digest)
    env = {f"setting{n}".encode(): random.randbytes(20).hex().encode() for n in range(30)}
    env |= {
        b"name": name.encode(),
        b"out": path.encode(),
        b"urls": b"https://example.org/" + name.encode(),
        b"preferLocalBuild": b"1",
    }
    return Derivation(
        (DerivationOutput("out", path, "sha256", digest),),
        (),
        (),
        _SYSTEM,
        "/bin/sh",
        (b"-e", b"fetch.sh"),
        tuple(sorted(env.items())),
    )


def _package(
    name: str, inputs: Mapping[str, Mapping[str, str]], hashes: Mapping[str, str], random: Random
) -> Derivation:
    """A package over `inputs`: .drv path -> output name -> path."""
    names = ("out", "dev", "lib")[: random.choice((1, 1, 1, 2, 3))]
    paths = " ".join(path for outputs in inputs.values() for path in outputs.values()).encode()
    env = {f"setting{n}".encode(): random.randbytes(random.randrange(24)).hex().encode() for n in range(32)}
    env |= {
        b"name": name.encode(),
        b"system": _SYSTEM.encode(),
        b"buildInputs": paths,
        b"buildPhase": _PHASE * random.randrange(1, 6),
        b"requiredSystemFeatures": b"big-parallel" if random.random() < 0.05 else b"",
        b"outputs": " ".join(names).encode(),
    }
    env |= {output.encode(): b"" for output in names}
    source = STORE_DIR.make_text_path("builder.sh", sha256(b"builder").hexdigest())
    masked = Derivation(
        tuple(DerivationOutput(output, "") for output in names),
        tuple(sorted((drv_path, tuple(sorted(outputs))) for drv_path, outputs in inputs.items())),
        (source,),
        _SYSTEM,
        "/bin/sh",
        (b"-e", source.encode()),
        tuple(sorted(env.items())),
    )
    digest = sha256(aterm.render(masked, mask_outputs=True, input_hashes=hashes)).hexdigest()
    outputs = {output: STORE_DIR.make_output_path(digest, output, name) for output in names}
    env |= {output.encode(): path.encode() for output, path in outputs.items()}
    return replace(
        masked,
        outputs=tuple(DerivationOutput(output, path) for output, path in sorted(outputs.items())),
        env=tuple(sorted(env.items())),
    )


def make_graph(count: int, seed: int) -> list[Member]:
    """`count` derivations, inputs first; the same for the same seed.

    The hash of each member is taken from `Verifier`, so a graph that could be made is one that verifies.
    """
    random = Random(seed)
    verifier = Verifier(STORE_DIR)
    members: list[Member] = []
    outputs: dict[str, dict[str, str]] = {}
    hashes: dict[str, str] = {}
    for number in range(count):
        name = f"package-{number}-1.{number % 10}.0"
        if number < 4 or random.random() < 1 / 6:
            drv = _fixed(f"{name}.tar.gz", random)
            name = f"{name}.tar.gz"
        else:
            reach = members[-2000:]
            chosen = {random.choice(reach)[0] for _ in range(random.randrange(2, 22))}
            drv = _package(name, {path: outputs[path] for path in chosen}, hashes, random)
        data = aterm.render(drv)
        refs = [path for path, _ in drv.input_drvs] + list(drv.input_srcs)
        drv_path = STORE_DIR.make_text_path(f"{name}.drv", sha256(data).hexdigest(), refs)
        hashes[drv_path] = verifier.add(drv_path, data).hash_modulo
        outputs[drv_path] = {output.name: output.path for output in drv.outputs}
        members.append((drv_path, data))
    return members


def measure(members: Sequence[Member], clock: Callable[[], float]) -> dict[str, float]:
    """Microseconds per derivation of each stage; `clock` gives seconds.

    `verify` is the whole, not a part: parsing, the path of the .drv, hash modulo, output paths.
    """
    stages: dict[str, Callable[[], object]] = {
        "sha256": lambda: [sha256(data).digest() for _, data in members],
        "parse": lambda: [aterm.parse(data) for _, data in members],
        "drv_path": lambda: [STORE_DIR.make_text_path("package.drv", "0" * 64, (path,)) for path, _ in members],
        "output_path": lambda: [
            STORE_DIR.make_output_path("0" * 64, "dev", output_path_name("package", "dev")) for _ in members
        ],
        "verify": lambda: _verify(members),
    }
    result: dict[str, float] = {}
    for name, run in stages.items():
        start = clock()
        run()
        result[name] = (clock() - start) / len(members) * 1e6
    return result


def _verify(members: Sequence[Member]) -> None:
    verifier = Verifier(STORE_DIR)
    for drv_path, data in members:
        verifier.add(drv_path, data)
