"""Tenancy: projects and their limits, scopes and expiry of keys, GPU minutes, the audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True, astext_type=sa.Text()), "postgresql")
NUMBER = sa.Float(precision=53)
OWNERS = ("jobs", "files", "uploads", "models", "api_keys")


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("archived_at", NUMBER, nullable=True),
        sa.Column("max_files", sa.BigInteger(), nullable=True),
        sa.Column("max_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_unfinished_jobs", sa.BigInteger(), nullable=True),
        sa.Column("max_running_jobs", sa.BigInteger(), nullable=True),
        sa.Column("max_gpu_minutes", NUMBER, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
    )
    _fill_projects()
    op.add_column(
        "api_keys", sa.Column("scopes", JSON, nullable=False, server_default=sa.text('\'["read", "write"]\''))
    )
    with op.batch_alter_table("api_keys") as table:
        table.alter_column("scopes", server_default=None)
        table.add_column(sa.Column("expires_at", NUMBER, nullable=True))
        table.add_column(sa.Column("requests_per_minute", sa.BigInteger(), nullable=True))
        table.add_column(sa.Column("rotated_from", sa.Text(), nullable=True))
    op.create_table(
        "gpu_usage",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("month", sa.String(length=7), nullable=False),
        sa.Column("reserved_minutes", NUMBER, nullable=False),
        sa.Column("used_minutes", NUMBER, nullable=True),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_gpu_usage")),
    )
    op.create_index("ix_gpu_usage_month", "gpu_usage", ["project", "month"])
    op.create_table(
        "audit_events",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", NUMBER, nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("api_key_id", sa.Text(), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("details", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
    )
    op.create_index("ix_audit_events_listing", "audit_events", ["created_at", "id"])
    op.create_index("ix_audit_events_project", "audit_events", ["project", "created_at", "id"])


def downgrade() -> None:
    op.drop_table("audit_events")
    op.drop_table("gpu_usage")
    with op.batch_alter_table("api_keys") as table:
        for name in ("rotated_from", "requests_per_minute", "expires_at", "scopes"):
            table.drop_column(name)
    op.drop_table("projects")


def _fill_projects() -> None:
    """A row for every project that owns something already, and for the default one."""
    connection = op.get_bind()
    names = {"default"}
    for table in OWNERS:
        names |= set(connection.execute(sa.text(f"SELECT DISTINCT project FROM {table}")).scalars())  # noqa: S608
    oldest = sa.text("INSERT INTO projects (id, name, created_at) VALUES (:id, :id, :now)")
    now = connection.execute(sa.text(_CLOCK[connection.dialect.name])).scalar_one()
    connection.execute(oldest, [{"id": name, "now": now} for name in sorted(names)])


_CLOCK = {
    "sqlite": "SELECT CAST(strftime('%s', 'now') AS REAL)",
    "postgresql": "SELECT CAST(EXTRACT(EPOCH FROM now()) AS DOUBLE PRECISION)",
}
