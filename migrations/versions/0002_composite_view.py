"""The view ``composite``: which layer version stands where in which commit, for people with psql or sqlite3."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the view."""
    op.execute(
        """
        CREATE VIEW composite AS
        SELECT
            stores.store_id AS store_id,
            commits.commit_id AS commit_id,
            commits.branch AS branch,
            commits.step AS step,
            commits.created_at AS created_at,
            layers.name AS layer,
            versions.version_id AS version_id,
            versions.step AS source_step,
            commits.step - versions.step AS staleness,
            versions.fidelity AS fidelity,
            versions.digest AS digest,
            versions.bytes_logical AS bytes_logical,
            versions.bytes_stored AS bytes_stored,
            'layers/' || layers.component || '/' || versions.version_id || '/' AS prefix
        FROM composites
        JOIN commits ON commits.pk = composites.commit_pk
        JOIN stores ON stores.pk = commits.store_pk
        JOIN layers ON layers.pk = composites.layer_pk
        JOIN versions ON versions.pk = composites.version_pk
        """
    )


def downgrade() -> None:
    """Drop the view."""
    op.execute("DROP VIEW composite")
