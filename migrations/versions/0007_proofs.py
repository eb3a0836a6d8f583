"""A proof of every commit's composite, by which rows that rotted or went are noticed."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Of commits that are there nothing is proved, until the catalog is rebuilt."""
    op.add_column("commits", sa.Column("proof", sa.String(32)))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("commits", "proof")
