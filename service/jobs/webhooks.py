"""Webhooks: which URL wants to hear of what, and the outbox of deliveries. Sends nothing (``webhook_delivery``).

``announce`` runs in the transaction that ends a job. The signing secret of an endpoint is an HMAC of its id and version
under the service's own secret: the database alone gives nobody the means to sign.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Final

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from service.errors import InvalidRequestError, InvalidStateError, NotFoundError
from service.jobs.database import clock, now, serialize
from service.jobs.ids import new_id
from service.jobs.pages import Page, paginate
from service.jobs.phases import Kind, Phase
from service.jobs.tables import Job
from service.jobs.webhook_tables import WebhookDelivery, WebhookEndpoint

EVENT_TYPES: Final = {
    (Kind.FINE_TUNING, Phase.SUCCEEDED): "fine_tuning.job.succeeded",
    (Kind.FINE_TUNING, Phase.FAILED): "fine_tuning.job.failed",
    (Kind.FINE_TUNING, Phase.CANCELLED): "fine_tuning.job.cancelled",
    # OpenAI spells these with one l.
    (Kind.EVALUATION, Phase.SUCCEEDED): "eval.run.succeeded",
    (Kind.EVALUATION, Phase.FAILED): "eval.run.failed",
    (Kind.EVALUATION, Phase.CANCELLED): "eval.run.canceled",
}
MAX_ENDPOINTS: Final = 16
"""Of a project: every end of a job writes one row for each."""
OLD_SECRET_SECONDS: Final = 24 * 3600.0
KEEP_DELIVERY_SECONDS: Final = 30 * 24 * 3600.0


def announce(s: Session, job: Job, after: Phase) -> None:
    """Write a delivery for each of the project's endpoints that wants to hear of this end."""
    event_type = EVENT_TYPES.get((Kind(job.kind), after))
    if event_type is None:
        return
    # Locked against a deletion at this moment: the end of a job must not fail for a listener that goes away.
    mine = select(WebhookEndpoint).where(WebhookEndpoint.project == job.project).order_by(WebhookEndpoint.id)
    endpoints = s.scalars(mine.with_for_update(read=True, key_share=True)).all()
    event_id = new_id("evt_")
    for endpoint in endpoints:
        if event_type in endpoint.event_types:
            _add_delivery(s, endpoint, event_id, event_type, job.id)


def event_body(event_id: str, event_type: str, object_id: str, created_at: float) -> str:
    """The event as the stock client parses it."""
    event = {"id": event_id, "object": "event", "created_at": int(created_at), "type": event_type}
    return json.dumps({**event, "data": {"id": object_id}}, separators=(",", ":"))


def _add_delivery(s: Session, endpoint: WebhookEndpoint, event_id: str, event_type: str, object_id: str) -> None:
    time = now(s)
    s.add(
        WebhookDelivery(
            id=new_id("whd_"),
            endpoint_id=endpoint.id,
            event_id=event_id,
            event_type=event_type,
            body=event_body(event_id, event_type, object_id, time),
            created_at=time,
            next_attempt_at=time,
        )
    )
    s.flush()


def signing_secret(secret: bytes, endpoint_id: str, version: int) -> str:
    """whsec_..., which the client is given once; secret: the service's own (``keys.load_secret``)."""
    digest = hmac.new(secret, f"webhook:{endpoint_id}:{version}".encode(), hashlib.sha256).digest()
    return f"whsec_{base64.b64encode(digest).decode()}"


def secrets_in_force(secret: bytes, endpoint: WebhookEndpoint, time: float) -> list[str]:
    """The endpoint's secret, and the one before while it was asked to stay in force."""
    secrets = [signing_secret(secret, endpoint.id, endpoint.secret_version)]
    if endpoint.previous_secret_until is not None and time < endpoint.previous_secret_until:
        secrets.append(signing_secret(secret, endpoint.id, endpoint.secret_version - 1))
    return secrets


def create_endpoint(s: Session, project: str, *, name: str, url: str, event_types: Sequence[str]) -> WebhookEndpoint:
    """Insert an endpoint. Raises InvalidStateError when the project has MAX_ENDPOINTS already."""
    serialize(s, f"{project} webhook endpoints")
    mine = select(func.count()).select_from(WebhookEndpoint).where(WebhookEndpoint.project == project)
    if s.scalars(mine).one() >= MAX_ENDPOINTS:
        raise InvalidStateError(
            f"this project has {MAX_ENDPOINTS} webhook endpoints, the most there may be: delete one"
        )
    time = now(s)
    endpoint = WebhookEndpoint(
        id=new_id("we_"),
        project=project,
        name=name,
        url=url,
        event_types=list(event_types),
        secret_version=1,
        created_at=time,
        updated_at=time,
    )
    s.add(endpoint)
    s.flush()
    return endpoint


