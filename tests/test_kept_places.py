"""A waiting job's place is computed once for each state of the database, and never told of an older one."""

from __future__ import annotations

import pytest
from store_samples import new_job

from service.jobs import kept_places, store
from service.jobs.database import Database
from service.jobs.phases import Queue
from service.jobs.queries import get_job


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the jobs whose place was computed."""
    jobs: list[str] = []
    real = kept_places.queue_position

    def counted(s, job, **options):
        jobs.append(job.id)
        return real(s, job, **options)

    monkeypatch.setattr(kept_places, "queue_position", counted)
    return jobs


def place(database: Database, job_id: str) -> int | None:
    with database.read() as s:
        found = kept_places.place_of(s, get_job(s, "default", job_id), alive_seconds=60.0)
    return None if found is None else found.position


def submitted(database: Database) -> str:
    with database.write() as s:
        return store.submit(s, new_job()).id


def test_polls_between_changes_cost_one_computation(
    database: Database, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_places, "KEPT_SECONDS", 3600.0)
    first, second = submitted(database), submitted(database)
    assert [place(database, second) for _ in range(5)] == [2] * 5
    assert [place(database, first) for _ in range(5)] == [1] * 5
    assert computed == [second, first]


@pytest.mark.parametrize("same_process", [True, False])
def test_any_commit_is_seen_at_once(
    database: Database, computed: list[str], monkeypatch: pytest.MonkeyPatch, same_process: bool
) -> None:
    """By this connection, or by another process's."""
    monkeypatch.setattr(kept_places, "KEPT_SECONDS", 3600.0)
    first, second = submitted(database), submitted(database)
    assert place(database, second) == 2
    other = database if same_process else Database(database.url)
    with other.write() as s:
        assert store.claim(s, Queue.GPU, "w", "cpu", 60.0) is not None
    assert place(database, second) == 1
    assert place(database, first) is None
    with other.write() as s:
        store.cancel(s, "default", second)
    assert place(database, second) is None
    third = submitted(other)
    assert place(database, third) == 1
    if other is not database:
        other.close()


def test_a_transaction_that_writes_sees_its_own_change(database: Database, computed: list[str]) -> None:
    first, second = submitted(database), submitted(database)
    assert place(database, second) == 2
    with database.write() as s:
        store.cancel(s, "default", first)
        found = kept_places.place_of(s, get_job(s, "default", second), alive_seconds=60.0)
        assert found is not None
        assert found.position == 1


def test_what_depends_on_the_clock_is_looked_at_again(
    database: Database, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submitted(database)
    monkeypatch.setattr(kept_places, "KEPT_SECONDS", -1.0)
    assert [place(database, job) for _ in range(3)] == [1] * 3
    assert computed == [job] * 3
