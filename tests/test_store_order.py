"""Which job is claimed next, what a waiting job is told about it, and wake-ups that got lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from databases import copied_sqlite
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select, update
from sqlalchemy.event import listen
from store_samples import CRASHED, new_file, new_job

from service.jobs import order, store
from service.jobs.caps import Caps
from service.jobs.database import Database, now
from service.jobs.phases import Kind, Queue
from service.jobs.tables import Job, Outbox, Worker
from service.settings import Settings

SETTINGS = Settings(lease_seconds=60, republish_seconds=60)


def submit(database: Database, **fields) -> str:
    with database.write() as s:
        return store.submit(s, new_job(**fields)).id


def claim(database: Database, worker: str = "w1") -> store.Claim | None:
    with database.write() as s:
        return store.claim(s, Queue.GPU, worker, "cpu", 60)


def position(database: Database, job_id: str) -> store.QueuePosition | None:
    with database.read() as s:
        return store.queue_position(s, s.get_one(Job, job_id))


def register(database: Database, worker_id: str, queue: Queue = Queue.GPU) -> None:
    with database.write() as s:
        store.register_worker(s, worker_id, host="h", queue=queue, pid=1, devices=[], versions={})


def outbox(database: Database) -> list[str]:
    with database.read() as s:
        return list(s.scalars(select(Outbox.queue).order_by(Outbox.id)))


def empty_outbox(database: Database) -> None:
    with database.write() as s:
        s.execute(delete(Outbox))


def test_claims_follow_priority_then_recovery_then_fairness_then_age(database: Database) -> None:
    running = submit(database, project="busy")
    assert claim(database) is not None
    lost = submit(database, project="busy")
    taken = claim(database)
    assert taken is not None
    assert taken.job_id == lost
    with database.write() as s:
        store.crash(s, taken, "exit code 1", CRASHED, max_crashes=3)
    busy_old = submit(database, project="busy")
    idle_old = submit(database, project="idle")
    idle_new = submit(database, project="idle")
    urgent = submit(database, project="busy", priority=1)
    expected = [urgent, lost, idle_old, idle_new, busy_old]
    with database.write() as s:  # a worker for each job, so that nothing ends in between
        order = []
        for _ in expected:
            next_claim = store.claim(s, Queue.GPU, "w", "cpu", 60)
            assert next_claim is not None
            order.append(next_claim.job_id)
    assert order == expected
    assert claim(database) is None
    assert running not in order


def test_the_first_in_position_is_the_next_claimed_until_none_waits(database: Database) -> None:
    ids = [
        submit(database, project=project, priority=priority)
        for project, priority in [("a", 0), ("b", 0), ("a", 0), ("c", 2), ("b", 2), ("a", 1), ("c", 0), ("a", 0)]
    ]
    waiting = set(ids)
    while waiting:
        places = {job_id: position(database, job_id) for job_id in waiting}
        assert sorted(place.position for place in places.values() if place) == list(range(1, len(waiting) + 1))
        assert all(place.ahead == place.position - 1 for place in places.values() if place)
        taken = claim(database)
        assert taken is not None
        assert places[taken.job_id].position == 1
        assert position(database, taken.job_id) is None
        waiting.remove(taken.job_id)


def test_keys_of_a_project_share_its_workers(database: Database) -> None:
    busy = [submit(database, api_key_id="busy") for _ in range(3)]
    other = submit(database, api_key_id="other")
    own = submit(database)
    order = []
    while (taken := claim(database)) is not None:
        order.append(taken.job_id)
    assert order == [busy[0], other, own, busy[1], busy[2]]


def test_caps_hold_jobs_back_and_say_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    caps = {"a": Caps(project_jobs=2), "b": Caps(key_jobs=1)}
    monkeypatch.setattr(order, "caps_of", lambda _, project: caps[project])
    a = [submit(database, project="a") for _ in range(3)]
    b = [submit(database, project="b", api_key_id=key) for key in ("k1", "k1", "k2")]
    register(database, "w1")
    told = {job_id: position(database, job_id) for job_id in (*a, *b)}
    assert [told[job_id].position for job_id in (*a, *b)] == [1, 3, None, 2, None, 4]
    assert [told[job_id].blocked_reason for job_id in (a[2], b[1])] == ["project_cap", "key_cap"]
    claims = [claim(database) for _ in range(5)]
    assert [taken.job_id if taken else None for taken in claims] == [a[0], b[0], a[1], b[2], None]
    first = claims[0]
    assert first is not None
    with database.write() as s:
        assert store.cancelled(s, first)
    assert position(database, a[2]).position == 1
    assert position(database, b[1]).blocked_reason == "key_cap"


JOBS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from([None, "k1", "k2"]),
        st.integers(0, 1),
        st.sampled_from(["queued", "queued", "recovering", "running"]),
        st.integers(0, 3),
    ),
    max_size=14,
)
"""Project, key, priority, phase, age of jobs."""
CAPS = st.builds(Caps, st.none() | st.integers(1, 4), st.none() | st.integers(1, 3))


@pytest.fixture(scope="module")
def rows_only(_sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """One database for every example; each takes back what it wrote."""
    opened = Database(copied_sqlite(_sqlite_template, tmp_path_factory.mktemp("order") / "order.db"))
    yield opened
    opened.close()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(jobs=JOBS, caps=st.fixed_dictionaries(dict.fromkeys("abc", CAPS)))
def test_places_are_those_of_the_rule_played_out_claim_by_claim(rows_only: Database, jobs, caps) -> None:
    """The places are counted from sizes; here the rule is written out, one claim after the other."""
    with pytest.MonkeyPatch.context() as patch, rows_only.write() as s:
        patch.setattr(order, "caps_of", lambda _, project: caps[project])
        rows = []
        for project, key, priority, phase, age in jobs:
            row = store.submit(s, new_job(project, api_key_id=key, priority=priority))
            row.phase, row.queued_at, row.lease_until = phase, age, 9e12 if phase == "running" else None
            rows.append(row)
        s.flush()
        claim_order = store.ClaimOrder(s, Queue.GPU)
        told = {row.id: claim_order.ahead_of(row) for row in rows if row.phase != "running"}
        expected = played_out(
            [row for row in rows if row.phase == "running"], [row for row in rows if row.id in told], caps
        )
        assert {job_id: n for job_id, n in told.items() if isinstance(n, int)} == {j: n for n, j in enumerate(expected)}
        assert claim_order.first() == (expected[0] if expected else None)
        s.rollback()


def played_out(running: list[Job], waiting: list[Job], caps: dict[str, Caps]) -> list[str]:
    """Ids in the order of claims: the rule, not the counting."""
    by_project = Counter(job.project for job in running)
    by_key = Counter((job.project, job.api_key_id) for job in running)
    taken: list[str] = []
    while True:
        free = [
            job
            for job in waiting
            if job.id not in taken
            and by_project[job.project] < (caps[job.project].project_jobs or 99)
            and by_key[job.project, job.api_key_id] < (caps[job.project].key_jobs or 99)
        ]
        if not free:
            return taken
        best = max((job.priority, job.phase == "recovering") for job in free)
        free = [job for job in free if (job.priority, job.phase == "recovering") == best]
        heads = [
            min(
                (job for job in free if job.project == project),
                key=lambda job: (by_key[job.project, job.api_key_id], job.queued_at, job.id),
            )
            for project in {job.project for job in free}
        ]
        chosen = min(heads, key=lambda job: (by_project[job.project], job.queued_at, job.id))
        by_project[chosen.project] += 1
        by_key[chosen.project, chosen.api_key_id] += 1
        taken.append(chosen.id)


def test_a_position_says_what_the_job_waits_for(database: Database) -> None:
    first, second = submit(database), submit(database)
    assert position(database, first).blocked_reason == "no_worker_alive"
    register(database, "w-cpu", Queue.CPU)
    assert position(database, first).blocked_reason == "no_worker_alive"
    register(database, "w1")
    assert position(database, first).blocked_reason is None
    assert position(database, second).blocked_reason == "waiting_for_gpu"
    assert claim(database, "w1") is not None
    assert position(database, second) == store.QueuePosition(1, 0, "waiting_for_gpu")
    with database.write() as s:
        s.execute(update(Job).where(Job.id == first).values(progress={"seconds_remaining": 600.0}))
        time = now(s)
    assert position(database, second).estimated_start == pytest.approx(time + 600, abs=30)
    with database.write() as s:
        s.execute(update(Worker).where(Worker.id == "w1").values(last_seen=Worker.last_seen - 120))
    assert position(database, second).blocked_reason == "no_worker_alive"
    with database.write() as s:
        store.pause(s, "default", second)
    assert position(database, second) == store.QueuePosition(None, None, "paused")


def test_queues_do_not_mix(database: Database) -> None:
    with database.write() as s:
        new_file(s)
    submit(database)
    taken = claim(database)
    assert taken is not None
    assert taken.kind == "fine_tuning"
    assert claim(database) is None


def test_a_silent_wake_up_is_repeated_for_an_idle_worker_only(database: Database) -> None:
    for _ in range(3):
        submit(database)
    empty_outbox(database)  # published, and lost by the broker

    def sweep() -> int:
        with database.write() as s:
            return store.requeue_silent(s, SETTINGS)

    def wait_silently() -> None:
        empty_outbox(database)
        with database.write() as s:
            s.execute(update(Job).values(woken_at=Job.woken_at - 100))

    assert sweep() == 0  # not silent for long
    wait_silently()
    assert sweep() == 0  # nobody is there to be woken
    register(database, "w1")
    assert outbox(database) == ["gpu"]  # a worker that starts is woken at once
    wait_silently()
    assert sweep() == 1
    assert outbox(database) == ["gpu"]
    assert sweep() == 0  # the first one is not published yet
    wait_silently()
    assert claim(database, "w1") is not None
    assert sweep() == 0  # it is busy
    register(database, "w2")
    wait_silently()
    assert sweep() == 1


def test_a_worker_that_starts_without_work_is_not_woken(database: Database) -> None:
    register(database, "w1")
    assert outbox(database) == []


def test_workers_are_listed_while_alive_and_forgotten(database: Database) -> None:
    register(database, "w1")
    register(database, "w2")
    with database.write() as s:
        assert store.heartbeat_worker(s, "w1", "ftjob-x", [{"name": "H100"}])
        assert not store.heartbeat_worker(s, "unknown", None)
        s.execute(update(Worker).where(Worker.id == "w2").values(last_seen=Worker.last_seen - 120))
    with database.write() as s:
        (alive,) = store.list_workers(s, alive_seconds=60)
        assert (alive.id, alive.job_id, alive.devices) == ("w1", "ftjob-x", [{"name": "H100"}])
        assert len(store.list_workers(s)) == 2
        assert store.forget_dead_workers(s, 100) == 1
        store.forget_worker(s, "w1")
        assert store.list_workers(s) == []


def test_no_query_of_a_claim_a_list_or_a_sweep_reads_ended_jobs(tmp_path: Path) -> None:
    """However many jobs have ended: SQLite plans each statement on an index that leaves them out, or by key."""
    database = Database(f"sqlite:///{tmp_path / 'plans.db'}")
    database.upgrade()
    job_id = submit(database)
    statements: list[tuple[str, Any]] = []
    with database.write() as s:
        listen(s.connection(), "before_cursor_execute", lambda *event: statements.append((event[2], event[3])))
        store.queue_position(s, s.get_one(Job, job_id))
        assert store.claim(s, Queue.GPU, "w", "cpu", 60) is not None
        store.list_jobs(s, "default", Kind.FINE_TUNING)
        store.reap(s, SETTINGS)
        store.expire_deadlines(s)
        store.requeue_silent(s, SETTINGS)
        plans = [
            (statement, row[3])
            for statement, parameters in list(statements)
            if " jobs" in statement and statement.startswith(("SELECT", "UPDATE"))
            for row in s.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]
    database.close()
    assert len(plans) > 8
    wanted = (
        "ix_jobs_waiting",
        "ix_jobs_leased",
        "ix_jobs_deadline",
        "ix_jobs_listing (project=? AND kind=?)",
        "(id=?)",
    )
    for statement, plan in plans:
        assert " jobs" not in plan or any(index in plan for index in wanted), (plan, statement)
