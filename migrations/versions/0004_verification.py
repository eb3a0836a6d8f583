"""When versions and commits were last verified, and which versions are in quarantine."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add the columns. What is there counts as never verified, and as whole."""
    op.add_column("versions", sa.Column("verified_at", TIME))
    op.add_column("versions", sa.Column("quarantined_at", TIME))
    op.add_column("versions", sa.Column("damage", sa.Text))
    op.add_column("commits", sa.Column("verified_at", TIME))
    quarantined = sa.text("quarantined_at IS NOT NULL")
    op.create_index(
        "ix_versions_quarantined_at",
        "versions",
        ["quarantined_at"],
        sqlite_where=quarantined,
        postgresql_where=quarantined,
    )


def downgrade() -> None:
    """Drop them. What was in quarantine is known to its records in the root; the rest is forgotten."""
    op.drop_index("ix_versions_quarantined_at", "versions")
    op.drop_column("commits", "verified_at")
    for name in ("damage", "quarantined_at", "verified_at"):
        op.drop_column("versions", name)
