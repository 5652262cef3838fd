"""The audit log: who changed what, by which request. Each entry is committed with the change it tells of.

Whoever lets people change things (the API, the command line) says who acts with ``acting``, and lets ``record`` run at
the end of each write transaction. A transaction that changed nothing, or was rolled back, leaves no entry. Workers and
the janitor act for nobody: what they do is told by the jobs' events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import event, select
from sqlalchemy.orm import ORMExecuteState, Session, UOWTransaction

from service.jobs.comparison_tables import Comparison
from service.jobs.database import now
from service.jobs.ids import new_id
from service.jobs.pages import Order, Page, paginate
from service.jobs.tables import File, Job, Upload, UploadPart
from service.jobs.tenancy_tables import ApiKey, AuditEvent, Project

_NAMED: Final = (Project, ApiKey, File, Upload, UploadPart, Job)
"""What is created by requests; what else a transaction writes belongs to one of these."""
_CHANGED: Final = "audit_changed"
_CREATED: Final = "audit_created"
_DETAILS: Final = "audit_details"


@dataclass(frozen=True, kw_only=True)
class Acting:
    """Who acts, and by what; action and object may be known only when the change is made."""

    project: str
    actor: str
    api_key_id: str | None
    action: Callable[[], str]
    object_id: Callable[[], str | None]
    request_id: str | None


_acting: ContextVar[Acting | None] = ContextVar("acting", default=None)


def act(acting: Acting | None) -> None:
    """From here on, in this context: threads that it starts inherit it."""
    _acting.set(acting)


@contextmanager
def by_command(action: str, actor: str, project: str, object_id: str | None = None) -> Iterator[None]:
    """A change by the command line."""
    acting = Acting(
        project=project,
        actor=actor,
        api_key_id=None,
        action=lambda: action,
        object_id=lambda: object_id,
        request_id=None,
    )
    token = _acting.set(acting)
    try:
        yield
    finally:
        _acting.reset(token)


def note(s: Session, **details: Any) -> None:
    """Add what else the entry of this transaction should say. Never a secret."""
    s.info.setdefault(_DETAILS, {}).update(details)


def record(s: Session) -> None:
    """Write the entry of this transaction, if somebody acts and something changed."""
    acting = _acting.get()
    if acting is None:
        return
    s.flush()
    if not s.info.get(_CHANGED):
        return
    created = s.info.get(_CREATED, [])
    details = {**({"created": created} if created else {}), **s.info.get(_DETAILS, {})}
    s.add(
        AuditEvent(
            id=new_id("audit_"),
            created_at=now(s),
            project=acting.project,
            actor=acting.actor,
            api_key_id=acting.api_key_id,
            action=acting.action(),
            object_id=acting.object_id() or (created[0] if created else None),
            request_id=acting.request_id,
            details=details,
        )
    )


def list_audit(
    s: Session,
    *,
    project: str | None = None,
    action: str | None = None,
    object_id: str | None = None,
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> Page[AuditEvent]:
    """Newest first, of one project or of all. Raises InvalidRequestError when ``after`` is not in the list."""
    statement = select(AuditEvent)
    for column, value in (
        (AuditEvent.project, project),
        (AuditEvent.action, action),
        (AuditEvent.object_id, object_id),
    ):
        if value is not None:
            statement = statement.where(column == value)
    return paginate(s, statement, AuditEvent, after=after, limit=limit, order=order)


@event.listens_for(Session, "after_flush")
def _note_flush(s: Session, _: UOWTransaction) -> None:
    if _acting.get() is None:
        return
    s.info[_CHANGED] = True
    created = s.info.setdefault(_CREATED, [])
    created.extend(row.id for row in s.new if isinstance(row, _NAMED))
    created[:0] = [row.id for row in s.new if isinstance(row, Comparison)]  # before its arms' jobs


@event.listens_for(Session, "do_orm_execute")
def _note_statement(state: ORMExecuteState) -> None:
    if (state.is_update or state.is_insert or state.is_delete) and _acting.get() is not None:
        state.session.info[_CHANGED] = True
