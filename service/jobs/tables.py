"""The tables. SQLAlchemy 2, typed; SQLite and PostgreSQL.

Times are seconds since the epoch by the database's clock (``database.now``). JSON values are whole validated documents:
they are replaced, never edited in place, and never filtered on. Every user-visible object belongs to a project.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.jobs.stored_paths import StoredDocument, StoredPath

Document = dict[str, Any]
JSONDocument = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


WAITING_SQL = "phase IN ('queued', 'recovering')"
"""phases.WAITING as literal SQL: a partial index serves only queries that repeat its condition word for word."""
DEADLINE_SQL = "deadline_at IS NOT NULL AND finished_at IS NULL"
"""Jobs that a deadline may still end, as literal SQL."""
_LINE = ("queue", "priority", "phase", "project", "api_key_id")
"""What jobs that only their age tells apart have in common."""


def _where(condition: str) -> dict[str, Any]:
    """A partial index on both databases."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


class Base(DeclarativeBase):
    """Names every constraint, so that Alembic can alter it on both databases."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own attribute
        Document: JSONDocument,
        list[Any]: JSONDocument,
        float: Float(53),
        int: BigInteger,
        str: Text(),
    }


class Job(Base):
    """One unit of supervised work and its whole truth; a queue message never carries any of it."""

    __tablename__ = "jobs"
    __table_args__ = (
        # Partial: neither the claim nor the reaper ever looks at finished jobs, however many there are.
        Index("ix_jobs_waiting", *_LINE, "queued_at", "id", **_where(WAITING_SQL)),
        Index("ix_jobs_leased", "queue", "project", "api_key_id", "lease_until", **_where("lease_until IS NOT NULL")),
        Index("ix_jobs_deadline", "deadline_at", **_where(DEADLINE_SQL)),
        Index("ix_jobs_listing", "project", "kind", "created_at", "id"),
        Index("ix_jobs_training_file", "training_file"),
        Index("ix_jobs_validation_file", "validation_file"),
        Index("ix_jobs_subject_file", "subject_file"),
        # Everything that /metrics counts: it never reads the rows themselves.
        Index("ix_jobs_counts", "kind", "phase", "trained_tokens"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    """ftjob-..., eval-... or val-..."""
    project: Mapped[str]
    api_key_id: Mapped[str | None]
    """The key that submitted it; None: the service's own key, or none was needed."""
    kind: Mapped[str]
    queue: Mapped[str]
    phase: Mapped[str]
    priority: Mapped[int] = mapped_column(default=0)
    """Higher first."""
    created_at: Mapped[float]
    queued_at: Mapped[float]
    """When it began to wait; a drained or recovering job keeps its age, and ages decide among equals."""
    woken_at: Mapped[float]
    """When its last wake-up was written to the outbox; the janitor repeats it after a silence."""
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    deadline_seconds: Mapped[float | None]
    """How long after it was queued the job must have ended."""
    deadline_at: Mapped[float | None]
    """The same as a time; None as long as it was not started."""

    attempt: Mapped[int] = mapped_column(default=0)
    """Claims so far; the first run is attempt 1."""
    crashes: Mapped[int] = mapped_column(default=0)
    """Attempts that ended without a result; drains do not count."""
    fence: Mapped[int] = mapped_column(default=0)
    """Rises with each claim and each reaping; a write with an older fence moves nothing."""
    owner: Mapped[str | None]
    """Worker that holds the lease."""
    lease_until: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)

    request: Mapped[Document]
    """The accepted request, as echoed to clients."""
    config: Mapped[Document] = mapped_column(StoredDocument)
    """The resolved RunConfig, without the paths that an attempt adds."""
    model: Mapped[str | None]
    """Public name of the base model, or of the model to evaluate."""
    root: Mapped[str | None]
    """Public, slash-free name of the base model at the root of the chain; ft: names are built from it."""
    training_file: Mapped[str | None]
    validation_file: Mapped[str | None]
    subject_file: Mapped[str | None]
    """File that a validation job checks."""
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int | None]
    fine_tuned_model: Mapped[str | None]
    run_path: Mapped[str] = mapped_column(StoredPath)
    """Absolute path of the directory that holds attempt-<n> run directories."""
    origin: Mapped[Document | None]
    """Id and trace context of the request that submitted it (``service.tracing``)."""

    progress: Mapped[Document | None]
    """Last vlm_dft.results.Progress."""
    reported_step: Mapped[int] = mapped_column(default=0)
    """Largest step that has its metrics event: a step redone after a crash is not reported twice."""
    reported_valid_step: Mapped[int] = mapped_column(default=-1)
    """The same for held-out metrics, which begin at step 0."""
    last_event_seq: Mapped[int] = mapped_column(default=0)
    """Number of events; raised in the transaction that inserts them, which keeps their seq gapless."""
    result: Mapped[Document | None]
    """vlm_dft.results.RunResult."""
    error: Mapped[Document | None]
    """vlm_dft.results.ErrorRecord."""
    trained_tokens: Mapped[int | None]


