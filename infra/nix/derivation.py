"""Derivations as values: what a .drv file holds, which kind it is, and the options that a scheduler reads.

Paths, names and hashes are `str`. Arguments and the environment are `bytes`: a builder may be given any bytes, and
their hash matters, so nothing here assumes an encoding. The name of a derivation is not in the file: it comes from
its store path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from infra.nix.errors import FormatError

#: Environment key whose presence means that options are read from JSON.
STRUCTURED_ATTRS_KEY: Final = b"__json"
#: Environment keys that `options_from_env` reads.
OPTION_KEYS: Final = frozenset(
    (STRUCTURED_ATTRS_KEY, b"requiredSystemFeatures", b"preferLocalBuild", b"allowSubstitutes", b"__noChroot")
)


class DerivationKind(Enum):
    """Kinds of derivations by the origin of their output paths (infra/nix/FORMATS.md 2.2)."""

    INPUT_ADDRESSED = "input-addressed"
    FIXED = "fixed"
    FLOATING = "floating"
    DEFERRED = "deferred"
    IMPURE = "impure"


@dataclass(frozen=True, slots=True)
class DerivationOutput:
    """One output: name, full path or "", `[r:]algo` or "", base16 hash, `impure` or ""."""

    name: str
    path: str
    hash_algo: str = ""
    hash: str = ""


@dataclass(frozen=True, slots=True)
class Derivation:
    """The content of a .drv file, in the order of the file.

    Attributes:
        outputs: At least one in any derivation that can be built.
        input_drvs: (full path of the .drv, names of the outputs used) each.
        input_srcs: Full store paths.
        system: Such as `x86_64-linux`.
        builder: Program, or `builtin:<name>`.
        args: Arguments of the builder.
        env: (key, value) pairs.
    """

    outputs: tuple[DerivationOutput, ...]
    input_drvs: tuple[tuple[str, tuple[str, ...]], ...]
    input_srcs: tuple[str, ...]
    system: str
    builder: str
    args: tuple[bytes, ...]
    env: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class DerivationOptions:
    """Attributes of a derivation that decide where and how it is built (infra/nix/FORMATS.md 2.3).

    Attributes:
        required_system_features: In the order given; a worker must have all.
        prefer_local_build: A trivial step, not worth a far worker.
        allow_substitutes: False asks to build rather than download.
        structured_attrs: Whether the options were read from JSON.
        no_chroot: The derivation asks to be built without a sandbox.
    """

    required_system_features: tuple[str, ...] = ()
    prefer_local_build: bool = False
    allow_substitutes: bool = True
    structured_attrs: bool = False
    no_chroot: bool = False


_DEFAULT_OPTIONS: Final = DerivationOptions()


def _output_kind(output: DerivationOutput) -> DerivationKind:
    match (bool(output.path), bool(output.hash_algo), output.hash):
        case (True, False, ""):
            return DerivationKind.INPUT_ADDRESSED
        case (False, False, ""):
            return DerivationKind.DEFERRED
        case (False, True, ""):
            return DerivationKind.FLOATING
        case (False, True, "impure"):
            return DerivationKind.IMPURE
        case (True, True, digest) if digest and digest != "impure":
            return DerivationKind.FIXED
        case _:
            raise FormatError(f"output {output.name!r} has no known kind", offset=0, subject="derivation outputs")


def classify(outputs: tuple[DerivationOutput, ...]) -> DerivationKind:
    """The kind that all `outputs` share.

    Raises:
        FormatError: If there is none, they differ, or a fixed one is not the only one and named `out`.
    """
    if not outputs:
        raise FormatError("a derivation needs an output", offset=0, subject="derivation outputs")
    kind = _output_kind(outputs[0])
    if len(outputs) > 1:
        if any(_output_kind(output) is not kind for output in outputs):
            raise FormatError("outputs of different kinds", offset=0, subject="derivation outputs")
        if kind is DerivationKind.FIXED:
            raise FormatError("a fixed derivation has one output", offset=0, subject="derivation outputs")
    if kind is DerivationKind.FIXED and outputs[0].name != "out":
        raise FormatError("the output of a fixed derivation is named out", offset=0, subject="derivation outputs")
    return kind


def _json_bool(attrs: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = attrs.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{key} is not a boolean", offset=0, subject="structured attributes")
    return value


def _structured_options(text: bytes) -> DerivationOptions:
    import json  # noqa: PLC0415 - slow to import, and few derivations have such attributes

    try:
        attrs = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(error.msg, offset=error.pos, subject="structured attributes") from None
    except (ValueError, RecursionError):
        raise FormatError(
            "not UTF-8 JSON of reasonable depth and numbers", offset=0, subject="structured attributes"
        ) from None
    if not isinstance(attrs, dict):
        raise FormatError("not a JSON object", offset=0, subject="structured attributes")
    features = attrs.get("requiredSystemFeatures", [])
    if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
        raise FormatError("requiredSystemFeatures is not a list of strings", offset=0, subject="structured attributes")
    return DerivationOptions(
        required_system_features=tuple(features),
        prefer_local_build=_json_bool(attrs, "preferLocalBuild", default=False),
        allow_substitutes=_json_bool(attrs, "allowSubstitutes", default=True),
        structured_attrs=True,
        no_chroot=_json_bool(attrs, "__noChroot", default=False),
    )


def options_from_env(env: Mapping[bytes, bytes]) -> DerivationOptions:
    """The options in an environment given as a mapping.

    Raises:
        FormatError: If structured attributes are not JSON of the right shape, or a feature is not UTF-8; the offset
        is in the value.
    """
    if STRUCTURED_ATTRS_KEY in env:
        return _structured_options(env[STRUCTURED_ATTRS_KEY])
    features = env.get(b"requiredSystemFeatures")
    prefer_local = env.get(b"preferLocalBuild")
    substitutes = env.get(b"allowSubstitutes")
    no_chroot = env.get(b"__noChroot")
    if not features and prefer_local is None and substitutes is None and no_chroot is None:
        return _DEFAULT_OPTIONS
    try:
        names = tuple(feature.decode() for feature in (features or b"").split())
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", offset=error.start, subject="requiredSystemFeatures") from None
    return DerivationOptions(
        required_system_features=names,
        prefer_local_build=prefer_local == b"1",
        allow_substitutes=substitutes is None or substitutes == b"1",
        no_chroot=no_chroot == b"1",
    )


def options(drv: Derivation) -> DerivationOptions:
    """The options of `drv`, from structured attributes if it has them, else from its environment.

    Raises:
        FormatError: As `options_from_env`.
    """
    return options_from_env(dict(drv.env))
