"""The table ``receipts``: proof that a write took effect, for a client that lost the reply to its commit."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "receipts",
        sa.Column("receipt_id", sa.String(20), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("receipt_id", name="pk_receipts"),
        comment="Proof that a write that must not happen twice took effect, for a client that lost the reply.",
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("receipts")