class JobMetadata(Base):
    """One pair of a job's metadata map; a table because lists filter on it."""

    __tablename__ = "job_metadata"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512), index=True)


class JobEvent(Base):
    """One event, written in the transaction of the change it tells of; seq is gapless per job and feeds SSE ids."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[Document | None]


class Attempt(Base):
    """One claim of a job, from start to end."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    fence: Mapped[int]
    worker: Mapped[str]
    device: Mapped[str]
    run_path: Mapped[str] = mapped_column(StoredPath)
    started_at: Mapped[float]
    ended_at: Mapped[float | None]
    exit_reason: Mapped[str | None] = mapped_column(Text)
    resumed_from_step: Mapped[int | None]


class Checkpoint(Base):
    """A complete checkpoint of a fine-tuning job, usable as a model by its name."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    name: Mapped[str] = mapped_column(unique=True)
    """ft:...:ckpt-step-N"""
    step: Mapped[int]
    path: Mapped[str] = mapped_column(StoredPath)
    """Absolute path of the checkpoint directory."""
    metrics: Mapped[Document]
    created_at: Mapped[float]


class Outbox(Base):
    """A wake-up still to be published; written in the transaction of the job it is for."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    queue: Mapped[str]
    created_at: Mapped[float]


class File(Base):
    """An uploaded file, or a dataset directory registered by server path."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_listing", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    sha256: Mapped[str | None]
    status: Mapped[str]
    """uploaded, processed or error, as OpenAI has it."""
    status_details: Mapped[str | None] = mapped_column(Text)
    path: Mapped[str] = mapped_column(StoredPath)
    """Absolute path of the stored bytes, or of the registered directory."""
    registered: Mapped[bool] = mapped_column(default=False)
    """Registered by server path: never deleted from disk."""
    options: Mapped[Document]
    """dataset_format, max_invalid_fraction and the like, as resolved for validation."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]
    validation_report: Mapped[Document | None]
    dataset_path: Mapped[str | None] = mapped_column(StoredPath)
    """Canonical dataset directory, once processed."""
    fingerprint: Mapped[str | None]


class Upload(Base):
    """An upload in parts."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int]
    mime_type: Mapped[str]
    status: Mapped[str]
    """pending, completed, cancelled or expired."""
    options: Mapped[Document]
    created_at: Mapped[float]
    expires_at: Mapped[float]
    file_id: Mapped[str | None]


class UploadPart(Base):
    """One stored part of an upload."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int]
    path: Mapped[str] = mapped_column(StoredPath)
    created_at: Mapped[float]


class Model(Base):
    """A fine-tuned model; base models are directories and the allow-list, and have no row."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(primary_key=True)
    """ft:{root}:{project}:{suffix}:{short job id}"""
    project: Mapped[str] = mapped_column(index=True)
    path: Mapped[str] = mapped_column(StoredPath)
    """Absolute path of the exported directory."""
    root: Mapped[str]
    """Public name of the base model at the root of the chain."""
    parent: Mapped[str]
    """Public name of the model that was tuned."""
    objective: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    sha256: Mapped[str]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]


class IdempotencyKey(Base):
    """A submit that was already answered, by Idempotency-Key or by the body's hash of a retrying client."""

    __tablename__ = "idempotency_keys"

    project: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]


class Worker(Base):
    """A live worker process and its devices."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    """host:queue:pid"""
    host: Mapped[str]
    queue: Mapped[str]
    pid: Mapped[int]
    devices: Mapped[list[Any]]
    """One document per GPU; empty: CPU."""
    versions: Mapped[Document]
    job_id: Mapped[str | None]
    started_at: Mapped[float]
    last_seen: Mapped[float]
