"""Job control: deadlines, and which key submitted a job, for fairness and caps between keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

WAITING = "phase IN ('queued', 'recovering')"
LEASED = "lease_until IS NOT NULL"
DEADLINE = "deadline_at IS NOT NULL AND finished_at IS NULL"
COLUMNS = (
    ("api_key_id", sa.Text()),
    ("deadline_seconds", sa.Float(precision=53)),
    ("deadline_at", sa.Float(precision=53)),
)


def upgrade() -> None:
    for name, kind in COLUMNS:
        op.add_column("jobs", sa.Column(name, kind, nullable=True))
    _replace("ix_jobs_waiting", ["queue", "priority", "phase", "project", "api_key_id", "queued_at", "id"], WAITING)
    _replace("ix_jobs_leased", ["queue", "project", "api_key_id", "lease_until"], LEASED)
    _create("ix_jobs_deadline", ["deadline_at"], DEADLINE)


def downgrade() -> None:
    # Phases that this version brought are not known to the one before: their jobs wait again.
    op.execute("UPDATE jobs SET phase = 'queued' WHERE phase IN ('created', 'paused')")
    op.execute("UPDATE jobs SET phase = 'running' WHERE phase = 'pausing'")
    op.drop_index("ix_jobs_deadline", "jobs")
    _replace("ix_jobs_leased", ["queue", "project", "lease_until"], LEASED)
    _replace("ix_jobs_waiting", ["queue", "priority", "phase", "project", "queued_at", "id"], WAITING)
    for name, _ in reversed(COLUMNS):
        op.drop_column("jobs", name)


def _replace(name: str, columns: list[str], where: str) -> None:
    op.drop_index(name, "jobs")
    _create(name, columns, where)


def _create(name: str, columns: list[str], where: str) -> None:
    op.create_index(name, "jobs", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
