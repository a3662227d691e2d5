"""Schema of the resource types of AWS that `terraform/` uses, from a package that is generated from the provider.

`python -m tests.deploy.aws_schema WHEEL` writes `aws_schema.json` from a wheel of `cdktn-provider-aws` (70 MB, which no
test fetches) for the types that the modules name. The wheel tells required from other attributes, but not optional from
computed ones: these are both here. Lists and sets look the same in it: all are lists.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(__file__).with_name("aws_schema.json")
MODULES: Final = Path(__file__).resolve().parents[2] / "terraform"
#: Parameters that every resource has, which are Terraform's own.
_META: Final = frozenset({"connection", "count", "depends_on", "for_each", "lifecycle", "provider", "provisioners"})
#: Names that are taken in the languages of the package.
_RENAMED: Final = {"self_attribute": "self"}
_PLAIN: Final = {"builtins.str": "string", "builtins.bool": "bool", "jsii.Number": "number"}


def used_types() -> dict[str, list[str]]:
    """Return the names of resource and data types that the modules use."""
    text = "\n".join(path.read_text() for path in sorted(MODULES.rglob("*.tf")))
    return {kind: sorted(set(re.findall(rf'^{kind} "aws_(\w+)"', text, re.MULTILINE))) for kind in ("resource", "data")}


class Package:
    """Classes of one module of the wheel."""

    def __init__(self, wheel: zipfile.ZipFile, name: str) -> None:
        tree = ast.parse(wheel.read(f"cdktn_provider_aws/{name}/__init__.py"))
        self._classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self._main = next(
            node for node in self._classes.values()
            if any(ast.unparse(base).endswith(("TerraformResource", "TerraformDataSource")) for base in node.bases)
        )  # fmt: skip

    def block(self) -> dict[str, Any]:
        """Return attributes and blocks of the type itself, results included."""
        block = self._inputs(self._main, leave=_META | {"scope", "id_"})
        for node in self._main.body:
            if not isinstance(node, ast.FunctionDef) or not _is_property(node) or node.name.endswith("_input"):
                continue
            kind = self._result(ast.unparse(node.returns)) if node.returns else None
            if kind is not None and node.name not in {*block["attributes"], *block["blocks"]}:
                block["attributes"][node.name] = {"type": kind}
        for own in ("cdktf_stack", "fqn", "friendly_unique_id", "terraform_resource_type"):
            block["attributes"].pop(own, None)
        return block

    def _inputs(self, of: ast.ClassDef, leave: frozenset[str] = frozenset()) -> dict[str, Any]:
        made = next(node for node in of.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        attributes: dict[str, Any] = {}
        blocks: dict[str, Any] = {}
        for argument, default in zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True):
            if argument.arg in leave or argument.annotation is None:
                continue
            kind = ast.unparse(argument.annotation)
            name = _RENAMED.get(argument.arg, argument.arg)
            struct = next((one for one in re.findall(r"'(\w+)'", kind) if one in self._classes), None)
            if struct is None:
                attributes[name] = {"type": _plain(kind)} | ({"required": True} if default is None else {})
            else:
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
    inner = next((name for text, name in _PLAIN.items() if text in kind), "string")
    if "IResolvable" in kind and "str" not in kind and "Number" not in kind:
        inner = "bool"
    if "Mapping[builtins.str" in kind or "StringMap" in kind:
        return ["map", "string"]
    return ["list", inner] if "Sequence[" in kind or "List[" in kind else inner


def main(wheel: str) -> None:
    """Write the schema of what the modules use."""
    found: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for kind, names in used_types().items():
            folder = {"resource": "", "data": "data_aws_"}[kind]
            found[kind] = {f"aws_{name}": Package(archive, f"{folder}{name}").block() for name in names}
    FILE.write_text(json.dumps(found, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