def get_endpoint(s: Session, project: str, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint:
    """Raises NotFoundError."""
    statement = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id, WebhookEndpoint.project == project)
    endpoint = s.scalars(statement.with_for_update() if lock else statement).one_or_none()
    if endpoint is None:
        message = f"there is no webhook endpoint {endpoint_id!r}"
        raise NotFoundError(message, param="webhook_endpoint_id", code="webhook_endpoint_not_found")
    return endpoint


def list_endpoints(s: Session, project: str, *, after: str | None, limit: int) -> Page[WebhookEndpoint]:
    """Newest first."""
    statement = select(WebhookEndpoint).where(WebhookEndpoint.project == project)
    return paginate(s, statement, WebhookEndpoint, after=after, limit=limit)


def update_endpoint(
    s: Session,
    project: str,
    endpoint_id: str,
    *,
    name: str | None = None,
    url: str | None = None,
    event_types: Sequence[str] | None = None,
) -> WebhookEndpoint:
    """Change what is given."""
    endpoint = get_endpoint(s, project, endpoint_id, lock=True)
    types = None if event_types is None else list(event_types)
    given = {"name": name, "url": url, "event_types": types}
    changed = {key: new for key, new in given.items() if new is not None and new != getattr(endpoint, key)}
    for key, new in changed.items():
        setattr(endpoint, key, new)
    if changed:
        endpoint.updated_at = now(s)
    s.flush()
    return endpoint


def rotate_secret(s: Session, project: str, endpoint_id: str, *, keep_old: bool) -> WebhookEndpoint:
    """Take the next secret; keep_old: the one before signs too for OLD_SECRET_SECONDS."""
    endpoint = get_endpoint(s, project, endpoint_id, lock=True)
    time = now(s)
    endpoint.secret_version += 1
    endpoint.previous_secret_until = time + OLD_SECRET_SECONDS if keep_old else None
    endpoint.updated_at = time
    s.flush()
    return endpoint


def delete_endpoint(s: Session, project: str, endpoint_id: str) -> None:
    """Remove the endpoint and its deliveries, sent or not."""
    endpoint = get_endpoint(s, project, endpoint_id, lock=True)
    s.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id))
    s.delete(endpoint)
    s.flush()


def list_deliveries(s: Session, endpoint_id: str, *, after: str | None, limit: int) -> Page[WebhookDelivery]:
    """Newest first."""
    statement = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    return paginate(s, statement, WebhookDelivery, after=after, limit=limit)


def replay(s: Session, project: str, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
    """Send a delivery again from its first attempt on, whatever came of it; its event keeps its id.

    Raises NotFoundError.
    """
    endpoint = get_endpoint(s, project, endpoint_id, lock=True)
    statement = select(WebhookDelivery).where(
        WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint.id
    )
    delivery = s.scalars(statement.with_for_update()).one_or_none()
    if delivery is None:
        message = f"{endpoint_id} has no delivery {delivery_id!r}"
        raise NotFoundError(message, param="delivery_id", code="webhook_delivery_not_found")
    delivery.attempts, delivery.next_attempt_at, delivery.delivered_at = 0, now(s), None
    delivery.status_code, delivery.error = None, None
    s.flush()
    return delivery


def check_types(event_types: Sequence[str]) -> None:
    """Raises InvalidRequestError for one that is never sent here."""
    known = set(EVENT_TYPES.values())
    for event_type in event_types:
        if event_type not in known:
            message = f"event_types: {event_type!r} is never sent by this service; it sends {', '.join(sorted(known))}"
            raise InvalidRequestError(message, param="event_types")


def forget_old_deliveries(s: Session) -> int:
    """Delete deliveries on which nothing more is tried, some weeks old; returns their number."""
    over = or_(WebhookDelivery.next_attempt_at.is_(None), WebhookDelivery.delivered_at.is_not(None))
    statement = delete(WebhookDelivery).where(WebhookDelivery.created_at < clock() - KEEP_DELIVERY_SECONDS, over)
    return len(s.scalars(statement.returning(WebhookDelivery.id)).all())
