"""Ids of lines, and the table ``withdrawn``: a word on every commit id that the catalog ever knew."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ID = sa.String(20)
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add the column and the table. Lines that are there are named by their keys."""
    op.add_column("lines", sa.Column("line_id", ID))
    by_key = "printf('%020x', pk)" if op.get_bind().dialect.name == "sqlite" else "lpad(to_hex(pk), 20, '0')"
    op.execute(f"UPDATE lines SET line_id = {by_key}")  # noqa: S608
    op.create_index("uq_lines_store_pk_line_id", "lines", ["store_pk", "line_id"], unique=True)
    op.create_table(
        "withdrawn",
        sa.Column("store_pk", KEY, nullable=False),
        sa.Column("commit_id", ID, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("withdrawn_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("store_pk", "commit_id", name="pk_withdrawn"),
        sa.ForeignKeyConstraint(["store_pk"], ["stores.pk"], name="fk_withdrawn_store_pk"),
        comment="Commit ids that lost their standing, until nothing of theirs is left in the root.",
    )


def downgrade() -> None:
    """Drop them. Of commits that lost their standing nothing is known any more; GC takes theirs for leftovers."""
    op.drop_table("withdrawn")
    op.drop_index("uq_lines_store_pk_line_id", "lines")
    op.drop_column("lines", "line_id")
