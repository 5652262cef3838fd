"""What webhook requests and answers look like; OpenAI's shapes, and ours for deliveries."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from service.api.schemas import Name, RequestModel, ResponseModel
from service.jobs.webhook_tables import WebhookDelivery, WebhookEndpoint
from service.jobs.webhooks import signing_secret

Url = Annotated[Name, Field(max_length=2048)]
EventTypes = Annotated[list[Name], Field(min_length=1, max_length=32)]


class CreateWebhookEndpoint(RequestModel):
    """Who is to be told of what."""

    name: Name
    """For people."""
    url: Url
    """https, on a public address."""
    event_types: EventTypes
    """As GET /v1/webhook_event_types lists them."""


class UpdateWebhookEndpoint(RequestModel):
    """What is to change."""

    name: Name | None = None
    """For people."""
    url: Url | None = None
    """As in CreateWebhookEndpoint."""
    event_types: EventTypes | None = None
    """The whole new list."""


class RotateSecret(RequestModel):
    """How the old secret ends."""

    keep_old_secret_active_for_24_hours: bool = False
    """Sign with both meanwhile; false: the old one ends now."""


class TestWebhookEndpoint(RequestModel):
    """What to send as a sample."""

    __test__ = False  # pytest collects by name

    event_type: Name
    """One that GET /v1/webhook_event_types lists."""


class WebhookEndpointObject(ResponseModel):
    """An endpoint, without its secret."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    """The end of the secret."""


class WebhookEndpointWithSecret(WebhookEndpointObject):
    """An endpoint and its secret: the only answer that holds it."""

    signing_secret: str


class WebhookEndpointDeleted(ResponseModel):
    """An endpoint that is gone, and its deliveries with it."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class WebhookTestResult(ResponseModel):
    """The endpoint answered, whatever it said."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class WebhookEventTypes(ResponseModel):
    """What can be listened to."""

    object: Literal["list"] = "list"
    data: list[str]


class WebhookDeliveryObject(ResponseModel):
    """One event for one endpoint."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    event_id: str
    """The webhook-id header, the same in every repetition: what is seen twice is one event."""
    event_type: str
    created_at: int
    status: Literal["pending", "delivered", "failed"]
    """failed: nothing more is tried; replay it."""
    attempts: int
    next_attempt_at: int | None
    delivered_at: int | None
    status_code: int | None
    """Of the last answer."""
    error: str | None


def show_endpoint(endpoint: WebhookEndpoint, secret: bytes) -> WebhookEndpointObject:
    """secret: the service's own, from which the endpoint's follows."""
    return WebhookEndpointObject(**_fields(endpoint, signing_secret(secret, endpoint.id, endpoint.secret_version)))


def show_with_secret(endpoint: WebhookEndpoint, secret: bytes) -> WebhookEndpointWithSecret:
    signing = signing_secret(secret, endpoint.id, endpoint.secret_version)
    return WebhookEndpointWithSecret(**_fields(endpoint, signing), signing_secret=signing)


def _fields(endpoint: WebhookEndpoint, signing: str) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "created_at": int(endpoint.created_at),
        "updated_at": int(endpoint.updated_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": f"whsec_...{signing[-4:]}",
    }


def show_delivery(delivery: WebhookDelivery) -> WebhookDeliveryObject:
    ended = "delivered" if delivery.delivered_at is not None else "failed"
    due, delivered = delivery.next_attempt_at, delivery.delivered_at
    return WebhookDeliveryObject(
        id=delivery.id,
        event_id=delivery.event_id,
        event_type=delivery.event_type,
        created_at=int(delivery.created_at),
        status="pending" if due is not None else ended,
        attempts=delivery.attempts,
        next_attempt_at=None if due is None else int(due),
        delivered_at=None if delivered is None else int(delivered),
        status_code=delivery.status_code,
        error=delivery.error,
    )
