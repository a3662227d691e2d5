"""The first released schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

#: SQLite numbers rows by itself only in a column of exactly the type INTEGER.
_Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table."""
    _published()
    _kept()
    op.create_table(
        "deletions",
        sa.Column("serial", _Serial, primary_key=True, autoincrement=True),
        sa.Column("url", sa.Text, nullable=False, unique=True),
        sa.Column("file_size", sa.BigInteger, nullable=False),
        sa.Column("done_at", sa.Double),
        sqlite_autoincrement=True,
    )
    op.create_index("deletions_by_end", "deletions", ["done_at"])
    op.create_table(
        "realisations",
        sa.Column("layout", sa.String(16), primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("out_path", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("published_at", sa.Double, nullable=False),
    )
    op.create_index("realisations_by_path", "realisations", ["out_path"])


def _published() -> None:
    op.create_table(
        "paths",
        sa.Column("serial", _Serial, primary_key=True, autoincrement=True),
        sa.Column("hash_part", sa.String(32), nullable=False, unique=True),
        sa.Column("store_path", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("compression", sa.Text, nullable=False),
        sa.Column("file_hash", sa.String(59), nullable=False),
        sa.Column("file_size", sa.BigInteger, nullable=False),
        sa.Column("nar_hash", sa.String(59), nullable=False),
        sa.Column("nar_size", sa.BigInteger, nullable=False),
        sa.Column("deriver", sa.Text, nullable=False),
        sa.Column("ca", sa.Text, nullable=False),
        sa.Column("narinfo", sa.LargeBinary, nullable=False),
        sa.Column("published_at", sa.Double, nullable=False),
        sa.Column("last_used_at", sa.Double, nullable=False, server_default="0"),
        sa.Column("tombstoned_at", sa.Double),
        sqlite_autoincrement=True,
    )
    op.create_index("paths_by_url", "paths", ["url", "serial"])
    op.create_table(
        "refs",
        sa.Column("referrer", _Serial, sa.ForeignKey("paths.serial"), primary_key=True, autoincrement=False),
        sa.Column("reference", _Serial, sa.ForeignKey("paths.serial"), primary_key=True, autoincrement=False),
    )
    op.create_index("refs_by_reference", "refs", ["reference"])
    op.create_table(
        "conflicts",
        sa.Column("serial", _Serial, sa.ForeignKey("paths.serial"), primary_key=True, autoincrement=False),
        sa.Column("nar_hash", sa.String(59), primary_key=True),
        sa.Column("nar_size", sa.BigInteger, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("file_size", sa.BigInteger, nullable=False),
        sa.Column("deriver", sa.Text, nullable=False),
        sa.Column("first_seen_at", sa.Double, nullable=False),
        sa.Column("times", sa.Integer, nullable=False),
    )
    op.create_index("conflicts_by_url", "conflicts", ["url", "serial"])


def _kept() -> None:
    op.create_table(
        "roots",
        sa.Column("id", _Serial, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("kept_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.UniqueConstraint("kind", "name"),
        sqlite_autoincrement=True,
    )
    op.create_index("roots_by_expiry", "roots", ["expires_at"])
    op.create_table(
        "root_paths",
        sa.Column(
            "root", _Serial, sa.ForeignKey("roots.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        ),
        sa.Column("hash_part", sa.String(32), primary_key=True),
    )
    op.create_index("root_paths_by_hash_part", "root_paths", ["hash_part", "root"])
