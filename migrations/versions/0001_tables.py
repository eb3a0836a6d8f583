"""All tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)
ID = sa.String(20)


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "catalog",
        sa.Column("pk", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("catalog_id", ID, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("pk", name="pk_catalog"),
        sa.CheckConstraint("pk = 1", name=op.f("ck_catalog_one_row")),
        comment="Identity of this database; one row.",
    )
    op.create_table(
        "stores",
        sa.Column("pk", KEY, nullable=False),
        sa.Column("store_id", sa.Text, nullable=False),
        sa.Column("root", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("pk", name="pk_stores"),
        sa.UniqueConstraint("store_id", name="uq_stores_store_id"),
        comment="Stores whose roots are bound to this catalog; root has no secrets.",
    )
    op.create_table(
        "layers",
        sa.Column("pk", KEY, nullable=False),
        sa.Column("store_pk", KEY, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("component", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("pk", name="pk_layers"),
        sa.ForeignKeyConstraint(["store_pk"], ["stores.pk"], name="fk_layers_store_pk"),
        sa.UniqueConstraint("store_pk", "name", name="uq_layers_store_pk_name"),
        sa.UniqueConstraint("store_pk", "component", name="uq_layers_store_pk_component"),
        comment="Names of layers and their path components. Rows are never deleted, so keys may be cached.",
    )
    op.create_table(
        "lines",
        sa.Column("pk", KEY, nullable=False),
        sa.Column("store_pk", KEY, nullable=False),
        sa.Column("parent_pk", KEY),
        sa.Column("fork_step", sa.BigInteger),
        sa.PrimaryKeyConstraint("pk", name="pk_lines"),
        sa.ForeignKeyConstraint(["store_pk"], ["stores.pk"], name="fk_lines_store_pk"),
        sa.ForeignKeyConstraint(["parent_pk"], ["lines.pk"], name="fk_lines_parent_pk"),
        sa.CheckConstraint("(parent_pk IS NULL) = (fork_step IS NULL)", name=op.f("ck_lines_fork")),
        comment="Append-only runs of commits with growing steps; a fork continues its parent after fork_step.",
    )
    op.create_index("ix_lines_store_pk", "lines", ["store_pk"])
    op.create_index("ix_lines_parent_pk", "lines", ["parent_pk"])
    op.create_table(
        "commits",
        sa.Column("pk", KEY, nullable=False),
        sa.Column("store_pk", KEY, nullable=False),
        sa.Column("commit_id", ID, nullable=False),
        sa.Column("line_pk", KEY, nullable=False),
        sa.Column("branch", sa.Text, nullable=False),
        sa.Column("parent_id", ID),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("message", sa.Text),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("layers_written", sa.Text, nullable=False),
        sa.Column("bytes_written", sa.BigInteger, nullable=False),
        sa.Column("bytes_logical", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("pk", name="pk_commits"),
        sa.ForeignKeyConstraint(["store_pk"], ["stores.pk"], name="fk_commits_store_pk"),
        sa.ForeignKeyConstraint(["line_pk"], ["lines.pk"], name="fk_commits_line_pk"),
        sa.UniqueConstraint("store_pk", "commit_id", name="uq_commits_store_pk_commit_id"),
        sa.UniqueConstraint("line_pk", "step", name="uq_commits_line_pk_step"),
        comment="Published commits. parent_id is text because the parent may be expired.",
    )
    op.create_index("ix_commits_store_pk_step", "commits", ["store_pk", "step"])
    op.create_table(
        "branches",
        sa.Column("pk", KEY, nullable=False),
        sa.Column("store_pk", KEY, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("line_pk", KEY, nullable=False),
        sa.Column("head_pk", KEY),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("pk", name="pk_branches"),
        sa.ForeignKeyConstraint(["store_pk"], ["stores.pk"], name="fk_branches_store_pk"),
        sa.ForeignKeyConstraint(["line_pk"], ["lines.pk"], name="fk_branches_line_pk"),
        sa.ForeignKeyConstraint(["head_pk"], ["commits.pk"], name="fk_branches_head_pk"),
        sa.UniqueConstraint("store_pk", "name", name="uq_branches_store_pk_name"),
        comment="Moving names; publishing compares and sets head_pk.",
    )
    op.create_index("ix_branches_line_pk", "branches", ["line_pk"])
    op.create_index("ix_branches_head_pk", "branches", ["head_pk"])
    op.create_table(
        "tags",
        sa.Column("pk", KEY, nullable=False),
        sa.Column("store_pk", KEY, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("commit_pk", KEY, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("pk", name="pk_tags"),
        sa.ForeignKeyConstraint(["store_pk"], ["stores.pk"], name="fk_tags_store_pk"),
        sa.ForeignKeyConstraint(["commit_pk"], ["commits.pk"], name="fk_tags_commit_pk"),
        sa.UniqueConstraint("store_pk", "name", name="uq_tags_store_pk_name"),
        comment="Fixed names; they protect their commits from being expired.",
    )
    op.create_index("ix_tags_commit_pk", "tags", ["commit_pk"])
    op.create_table(
        "versions",
        sa.Column("pk", KEY, nullable=False),
        sa.Column("layer_pk", KEY, nullable=False),
        sa.Column("version_id", ID, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("fidelity", sa.String(5), nullable=False),
        sa.Column("base_pk", KEY),
        sa.Column("error", sa.Float(53)),
        sa.Column("bytes_logical", sa.BigInteger, nullable=False),
        sa.Column("bytes_stored", sa.BigInteger, nullable=False),
        sa.Column("objects", sa.Integer, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("doomed_at", TIME),
        sa.PrimaryKeyConstraint("pk", name="pk_versions"),
        sa.ForeignKeyConstraint(["layer_pk"], ["layers.pk"], name="fk_versions_layer_pk"),
        sa.ForeignKeyConstraint(["base_pk"], ["versions.pk"], name="fk_versions_base_pk"),
        sa.UniqueConstraint("version_id", "layer_pk", name="uq_versions_version_id_layer_pk"),
        sa.CheckConstraint("fidelity IN ('full', 'light')", name=op.f("ck_versions_fidelity")),
        comment="Layer versions. version_id is the commit that wrote it, perhaps expired; doomed ones await the sweep.",
    )
    for column in ("base_pk", "doomed_at"):
        given = sa.text(f"{column} IS NOT NULL")
        op.create_index(f"ix_versions_{column}", "versions", [column], sqlite_where=given, postgresql_where=given)
    op.create_table(
        "composites",
        sa.Column("commit_pk", KEY, nullable=False),
        sa.Column("layer_pk", KEY, nullable=False),
        sa.Column("version_pk", KEY, nullable=False),
        sa.PrimaryKeyConstraint("commit_pk", "layer_pk", name="pk_composites"),
        sa.ForeignKeyConstraint(["commit_pk"], ["commits.pk"], name="fk_composites_commit_pk"),
        sa.ForeignKeyConstraint(["layer_pk"], ["layers.pk"], name="fk_composites_layer_pk"),
        sa.ForeignKeyConstraint(["version_pk"], ["versions.pk"], name="fk_composites_version_pk"),
        comment="Every commit's full map, so that its ancestors may vanish.",
        sqlite_with_rowid=False,
    )
    op.create_index("ix_composites_version_pk", "composites", ["version_pk"])
    op.create_table(
        "pending",
        sa.Column("store_pk", KEY, nullable=False),
        sa.Column("commit_id", ID, nullable=False),
        sa.Column("branch", sa.Text, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("parent_id", ID),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("store_pk", "commit_id", name="pk_pending"),
        sa.ForeignKeyConstraint(["store_pk"], ["stores.pk"], name="fk_pending_store_pk"),
        comment="Announced commits. Publishing needs the row; GC voids it once it has lapsed.",
    )
    op.create_table(
        "leases",
        sa.Column("lease_id", ID, nullable=False),
        sa.Column("store_pk", KEY, nullable=False),
        sa.Column("commit_pk", KEY, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("lease_id", name="pk_leases"),
        sa.ForeignKeyConstraint(["store_pk"], ["stores.pk"], name="fk_leases_store_pk"),
        sa.ForeignKeyConstraint(["commit_pk"], ["commits.pk"], name="fk_leases_commit_pk"),
        comment="Readers' claims on commits.",
    )
    op.create_index("ix_leases_store_pk", "leases", ["store_pk"])
    op.create_index("ix_leases_commit_pk", "leases", ["commit_pk"])


def downgrade() -> None:
    """Drop the tables, those that refer to others first."""
    for table in (
        "leases",
        "pending",
        "composites",
        "versions",
        "tags",
        "branches",
        "commits",
        "lines",
        "layers",
        "stores",
        "catalog",
    ):
        op.drop_table(table)
