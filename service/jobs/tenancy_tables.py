"""Tables of tenancy: projects and their limits, API keys, GPU minutes, the audit log. Knows no rule about them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Index, String
from sqlalchemy.orm import Mapped, mapped_column

from service.jobs.tables import Base, Document


class Project(Base):
    """Whom objects belong to, and how much of the service they may use; a limit of NULL is none."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    """Its name in objects, model names and logs."""
    name: Mapped[str]
    """For people."""
    created_at: Mapped[float]
    archived_at: Mapped[float | None]
    """Its keys are refused since then; nothing of it is deleted."""
    max_files: Mapped[int | None]
    max_bytes: Mapped[int | None]
    """Of its files, and of its uploads in progress."""
    max_unfinished_jobs: Mapped[int | None]
    """Fine-tunings and evaluations that have not ended, waiting ones included."""
    max_running_jobs: Mapped[int | None]
    """Of them, those that hold a worker; others wait."""
    max_gpu_minutes: Mapped[float | None]
    """In a calendar month (UTC), reservations of unfinished jobs included."""


class ApiKey(Base):
    """An API key; only its HMAC is stored."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(String(24))
    digest: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    scopes: Mapped[list[Any]]
    """Of tenancy.Scope."""
    expires_at: Mapped[float | None]
    requests_per_minute: Mapped[int | None]
    """NULL: the service's own."""
    rotated_from: Mapped[str | None]
    """The key that this one replaces."""


class GpuUsage(Base):
    """What one job costs of its project's GPU minutes; it outlives the job's own row."""

    __tablename__ = "gpu_usage"
    __table_args__ = (Index("ix_gpu_usage_month", "project", "month"),)

    job_id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    month: Mapped[str] = mapped_column(String(7))
    """2026-11: when the job was submitted, UTC."""
    reserved_minutes: Mapped[float]
    used_minutes: Mapped[float | None]
    """Once the job has ended: what its attempts took, whatever was reserved."""


class AuditEvent(Base):
    """One change that somebody made, written in the transaction that made it."""

    __tablename__ = "audit_events"
    __table_args__ = (
        Index("ix_audit_events_listing", "created_at", "id"),
        Index("ix_audit_events_project", "project", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    project: Mapped[str]
    actor: Mapped[str]
    """A key's name, or how else the caller came in."""
    api_key_id: Mapped[str | None]
    action: Mapped[str]
    """Name of the API's operation, or of the command."""
    object_id: Mapped[str | None]
    request_id: Mapped[str | None]
    details: Mapped[Document]
    """What was created, and what the operation adds."""
