"""Schemas of the resource types that `terraform/` uses, from packages that are generated from the providers.

`python -m tests.deploy.schemas PROVIDER WHEEL` writes `schemas/PROVIDER.json` from a wheel of the package that
`PROVIDERS` names (up to 70 MB, which no test fetches) for the types that the modules name. The wheels tell required
from other attributes, but not optional from computed ones: these are both here. Lists and sets look the same in them:
all are lists.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

FOLDER: Final = Path(__file__).with_name("schemas")
MODULES: Final = Path(__file__).resolve().parents[2] / "terraform"
#: Parameters that every resource has, which are Terraform's own.
_META: Final = frozenset({"connection", "count", "depends_on", "for_each", "lifecycle", "provider", "provisioners"})
#: Names that are taken in the languages of the packages.
_RENAMED: Final = {"self_attribute": "self"}
#: Blocks that pulumi names in the plural.
_PLURALS: Final = {"networks": "network", "public_nets": "public_net", "rules": "rule", "apply_tos": "apply_to"}
_PLAIN: Final = {"builtins.str": "string", "builtins.bool": "bool", "jsii.Number": "number", "builtins.int": "number"}


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider: where Terraform looks for it, its release, the package with its types, and its configuration."""

    source: str
    version: str
    package: str
    configuration: dict[str, Any]


def _settings(names: dict[str, Any], **blocks: Any) -> dict[str, Any]:
    return {"attributes": {name: {"type": kind} for name, kind in names.items()}, "blocks": blocks}


PROVIDERS: Final = {
    "aws": Provider(
        "hashicorp/aws", "6.69.1", "cdktn_provider_aws",
        _settings({"region": "string"}, default_tags={"many": False, **_settings({"tags": ["map", "string"]})}),
    ),
    "helm": Provider(
        "hashicorp/helm", "3.3.0", "cdktn_provider_helm",
        _settings({"kubernetes": ["object", {"config_path": "string"}]}),
    ),
    "kubernetes": Provider(
        "hashicorp/kubernetes", "3.4.0", "cdktn_provider_kubernetes", _settings({"config_path": "string"})
    ),
    # Of this package's release 1.43.3; the documents of the provider's release agree with it.
    "hcloud": Provider("hetznercloud/hcloud", "1.68.0", "pulumi_hcloud", _settings({"token": "string"})),
}  # fmt: skip


def used_types(provider: str) -> dict[str, list[str]]:
    """Return the names of resource and data types of a provider that the modules use, without its own name."""
    text = "\n".join(path.read_text() for path in sorted(MODULES.rglob("*.tf")))
    return {
        kind: sorted(set(re.findall(rf'^{kind} "{provider}_(\w+)"', text, re.MULTILINE)))
        for kind in ("resource", "data")
    }


