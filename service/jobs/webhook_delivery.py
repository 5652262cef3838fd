"""Deliver webhooks: signed as Standard Webhooks wants it, to public addresses only, repeated with growing pauses.

Covered: the checked address is the one dialled, redirects are not followed, one deadline holds for the whole exchange,
the answer's body is not read. A delivery is taken by moving its next attempt into the future, so two couriers never
send the same one at once, and one that dies with it leaves it to the next.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

import httpcore
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.errors import InvalidRequestError
from service.jobs.database import clock, now
from service.jobs.webhook_tables import WebhookDelivery, WebhookEndpoint
from service.jobs.webhooks import secrets_in_force
from service.settings import Settings
from vlm_dft.data.fetch import CheckedBackend, RefusedError, is_public

PAUSES_SECONDS: Final = (5, 30, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Between the attempts, which end after about three days."""
JITTER: Final = 0.1
"""Each pause is longer by up to this share, so that what failed together is not repeated together."""
CLAIM_SECONDS: Final = 30.0
"""Beyond the time-out: how long a courier may need for one delivery."""
_GONE = 410


@dataclass(frozen=True)
class Due:
    """One delivery that was taken to be sent."""

    delivery_id: str
    url: str
    event_id: str
    body: str
    secrets: list[str]
    attempt: int
    """1 for the first."""


@dataclass(frozen=True)
class Answer:
    """What came of one attempt."""

    status_code: int | None
    error: str | None
    """None: the endpoint took it."""


def check_url(url: str, settings: Settings) -> None:
    """Raises InvalidRequestError for a URL that would never be called."""
    allowed = ("https", "http") if settings.webhook_private_addresses else ("https",)
    try:
        parts = urlsplit(url)
        usable = parts.scheme in allowed and bool(parts.hostname) and parts.username is None and parts.port != 0
        url.encode("ascii")
    except ValueError:
        usable = False
    if not usable:
        message = f"url: {url!r} is no plain {' or '.join(allowed)} URL with a host name and without a password"
        raise InvalidRequestError(message, param="url")
    # A name is looked up when it is called; an address can be refused at once.
    with suppress(ValueError):
        address = str(ip_address(urlsplit(url).hostname or ""))
        if not settings.webhook_private_addresses and not is_public(address):
            raise InvalidRequestError(f"url: {address} is no public address", param="url", code="private_address")


def is_any_due(s: Session) -> bool:
    """Whether there is something to send now."""
    due = select(WebhookDelivery.id).where(
        WebhookDelivery.next_attempt_at.is_not(None), WebhookDelivery.next_attempt_at <= clock()
    )
    return s.scalars(due.limit(1)).first() is not None


def take_due(s: Session, secret: bytes, *, limit: int, timeout_seconds: float) -> list[Due]:
    """Take deliveries whose time has come; nobody else sends them for timeout_seconds and CLAIM_SECONDS more.

    secret: the service's own, from which the endpoints' follow.
    """
    due = (
        select(WebhookDelivery, WebhookEndpoint)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(WebhookDelivery.next_attempt_at.is_not(None), WebhookDelivery.next_attempt_at <= clock())
        .order_by(WebhookDelivery.next_attempt_at, WebhookDelivery.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=WebhookDelivery)
    )
    time_now = now(s)
    taken = []
    for delivery, endpoint in s.execute(due).all():
        delivery.attempts += 1
        delivery.next_attempt_at = time_now + timeout_seconds + CLAIM_SECONDS
        secrets = secrets_in_force(secret, endpoint, time_now)
        taken.append(Due(delivery.id, endpoint.url, delivery.event_id, delivery.body, secrets, delivery.attempts))
    s.flush()
    return taken


def sign(secret: str, event_id: str, timestamp: int, body: str) -> str:
    """One entry of the webhook-signature header."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.new(key, f"{event_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send(url: str, event_id: str, body: str, secrets: list[str], settings: Settings) -> Answer:
    """POST one event. Never raises for what the other side does."""
    timestamp = int(time.time())
    headers = {
        "content-type": "application/json",
        "user-agent": "vlm-dft-webhooks/1",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(sign(secret, event_id, timestamp, body) for secret in secrets),
    }
    allowed: Callable[[str], bool] = (lambda _: True) if settings.webhook_private_addresses else is_public
    seconds = settings.webhook_timeout_seconds
    timeout = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
    backend = CheckedBackend(allowed, time.monotonic() + seconds)
    try:
        with (
            httpcore.ConnectionPool(network_backend=backend, ssl_context=ssl.create_default_context()) as pool,
            pool.stream(
                "POST", url, headers=list(headers.items()), content=body.encode(), extensions={"timeout": timeout}
            ) as response,
        ):
            status = response.status
    except RefusedError as error:
        return Answer(None, f"the URL leads to {error}, which is no public address")
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
        return Answer(None, f"{type(error).__name__}: {error}".rstrip(": "))
    return Answer(status, None if 200 <= status < 300 else f"the endpoint answered with status {status}")


def record(s: Session, due: Due, answer: Answer) -> None:
    """Write what came of an attempt, unless the delivery was replayed or deleted meanwhile."""
    values: dict[str, object] = {"status_code": answer.status_code, "error": answer.error}
    if answer.error is None:
        values |= {"delivered_at": clock(), "next_attempt_at": None}
    else:
        pause = pause_after(due.attempt) if answer.status_code != _GONE else None
        values["next_attempt_at"] = None if pause is None else clock() + pause
    same = (WebhookDelivery.id == due.delivery_id, WebhookDelivery.attempts == due.attempt)
    s.execute(update(WebhookDelivery).where(*same).values(**values), execution_options={"synchronize_session": False})


def pause_after(attempt: int) -> float | None:
    """Seconds until the next attempt; None: that was the last."""
    if attempt > len(PAUSES_SECONDS):
        return None
    return PAUSES_SECONDS[attempt - 1] * (1 + JITTER * random.random())  # noqa: S311 - no secret
