"""Webhooks: the stock client manages endpoints and verifies what arrives; nothing is lost, nothing private reached."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest
from api_server import Api, serve
from sqlalchemy import select, update
from store_samples import CRASHED, expire_lease, new_job, trained
from webhook_receiver import Receiver, receiver

from service.jobs import store, webhooks
from service.jobs.database import Database
from service.jobs.phases import Kind, Queue
from service.jobs.webhook_delivery import PAUSES_SECONDS, pause_after, send, take_due
from service.jobs.webhook_tables import WebhookDelivery, WebhookEndpoint
from service.settings import Settings
from worker.courier import deliver_due

ALL = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Api]:
    with serve(tmp_path, database_url, webhook_private_addresses=True, webhook_timeout_seconds=2.0) as running:
        yield running


@pytest.fixture
def listener() -> Iterator[Receiver]:
    with receiver() as state:
        yield state


def cancel_a_job(database: Database, project: str = "default") -> str:
    with database.write() as s:
        job_id = store.submit(s, new_job(project)).id
        store.cancel(s, project, job_id)
    return job_id


def deliveries(database: Database) -> list[WebhookDelivery]:
    with database.read() as s:
        return list(s.scalars(select(WebhookDelivery).order_by(WebhookDelivery.created_at)))


def let_time_pass(database: Database, seconds: float) -> None:
    """Until the next attempt of every delivery."""
    with database.write() as s:
        s.execute(update(WebhookDelivery).values(next_attempt_at=WebhookDelivery.next_attempt_at - seconds))


def test_the_stock_client_verifies_what_the_end_of_a_job_sends(api: Api, listener: Receiver) -> None:
    client = api.client()
    endpoint = client.webhooks.create(name="ends", url=listener.url, event_types=ALL)
    job_id = cancel_a_job(api.database)
    assert deliver_due(api.database, api.settings) == 1
    headers, body = listener.received[0]
    event = client.webhooks.unwrap(body, headers, secret=endpoint.signing_secret)
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", job_id)
    assert event.id == headers["webhook-id"]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers, secret=endpoint.signing_secret)
    assert deliver_due(api.database, api.settings) == 0, "delivered once"


def test_every_way_to_end_writes_its_event_in_the_transaction_of_the_end(database: Database) -> None:
    with database.write() as s:
        webhooks.create_endpoint(s, "default", name="all", url="https://x.test", event_types=[*ALL, "eval.run.failed"])
        webhooks.create_endpoint(s, "other", name="other", url="https://x.test", event_types=ALL)
    ends = {}
    for name in ("succeeded", "failed", "lost"):
        with database.write() as s:
            job_id = store.submit(s, new_job()).id
            claim = store.claim(s, Queue.GPU, "w", "cpu", 60.0)
            assert claim is not None
            if name == "succeeded":
                store.succeed(s, claim, trained())
            elif name == "failed":
                store.fail(s, claim, CRASHED, None)
            else:
                expire_lease(s, job_id)
                store.reap(s, Settings(max_crashes=1))
        ends[job_id] = f"fine_tuning.job.{'failed' if name == 'lost' else name}"
    with suppress(RuntimeError), database.write() as s:
        store.cancel(s, "default", store.submit(s, new_job()).id)
        raise RuntimeError("power loss")
    with database.write() as s:
        job_id = store.submit(s, new_job(kind=Kind.EVALUATION)).id
        claim = store.claim(s, Queue.GPU, "w", "cpu", 60.0)
        assert claim is not None
        store.fail(s, claim, CRASHED, None)
        ends[job_id] = "eval.run.failed"
    found = deliveries(database)
    assert len(found) == len(ends)
    assert all(any(job_id in one.body and one.event_type == kind for one in found) for job_id, kind in ends.items())


def test_a_refused_delivery_is_repeated_with_growing_pauses_and_can_be_replayed(api: Api, listener: Receiver) -> None:
    client = api.client()
    endpoint = client.webhooks.create(name="ends", url=listener.url, event_types=ALL)
    listener.statuses = [500, 302, 200]
    cancel_a_job(api.database)
    assert deliver_due(api.database, api.settings) == 1
    assert deliver_due(api.database, api.settings) == 0, "not at once"
    for pause in (1.2 * PAUSES_SECONDS[0], 1.2 * PAUSES_SECONDS[1]):
        let_time_pass(api.database, pause)
        assert deliver_due(api.database, api.settings) == 1
    assert len({headers["webhook-id"] for headers, _ in listener.received}) == 1
    assert len(listener.received) == 3, "a redirect is not followed"
    path = f"/v1/webhook_endpoints/{endpoint.id}/deliveries"
    http = api.http()
    (shown,) = http.get(path).json()["data"]
    assert (shown["status"], shown["attempts"], shown["status_code"]) == ("delivered", 3, 200)
    replayed = http.post(f"{path}/{shown['id']}/replay").json()
    assert (replayed["status"], replayed["attempts"]) == ("pending", 0)
    deliver_due(api.database, api.settings)
    assert len(listener.received) == 4
    assert http.post(f"{path}/whd_unknown/replay").status_code == 404


def test_a_delivery_that_always_fails_ends_as_failed(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, webhook_private_addresses=True, webhook_timeout_seconds=1.0)
    with database.write() as s:
        webhooks.create_endpoint(s, "default", name="gone", url="http://127.0.0.1:1/", event_types=ALL)
    cancel_a_job(database)
    for _ in range(len(PAUSES_SECONDS) + 1):
        assert deliver_due(database, settings) == 1
        let_time_pass(database, 1e6)
    assert deliver_due(database, settings) == 0
    (delivery,) = deliveries(database)
    assert delivery.next_attempt_at is None
    assert delivery.delivered_at is None
    assert "ConnectError" in (delivery.error or "")
    pauses = [pause_after(attempt) for attempt in range(1, len(PAUSES_SECONDS) + 2)]
    assert pauses.pop() is None
    assert pauses == sorted(pauses)
    assert 2 * 86400 < sum(PAUSES_SECONDS) < 4 * 86400


def test_two_couriers_never_send_the_same_delivery_and_a_dead_one_leaves_it(database: Database) -> None:
    with database.write() as s:
        webhooks.create_endpoint(s, "default", name="one", url="https://x.test", event_types=ALL)
    cancel_a_job(database)
    with database.write() as s:
        assert len(take_due(s, b"secret", limit=8, timeout_seconds=2.0)) == 1
    with database.write() as s:
        assert not take_due(s, b"secret", limit=8, timeout_seconds=2.0)
    let_time_pass(database, 60)
    with database.write() as s:
        assert [due.attempt for due in take_due(s, b"secret", limit=8, timeout_seconds=2.0)] == [2]


def test_a_slow_endpoint_does_not_hold_up_another(api: Api, listener: Receiver) -> None:
    with receiver() as slow:
        slow.hold = threading.Event()
        client = api.client()
        for state in (slow, listener):
            client.webhooks.create(name="ends", url=state.url, event_types=ALL)
        cancel_a_job(api.database)
        thread = threading.Thread(target=deliver_due, args=(api.database, api.settings))
        thread.start()
        thread.join(0.7)
        assert thread.is_alive(), "the slow one is still being waited for"
        assert len(listener.received) == 1
        slow.hold.set()
        thread.join(10)
    assert not thread.is_alive()


def test_private_addresses_are_refused_when_asked_for_and_when_called(tmp_path: Path, listener: Receiver) -> None:
    settings = Settings(data_dir=tmp_path)
    secrets = [webhooks.signing_secret(b"s", "we_1", 1)]
    answer = send(listener.url.replace("127.0.0.1", "localhost"), "evt_1", "{}", secrets, settings)
    assert answer.status_code is None
    assert "no public address" in (answer.error or "")
    assert not listener.received


@pytest.mark.parametrize(
    "url", ["http://example.com/", "https://127.0.0.1/", "https://[::1]/x", "https://u:p@example.com/", "ftp://x", "x"]
)
def test_a_url_that_would_never_be_called_is_refused(tmp_path: Path, url: str, request: pytest.FixtureRequest) -> None:
    from service.errors import InvalidRequestError
    from service.jobs.webhook_delivery import check_url

    with pytest.raises(InvalidRequestError, match="url: "):
        check_url(url, Settings(data_dir=tmp_path))
    check_url("https://example.com/hook", Settings(data_dir=tmp_path))


def test_endpoints_are_made_shown_changed_rotated_and_removed_by_the_stock_client(api: Api, listener: Receiver) -> None:
    client = api.client(strict=True)
    made = client.webhooks.create(name="first", url=listener.url, event_types=ALL)
    assert made.signing_secret.startswith("whsec_")
    shown = client.webhooks.retrieve(made.id)
    assert made.signing_secret not in shown.model_dump_json(), "the secret is shown once"
    assert made.signing_secret.endswith(shown.signing_secret_hint[-4:])
    second = client.webhooks.create(name="second", url=listener.url, event_types=ALL[:1])
    assert [one.id for one in client.webhooks.list(limit=1)] == [second.id, made.id]
    assert client.webhooks.update(made.id, name="renamed", event_types=ALL[1:]).event_types == ALL[1:]
    assert set(client.webhooks.event_types.list().data) >= set(ALL)

    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert client.webhooks.test(made.id, event_type=ALL[0]).status_code == 200
    headers, body = listener.received[0]
    for secret in (made.signing_secret, rotated.signing_secret):
        client.webhooks.verify_signature(body, headers, secret=secret)
    again = client.webhooks.rotate_secret(made.id)
    client.webhooks.test(made.id, event_type=ALL[0])
    headers, body = listener.received[1]
    client.webhooks.verify_signature(body, headers, secret=again.signing_secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body, headers, secret=rotated.signing_secret)

    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)
    with pytest.raises(openai.BadRequestError, match=r"batch\.completed"):
        client.webhooks.create(name="x", url=listener.url, event_types=["batch.completed"])


def test_another_projects_endpoints_are_not_found(api: Api, listener: Receiver) -> None:
    mine, other = (api.client(api.key(project)) for project in ("mine", "other"))
    made = mine.webhooks.create(name="mine", url=listener.url, event_types=ALL)
    calls = [
        lambda: other.webhooks.retrieve(made.id),
        lambda: other.webhooks.delete(made.id),
        lambda: other.webhooks.update(made.id, name="x"),
        lambda: other.webhooks.rotate_secret(made.id),
        lambda: other.webhooks.test(made.id, event_type="fine_tuning.job.failed"),
        lambda: other.get(f"/webhook_endpoints/{made.id}/deliveries", cast_to=object),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    cancel_a_job(api.database, "other")
    assert not deliveries(api.database)


def test_a_project_has_a_limited_number_of_endpoints(database: Database) -> None:
    from service.errors import InvalidStateError

    with database.write() as s:
        for number in range(webhooks.MAX_ENDPOINTS):
            webhooks.create_endpoint(s, "default", name=str(number), url="https://x.test", event_types=ALL)
    with pytest.raises(InvalidStateError, match="delete one"), database.write() as s:
        webhooks.create_endpoint(s, "default", name="more", url="https://x.test", event_types=ALL)
    with database.read() as s:
        assert len(s.scalars(select(WebhookEndpoint)).all()) == webhooks.MAX_ENDPOINTS
