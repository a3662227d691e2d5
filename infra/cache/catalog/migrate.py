"""Bringing the metadata's schema up to date, inside one writing transaction."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from infra.cache.errors import SchemaTooNewError

#: Where a database says which revision it has. Not alembic's usual name: other programs may share the database.
VERSION_TABLE = "cache_revision"

_MIGRATIONS = Path(__file__).with_name("migrations")


def refuse_newer(connection: Connection) -> str:
    """Return the revision that the database has, "" if it is new; changes nothing.

    Raises:
        SchemaTooNewError: this release does not know the revision.
    """
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return ""
    table = sa.table(VERSION_TABLE, sa.column("version_num", sa.Text))
    found = connection.execute(sa.select(table.c.version_num)).scalars().first() or ""
    if found and found not in _revisions():
        raise SchemaTooNewError(
            f"the cache's database has schema {found}, which this release does not know: "
            "start the newer release, or point the cache at another database"
        )
    return str(found)


def migrate(connection: Connection) -> None:
    """Bring the schema to this release's revision; commits nothing itself.

    Raises:
        SchemaTooNewError: a newer release wrote the database; nothing was touched.
    """
    found = refuse_newer(connection)
    if found == _revisions()[-1]:
        return
    # Half a second that only who makes or migrates a database has to pay.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    # The value is subject to interpolation.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes.update(connection=connection, version_table=VERSION_TABLE)
    command.upgrade(config, "head")


def _revisions() -> list[str]:
    """Return the revisions that this release knows, oldest first; read from file names, without importing them."""
    return sorted(path.name.partition("_")[0].removeprefix("v") for path in _MIGRATIONS.glob("versions/v*_*.py"))