class Package:
    """Classes of modules of a wheel, and the fields that their constructors take."""

    def __init__(self, wheel: zipfile.ZipFile, *modules: str, blocks: Mapping[str, str] = MappingProxyType({})) -> None:
        """`blocks` are other names of blocks."""
        self._blocks = blocks
        nodes = [node for name in modules for node in ast.parse(wheel.read(name)).body]
        self._classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def of_terraform(self) -> dict[str, Any]:
        """Return attributes and blocks of the one type of a module of cdktn, results included."""
        main = next(
            node for node in self._classes.values()
            if any(ast.unparse(base).endswith(("TerraformResource", "TerraformDataSource")) for base in node.bases)
        )  # fmt: skip
        block = self._inputs(main, leave=_META | {"scope", "id_"})
        for node in main.body:
            if not isinstance(node, ast.FunctionDef) or not _is_property(node) or node.name.endswith("_input"):
                continue
            kind = self._result(ast.unparse(node.returns)) if node.returns else None
            if kind is not None and node.name not in {*block["attributes"], *block["blocks"]}:
                block["attributes"][node.name] = {"type": kind}
        for own in ("cdktf_stack", "fqn", "friendly_unique_id", "terraform_resource_type"):
            block["attributes"].pop(own, None)
        return block

    def of_pulumi(self, name: str) -> dict[str, Any]:
        """Return attributes and blocks of a type of pulumi, results included; a name is required, as in Terraform."""
        made = self._classes.get(f"{name}Args") or self._classes[f"{name}InitArgs"]
        block = self._inputs(made)
        whole = self._inputs(self._classes[f"_{name}State"])
        for attribute, one in whole["attributes"].items():
            block["attributes"].setdefault(attribute, {"type": one["type"]})
        block["attributes"].setdefault("id", {"type": "string"})
        if "name" in block["attributes"]:
            block["attributes"]["name"]["required"] = True
        return block

    def _inputs(self, of: ast.ClassDef, leave: frozenset[str] = frozenset()) -> dict[str, Any]:
        made = next(node for node in of.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        attributes: dict[str, Any] = {}
        blocks: dict[str, Any] = {}
        for argument, default in zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True):
            if argument.arg in leave or argument.annotation is None:
                continue
            kind = ast.unparse(argument.annotation)
            struct = next((one for one in re.findall(r"'(\w+)'", kind) if one in self._classes), None)
            if struct is None:
                name = _RENAMED.get(argument.arg, argument.arg)
                attributes[name] = {"type": _plain(kind)} | ({"required": True} if default is None else {})
            else:
                name = self._blocks.get(argument.arg, argument.arg)
                many = "Sequence" in kind
                least = {"required": True} if default is None else {}
                blocks[name] = {"many": many, **least, **self._inputs(self._classes[struct])}
        return {"attributes": attributes, "blocks": blocks}

    def _result(self, kind: str) -> Any:
        """Return the type of a result; None for what is none."""
        if (name := kind.strip("'\"")) in self._classes and name.endswith("List"):
            inner = self._classes.get(f"{name[:-4]}OutputReference")
            members = {} if inner is None else {
                node.name: self._result(ast.unparse(node.returns))
                for node in inner.body
                if isinstance(node, ast.FunctionDef) and _is_property(node) and node.returns and node.name != "fqn"
                and not node.name.endswith(("_input", "internal_value"))
            }  # fmt: skip
            return ["list", ["object", {key: one for key, one in members.items() if one is not None}]]
        return None if "_cdktn" in kind and "IResolvable" not in kind and "Map" not in kind else _plain(kind)


def _is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(one) == "builtins.property" for one in node.decorator_list)


def _plain(kind: str) -> Any:
    kind = kind.replace("_builtins.", "builtins.").replace("Mapping[str", "Mapping[builtins.str")
    inner = next((name for text, name in _PLAIN.items() if text in kind), "string")
    if "IResolvable" in kind and "str" not in kind and "Number" not in kind:
        inner = "bool"
    if "Mapping[builtins.str" in kind or "StringMap" in kind:
        return ["map", "string"]
    return ["list", inner] if "Sequence[" in kind or "List[" in kind else inner


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _block(archive: zipfile.ZipFile, provider: str, kind: str, name: str) -> dict[str, Any]:
    package = PROVIDERS[provider].package
    if package.startswith("pulumi"):
        modules = (f"{package}/{name}.py", f"{package}/_inputs.py")
        return Package(archive, *modules, blocks=_PLURALS).of_pulumi(_camel(name))
    folder = {"resource": "", "data": f"data_{provider}_"}[kind]
    block = Package(archive, f"{package}/{folder}{name}/__init__.py").of_terraform()
    # What look like blocks of helm are attributes with members, which the modules do not use.
    return block if provider != "helm" else {**block, "blocks": {}}


def main(name: str, wheel: str) -> None:
    """Write the schema of what the modules use of a provider."""
    with zipfile.ZipFile(wheel) as archive:
        found = {
            kind: {f"{name}_{one}": _block(archive, name, kind, one) for one in types}
            for kind, types in used_types(name).items()
        }
    FOLDER.joinpath(f"{name}.json").write_text(json.dumps(found, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
