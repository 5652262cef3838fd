"""Tables of comparisons: which jobs are arms of one comparison. Knows nothing about what is compared."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from service.jobs.tables import Base, Document


class Comparison(Base):
    """Fine-tunings of one model on one file that differ in what each arm says."""

    __tablename__ = "comparisons"
    __table_args__ = (Index("ix_comparisons_listing", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    """ftcmp-..."""
    project: Mapped[str]
    name: Mapped[str]
    created_at: Mapped[float]
    request: Mapped[Document]
    """As it was accepted."""


class ComparisonArm(Base):
    """One job of a comparison; a job is an arm of at most one."""

    __tablename__ = "comparison_arms"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    comparison_id: Mapped[str] = mapped_column(ForeignKey("comparisons.id"), index=True)
    position: Mapped[int]
    """0: the reference, unless a reader names another."""
    name: Mapped[str]
