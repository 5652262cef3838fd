"""Run the migrations on the connection that ``Database`` opened and locked; it commits, not Alembic."""

from __future__ import annotations

from alembic import context

from service.jobs import (
    comparison_tables,  # noqa: F401 - registers its tables
    tenancy_tables,  # noqa: F401 - its tables join the metadata
    webhook_tables,  # noqa: F401 - registers its tables
)
from service.jobs.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
