"""The table ``measures``: how each layer moved, as found just before each commit."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the table. Commits that are there have no measures."""
    op.create_table(
        "measures",
        sa.Column("commit_pk", KEY, nullable=False),
        sa.Column("layer_pk", KEY, nullable=False),
        sa.Column("drift", sa.Float(53)),
        sa.Column("relative_drift", sa.Float(53)),
        sa.Column("momentum", sa.Float(53)),
        sa.Column("gradient", sa.Float(53)),
        sa.Column("curvature", sa.Float(53)),
        sa.Column("finite", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("commit_pk", "layer_pk", name="pk_measures"),
        sa.ForeignKeyConstraint(["commit_pk"], ["commits.pk"], name="fk_measures_commit_pk"),
        sa.ForeignKeyConstraint(["layer_pk"], ["layers.pk"], name="fk_measures_layer_pk"),
        comment="How each layer moved, as found just before a commit; NULL: unknown, or not a finite number.",
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    """Drop it, and what was measured with it; a rebuild from the manifests brings that back."""
    op.drop_table("measures")
