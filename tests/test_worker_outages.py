"""The database or the broker goes away: trainers go on, nothing is lost, and nobody dies of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import func, make_url, select
from throwaway import free_port, wait_until
from worker_stack import Stack, new_database, running_stack, step_settings

from service.jobs import queue, store
from service.jobs.phases import Phase, Queue
from service.jobs.tables import Outbox
from worker.janitor import Janitor
from worker.record import Outcome
from worker.supervise import Attempt, StopFlag

pytestmark = pytest.mark.chaos


class Outage:
    """A PostgreSQL database that refuses everybody: open connections are ended, new ones are not accepted."""

    def __init__(self, connection: psycopg.Connection, name: str) -> None:
        self._connection = connection
        self._name = name

    def begin(self) -> None:
        self._accept(False)
        end_all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
        self._connection.execute(end_all, [self._name])

    def end(self) -> None:
        self._accept(True)

    def _accept(self, yes: bool) -> None:
        statement = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
        self._connection.execute(statement.format(sql.Identifier(self._name), sql.Literal(yes)))


@pytest.fixture
def stack(tmp_path: Path, postgres_url: str) -> Iterator[Stack]:
    with running_stack(step_settings(tmp_path, database_url=new_database(postgres_url))) as running:
        yield running


@pytest.fixture
def outage(stack: Stack, postgres_url: str) -> Iterator[Outage]:
    name = make_url(stack.settings.resolved_database_url).database
    assert name is not None
    server = make_url(postgres_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(server, autocommit=True) as connection:
        yield Outage(connection, name)


def supervise(stack: Stack, *steps) -> Outcome:
    """Run the waiting job here; the steps, one after the other, in a thread of their own."""
    with stack.database.write() as session:
        claim = store.claim(session, Queue.GPU, "test", "cpu", stack.settings.lease_seconds)
    assert claim is not None
    observer = threading.Thread(target=lambda: [step() for step in steps])
    observer.start()
    outcome = Attempt(stack.database, stack.settings, claim, num_gpus=0, stop=StopFlag()).run()
    observer.join()
    return outcome


def last_step(stack: Stack, job_id: str) -> int:
    return stack.journal(job_id)[-1]["step"]


def test_trainer_does_not_notice_a_short_outage(stack: Stack, outage: Outage) -> None:
    job_id = stack.submit(steps=20)
    outcome = supervise(
        stack,
        lambda: stack.wait_for_step(job_id, 3),
        outage.begin,
        lambda: stack.wait_for_step(job_id, last_step(stack, job_id) + 7),
        outage.end,
    )
    assert outcome == Outcome.SUCCEEDED
    assert stack.job(job_id).attempt == 1
    steps = [event.data["step"] for event in stack.events(job_id) if event.type == "metrics" and event.data]
    assert steps == list(range(1, 21)), "what could not be told at the time is told afterwards"


def test_end_of_a_job_is_recorded_however_long_the_database_is_away(stack: Stack, outage: Outage) -> None:
    job_id = stack.submit(steps=5)
    lease = threading.Event()
    outcome = supervise(
        stack,
        lambda: stack.wait_for_step(job_id, 3),
        outage.begin,
        lambda: wait_until(lambda: stack.journal(job_id)[-1]["what"] == "end", 10, "the trainer ends"),
        lambda: lease.wait(stack.settings.lease_seconds + 0.5),
        outage.end,
    )
    assert outcome == Outcome.SUCCEEDED


def test_outage_longer_than_the_lease_gives_the_job_back_and_is_no_crash(stack: Stack, outage: Outage) -> None:
    job_id = stack.submit(steps=1000)
    lease = threading.Event()
    outcome = supervise(
        stack,
        lambda: stack.wait_for_step(job_id, 3),
        outage.begin,
        lambda: lease.wait(stack.settings.lease_seconds + 0.5),
        outage.end,
    )
    assert outcome == Outcome.RELEASED
    job = stack.job(job_id)
    assert (job.phase, job.crashes) == (Phase.QUEUED, 0)


def test_janitor_sweeps_on_through_an_outage_of_both(stack: Stack, outage: Outage) -> None:
    settings = stack.settings.model_copy(update={"broker_url": f"redis://127.0.0.1:{free_port()}/0"})
    broken = queue.create_celery(settings)
    janitor = Janitor(stack.database, settings, broken)
    stack.celery = broken
    stack.submit()
    outage.begin()
    janitor.sweep()
    outage.end()
    janitor.sweep()
    with stack.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Outbox)) == 1, "the wake-up is kept"
    Janitor(stack.database, stack.settings, queue.create_celery(stack.settings)).sweep()
    with stack.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Outbox)) == 0


def test_two_janitors_at_once_take_a_lease_away_once(stack: Stack) -> None:
    job_id = stack.submit()
    with stack.database.write() as session:
        assert store.claim(session, Queue.GPU, "gone", "cpu", 0.0) is not None
    celery = queue.create_celery(stack.settings)
    sweeps = [threading.Thread(target=Janitor(stack.database, stack.settings, celery).sweep) for _ in range(4)]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join()
    job = stack.job(job_id)
    assert (job.phase, job.crashes, job.fence) == (Phase.RECOVERING, 1, 2)
    assert sum("was lost" in event.message for event in stack.events(job_id)) == 1
