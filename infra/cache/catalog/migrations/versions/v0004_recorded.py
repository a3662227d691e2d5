"""Recorded paths: what an upstream has and the cache has not."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table, empty."""
    op.create_table(
        "recorded",
        sa.Column("hash_part", sa.String(32), primary_key=True),
        sa.Column("store_path", sa.Text, nullable=False),
        sa.Column("upstream", sa.Text, nullable=False),
        sa.Column("narinfo", sa.LargeBinary, nullable=False),
        sa.Column("recorded_at", sa.Double, nullable=False),
    )
    op.create_index("recorded_by_time", "recorded", ["recorded_at"])
