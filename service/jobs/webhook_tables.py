"""The tables of webhooks: who wants to be told of what, and the outbox of what is to be told.

A delivery is written in the transaction of the change that it tells of, so none is lost and none is invented.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from service.jobs.tables import Base


class WebhookEndpoint(Base):
    """A URL of a project that wants to hear of some events. Its secret is derived, never stored: ``webhooks``."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("ix_webhook_endpoints_listing", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    """we_..."""
    project: Mapped[str]
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[Any]]
    secret_version: Mapped[int] = mapped_column(default=1)
    """Rises with each rotation; the secret follows from it."""
    previous_secret_until: Mapped[float | None]
    """Until when deliveries are signed with the secret before as well."""
    created_at: Mapped[float]
    updated_at: Mapped[float]


class WebhookDelivery(Base):
    """One event for one endpoint: what to send, when to try next, and what came of it."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_listing", "endpoint_id", "created_at", "id"),
        # Partial: the courier never looks at what is done, however much that is.
        Index(
            "ix_webhook_deliveries_due",
            "next_attempt_at",
            sqlite_where=text("next_attempt_at IS NOT NULL"),
            postgresql_where=text("next_attempt_at IS NOT NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    """whd_..."""
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    event_id: Mapped[str]
    """evt_...: the webhook-id header, the same for every endpoint and every repetition."""
    event_type: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    """Exactly the bytes that are signed and sent."""
    created_at: Mapped[float]
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[float | None]
    """NULL: nothing more is tried. While it is being sent: when somebody else may send it instead."""
    delivered_at: Mapped[float | None]
    status_code: Mapped[int | None]
    """Of the last answer."""
    error: Mapped[str | None] = mapped_column(Text)
    """Why the last attempt failed."""
