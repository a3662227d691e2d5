"""Paths by their content, so that a fixed output is found under another name."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the indexes; every path that was published before is found by them."""
    addressed = sa.text("ca <> ''")
    op.create_index("paths_by_ca", "paths", ["ca"], sqlite_where=addressed, postgresql_where=addressed)
    op.create_index("paths_by_nar_hash", "paths", ["nar_hash"])
