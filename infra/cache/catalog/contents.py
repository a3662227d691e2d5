"""Published paths by their content: which of them hold what a fixed output wants, under whatever name.

The content address that a path was published with is a hint, not a proof: what is offered by it is hashed again
(`infra.cache.pulls.content_offers`). Only paths without references count, as fixed outputs have none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from infra.cache.catalog.catalog import Catalog, Row, row_columns
from infra.cache.catalog.database import chunked, paths, reading, refs
from infra.nix import narinfo as narinfo_format
from infra.nix.content import FixedContent
from infra.nix.narinfo import NarInfo


async def holders(catalog: Catalog, wanted: Collection[FixedContent]) -> dict[FixedContent, NarInfo]:
    """Return a path that holds each content and can be fetched, where there is one."""
    # In a thread: a large graph has some ten thousand, and each address is to be encoded.
    by_address, by_archive = await asyncio.to_thread(_by_names, wanted)
    found: dict[FixedContent, NarInfo] = {}
    async with reading(catalog.database) as connection:
        for column, by_value in ((paths.c.ca, by_address), (paths.c.nar_hash, by_archive)):
            for chunk in chunked(list(by_value)):
                first = await connection.execute(_first_of(column, chunk))
                contents = {serial: by_value[value] for value, serial in first.all()}
                rows = await connection.execute(sa.select(*row_columns()).where(paths.c.serial.in_(list(contents))))
                for row in await catalog.fetchable([Row(*values) for values in rows]):
                    found.setdefault(contents[row.serial], narinfo_format.parse(row.narinfo, catalog.store_dir))
    return found


def _by_names(wanted: Collection[FixedContent]) -> tuple[dict[str, FixedContent], dict[str, FixedContent]]:
    """Return contents by the addresses and by the hashes of archives under which a path may hold them."""
    by_address = {address: content for content in wanted for address in _addresses(content)}
    archives = ((content.sha256, content) for content in wanted if not content.is_flat)
    return by_address, {digest: content for digest, content in archives if digest}


def _first_of(column: sa.Column[str], values: Sequence[str]) -> sa.Select[str, Any]:
    """Return the question for the oldest path without references for each value; many may have one content."""
    referring = sa.select(refs.c.referrer).where(refs.c.referrer == paths.c.serial).exists()
    question = sa.select(column, sa.func.min(paths.c.serial)).where(
        column.in_(values), paths.c.tombstoned_at.is_(None), ~referring
    )
    if column is paths.c.ca:
        # As the index has it, or it is not used.
        question = question.where(sa.text("ca <> ''"))
    return question.group_by(column)


def _addresses(content: FixedContent) -> tuple[str, ...]:
    """Return the addresses under which a path may have been published that holds the content."""
    if content.is_flat and content.sha256:
        # A text (`builtins.toFile`) is a plain file too.
        return content.address, f"text:{content.sha256}"
    return (content.address,)
