"""JSON form of wish lists in requests: bounded, because its sender may be a stranger."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, FailFast, Field

from coordinator.wishes.checks import check_system, check_target
from coordinator.wishes.model import (
    MAX_INSTALLABLE,
    MAX_NAME,
    MAX_NOTES,
    MAX_OUTPUTS,
    MAX_PATH,
    MAX_SYSTEMS,
    MAX_WISHES,
    Wish,
    WishedAttribute,
    WishedDerivation,
    WishedOutput,
    WishedPaths,
    WishList,
    WishMark,
    WishSource,
    WishTarget,
    unique,
)
from infra.nix.store_path import StoreDir

#: Version of this form.
FORM: Literal[1] = 1
#: Text without control characters.
_PLAIN = r"^[^\x00-\x1f\x7f]*$"
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=_PLAIN)]
_Text = Annotated[str, Field(max_length=MAX_NAME, pattern=_PLAIN)]
_Path = Annotated[str, Field(max_length=MAX_PATH, pattern=_PLAIN)]
_Installable = Annotated[str, Field(max_length=MAX_INSTALLABLE, pattern=_PLAIN)]
_System = Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9_]+-[a-z0-9_]+$")]


class _DocumentPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class OutputDocument(_DocumentPart):
    """`WishedOutput`."""

    name: _Name
    path: _Path


_Outputs: TypeAlias = Annotated[tuple[OutputDocument, ...], Field(max_length=MAX_OUTPUTS), FailFast()]


class PathsTarget(_DocumentPart):
    """`WishedPaths`."""

    kind: Literal["paths"]
    outputs: Annotated[_Outputs, Field(min_length=1)]
    derivation: _Path | None = None
    installable: _Installable = ""
    others: _Outputs = ()

    def target(self) -> WishTarget:
        """Return the words of it."""
        outputs, others = (
            tuple(WishedOutput(output.name, output.path) for output in each) for each in (self.outputs, self.others)
        )
        return WishedPaths(outputs, self.derivation, self.installable, others)


class DerivationTarget(_DocumentPart):
    """`WishedDerivation`."""

    kind: Literal["derivation"]
    path: _Path
    outputs: Annotated[tuple[_Name, ...], Field(max_length=MAX_OUTPUTS)] = ()

    def target(self) -> WishTarget:
        """Return the words of it."""
        return WishedDerivation(self.path, self.outputs)


class AttributeTarget(_DocumentPart):
    """`WishedAttribute`."""

    kind: Literal["attribute"]
    source: _Installable
    attribute: _Installable
    is_flake: bool = True

    def target(self) -> WishTarget:
        """Return the words of it."""
        return WishedAttribute(self.source, self.attribute, self.is_flake)


class WishDocument(_DocumentPart):
    """`Wish`."""

    name: _Name
    system: _System
    target: Annotated[PathsTarget | DerivationTarget | AttributeTarget, Field(discriminator="kind")]
    group: _Text = ""
    marks: Annotated[tuple[WishMark, ...], Field(max_length=len(WishMark))] = ()
    version: _Text = ""


class WishListDocument(_DocumentPart):
    """`WishList`; `digest` is for readers, and not read back."""

    form: Literal[1]
    place: _Installable
    source: WishSource
    systems: Annotated[tuple[_System, ...], Field(max_length=MAX_SYSTEMS)]
    version: _Text = ""
    notes: Annotated[tuple[_Installable, ...], Field(max_length=MAX_NOTES)] = ()
    digest: Annotated[str, Field(max_length=64)] = ""
    wishes: Annotated[tuple[WishDocument, ...], Field(max_length=MAX_WISHES), FailFast()]

    def wish_list(self, store_dir: StoreDir) -> WishList:
        """Return the words of it.

        Raises:
            WishListError: It has a path of another store directory, a system that Nix does not know, or one package
                twice and differently.
        """
        wishes, notes = unique(self.place, [self._wish(each, store_dir) for each in self.wishes])
        return WishList(self.place, self.source, wishes, self.systems, self.version, (*self.notes, *notes)[:MAX_NOTES])

    def _wish(self, each: WishDocument, store_dir: StoreDir) -> Wish:
        check_system(self.place, each.name, each.system)
        target = each.target.target()
        check_target(self.place, each.name, target, store_dir)
        return Wish(each.name, each.system, target, each.group, frozenset(each.marks), each.version)


def document_of(wishes: WishList) -> WishListDocument:
    """Return the JSON form of a list."""
    return WishListDocument.model_construct(
        form=FORM,
        place=wishes.place,
        source=wishes.source,
        systems=wishes.systems,
        version=wishes.version,
        notes=wishes.notes,
        digest=wishes.digest,
        wishes=tuple(
            WishDocument.model_construct(
                name=wish.name,
                system=wish.system,
                target=_target(wish.target),
                group=wish.group,
                marks=tuple(sorted(wish.marks)),
                version=wish.version,
            )
            for wish in wishes.wishes
        ),
    )


def _target(target: WishTarget) -> PathsTarget | DerivationTarget | AttributeTarget:
    match target:
        case WishedPaths(outputs, derivation, installable, others):
            return PathsTarget.model_construct(
                kind="paths",
                outputs=_outputs(outputs),
                derivation=derivation,
                installable=installable,
                others=_outputs(others),
            )
        case WishedDerivation(path, names):
            return DerivationTarget.model_construct(kind="derivation", path=path, outputs=names)
        case WishedAttribute(source, attribute, is_flake):
            return AttributeTarget.model_construct(
                kind="attribute", source=source, attribute=attribute, is_flake=is_flake
            )


def _outputs(outputs: tuple[WishedOutput, ...]) -> tuple[OutputDocument, ...]:
    return tuple(OutputDocument.model_construct(name=each.name, path=each.path) for each in outputs)
