"""/v1/webhook_endpoints and /v1/webhook_event_types as OpenAI has them; deliveries and their replay are ours."""

from __future__ import annotations

import time
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends

from service.api.dependencies import After, DatabaseNow, Limit, Project, SettingsNow
from service.api.schemas import ListPage
from service.api.webhooks.schemas import (
    CreateWebhookEndpoint,
    RotateSecret,
    TestWebhookEndpoint,
    UpdateWebhookEndpoint,
    WebhookDeliveryObject,
    WebhookEndpointDeleted,
    WebhookEndpointObject,
    WebhookEndpointWithSecret,
    WebhookEventTypes,
    WebhookTestResult,
    show_delivery,
    show_endpoint,
    show_with_secret,
)
from service.errors import InvalidRequestError
from service.jobs import keys, webhooks
from service.jobs.ids import new_id
from service.jobs.webhook_delivery import check_url, send

router = APIRouter(prefix="/v1", tags=["webhooks"])
_ENDPOINT = "/webhook_endpoints/{webhook_endpoint_id}"


async def _secret_of(settings: SettingsNow) -> bytes:
    return await anyio.to_thread.run_sync(keys.load_secret, settings)


Secret = Annotated[bytes, Depends(_secret_of)]


@router.get("/webhook_event_types")
def list_webhook_event_types() -> WebhookEventTypes:
    """Every event that is ever sent."""
    return WebhookEventTypes(data=sorted(webhooks.EVENT_TYPES.values()))


@router.post("/webhook_endpoints")
def create_webhook_endpoint(
    body: CreateWebhookEndpoint, project: Project, database: DatabaseNow, settings: SettingsNow, secret: Secret
) -> WebhookEndpointWithSecret:
    """Tell a URL of the ends of this project's jobs. The signing secret is shown here and never again."""
    webhooks.check_types(body.event_types)
    check_url(body.url, settings)
    with database.write() as s:
        types = list(dict.fromkeys(body.event_types))
        endpoint = webhooks.create_endpoint(s, project, name=body.name, url=body.url, event_types=types)
        return show_with_secret(endpoint, secret)


@router.get("/webhook_endpoints")
def list_webhook_endpoints(
    project: Project, database: DatabaseNow, secret: Secret, after: After = None, limit: Limit = 20
) -> ListPage[WebhookEndpointObject]:
    """Newest first."""
    with database.read() as s:
        page = webhooks.list_endpoints(s, project, after=after, limit=limit)
        return ListPage.of([show_endpoint(endpoint, secret) for endpoint in page.rows], page.has_more)


@router.get(_ENDPOINT)
def retrieve_webhook_endpoint(
    webhook_endpoint_id: str, project: Project, database: DatabaseNow, secret: Secret
) -> WebhookEndpointObject:
    """One endpoint."""
    with database.read() as s:
        return show_endpoint(webhooks.get_endpoint(s, project, webhook_endpoint_id), secret)


@router.post(_ENDPOINT)
def update_webhook_endpoint(
    webhook_endpoint_id: str,
    body: UpdateWebhookEndpoint,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    secret: Secret,
) -> WebhookEndpointObject:
    """Change what is given; deliveries that wait go to the new URL."""
    if body.event_types is not None:
        webhooks.check_types(body.event_types)
    if body.url is not None:
        check_url(body.url, settings)
    with database.write() as s:
        given = body.model_dump(exclude_none=True)
        return show_endpoint(webhooks.update_endpoint(s, project, webhook_endpoint_id, **given), secret)


@router.delete(_ENDPOINT)
def delete_webhook_endpoint(
    webhook_endpoint_id: str, project: Project, database: DatabaseNow
) -> WebhookEndpointDeleted:
    """Remove the endpoint; what waits for it is never sent."""
    with database.write() as s:
        webhooks.delete_endpoint(s, project, webhook_endpoint_id)
    return WebhookEndpointDeleted(id=webhook_endpoint_id)


@router.post(f"{_ENDPOINT}/rotate_secret")
def rotate_webhook_secret(
    webhook_endpoint_id: str, body: RotateSecret, project: Project, database: DatabaseNow, secret: Secret
) -> WebhookEndpointWithSecret:
    """A new signing secret, shown once; the old one ends now, or signs beside it for 24 hours."""
    with database.write() as s:
        keep_old = body.keep_old_secret_active_for_24_hours
        return show_with_secret(webhooks.rotate_secret(s, project, webhook_endpoint_id, keep_old=keep_old), secret)


@router.post(f"{_ENDPOINT}/test")
def test_webhook_endpoint(
    webhook_endpoint_id: str,
    body: TestWebhookEndpoint,
    project: Project,
    database: DatabaseNow,
    settings: SettingsNow,
    secret: Secret,
) -> WebhookTestResult:
    """Send a sample event now, once; answers with the endpoint's own status."""
    webhooks.check_types([body.event_type])
    with database.read() as s:
        endpoint = webhooks.get_endpoint(s, project, webhook_endpoint_id)
        signing = webhooks.secrets_in_force(secret, endpoint, time.time())
    event_id = new_id("evt_")
    sample = webhooks.event_body(event_id, body.event_type, new_id("sample-"), time.time())
    answer = send(endpoint.url, event_id, sample, signing, settings)
    if answer.status_code is None:
        message = f"{endpoint.url} could not be reached: {answer.error}"
        raise InvalidRequestError(message, param="webhook_endpoint_id", code="webhook_endpoint_unreachable")
    return WebhookTestResult(
        webhook_endpoint_id=endpoint.id, event_type=body.event_type, status_code=answer.status_code
    )


@router.get(f"{_ENDPOINT}/deliveries")
def list_webhook_deliveries(
    webhook_endpoint_id: str, project: Project, database: DatabaseNow, after: After = None, limit: Limit = 20
) -> ListPage[WebhookDeliveryObject]:
    """What was and will be sent, newest first."""
    with database.read() as s:
        endpoint = webhooks.get_endpoint(s, project, webhook_endpoint_id)
        page = webhooks.list_deliveries(s, endpoint.id, after=after, limit=limit)
        return ListPage.of([show_delivery(delivery) for delivery in page.rows], page.has_more)


@router.post(f"{_ENDPOINT}/deliveries/{{delivery_id}}/replay")
def replay_webhook_delivery(
    webhook_endpoint_id: str, delivery_id: str, project: Project, database: DatabaseNow
) -> WebhookDeliveryObject:
    """Send it again, whatever came of it; the janitor does so within seconds."""
    with database.write() as s:
        return show_delivery(webhooks.replay(s, project, webhook_endpoint_id, delivery_id))
