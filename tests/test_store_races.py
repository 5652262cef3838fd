"""Many threads and processes at once: no job claimed twice, no gap in events, one job per request, one ending."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import select
from store_samples import CRASHED, expire_lease, new_file, new_job, trained, validated

from service.errors import FileInUseError, IdempotencyError, InvalidRequestError, InvalidStateError
from service.jobs import order, store
from service.jobs.caps import Caps
from service.jobs.database import Database
from service.jobs.files import delete_file
from service.jobs.phases import Phase, Queue, Stop
from service.jobs.tables import File, Job, JobEvent, Model, Outbox
from service.settings import Settings

SETTINGS = Settings(lease_seconds=60, max_crashes=3)
CLAIM_ALL = """
import sys
from service.jobs import store
from service.jobs.database import Database
database = Database(sys.argv[1])
while True:
    with database.write() as s:
        claim = store.claim(s, "gpu", sys.argv[2], "cpu", 60)
    if claim is None:
        break
    print(claim.job_id)
"""


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Start all calls at the same moment, each in a thread; their results in order. Exceptions are results too."""
    barrier = Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(10)
        try:
            return call()
        except (InvalidStateError, InvalidRequestError, IdempotencyError) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def write(database: Database, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Callable[[], Any]:
    def call() -> Any:
        with database.write() as s:
            return function(s, *arguments, **keywords)

    return call


def submit(database: Database, **fields: Any) -> Job:
    return write(database, store.submit, new_job(**fields))()


def claim(database: Database, worker: str = "w1") -> store.Claim:
    taken = write(database, store.claim, Queue.GPU, worker, "cpu", 60)()
    assert taken is not None
    return taken


def test_processes_never_claim_one_job_twice(database: Database, database_url: str) -> None:
    ids = {submit(database).id for _ in range(30)}
    command = [sys.executable, "-c", CLAIM_ALL, database_url]
    processes = [subprocess.Popen([*command, f"w{n}"], stdout=subprocess.PIPE, text=True) for n in range(3)]
    claimed = [line for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(claimed) == 30
    assert set(claimed) == ids


def test_threads_that_claim_at_once_all_get_a_job_while_there_are_enough(database: Database) -> None:
    for _ in range(8):
        submit(database)
    calls = [write(database, store.claim, Queue.GPU, f"w{n}", "cpu", 60) for n in range(8)]
    claims = at_once(calls)
    assert None not in claims
    assert len({c.job_id for c in claims}) == 8
    assert at_once(calls[:2]) == [None, None]


def test_one_job_goes_to_one_of_many_claimants(database: Database) -> None:
    submit(database)
    claims = at_once([write(database, store.claim, Queue.GPU, f"w{n}", "cpu", 60) for n in range(8)])
    assert sum(c is not None for c in claims) == 1


def test_event_numbers_have_no_gaps_when_many_write(database: Database) -> None:
    job = submit(database)

    def add(n: int) -> Callable[[], None]:
        def call() -> None:
            for k in range(5):
                with database.write() as s:
                    store.add_event(s, job.id, message=f"{n}.{k}")
                    if (n + k) % 4 == 0:
                        s.rollback()

        return call

    at_once([add(n) for n in range(6)])
    with database.read() as s:
        numbers = s.scalars(select(JobEvent.seq).where(JobEvent.job_id == job.id).order_by(JobEvent.seq)).all()
    rolled_back = sum((n + k) % 4 == 0 for n in range(6) for k in range(5))
    assert list(numbers) == list(range(1, 1 + 1 + 30 - rolled_back))


def test_one_idempotency_key_makes_one_job(database: Database) -> None:
    call = write(database, store.submit_once, "default", "key-1", "body", new_job)
    jobs = at_once([call] * 6)
    assert len({job.id for job in jobs}) == 1
    with database.read() as s:
        assert len(s.scalars(select(Job)).all()) == 1
        assert len(s.scalars(select(Outbox)).all()) == 1


def test_a_retry_that_overtakes_its_original_makes_no_second_job(database: Database) -> None:
    calls = [write(database, store.submit_once, "default", None, "body", new_job, retry_count=n) for n in (1, 2, 1, 2)]
    assert len({job.id for job in at_once(calls)}) == 1


def test_a_job_ends_once_however_many_say_so(database: Database) -> None:
    for _ in range(4):
        submit(database)
        taken = claim(database)
        write(database, expire_lease, taken.job_id)()
        results = at_once(
            [
                write(database, store.succeed, taken, trained()),
                write(database, store.fail, taken, CRASHED, None),
                write(database, store.cancel, "default", taken.job_id),
                write(database, store.crash, taken, "exit code 1", CRASHED, max_crashes=3),
                write(database, store.reap, SETTINGS),
                write(database, store.reap, SETTINGS),
            ]
        )
        with database.read() as s:
            job = s.get_one(Job, taken.job_id)
            events = s.scalars(select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.seq)).all()
            models = s.scalars(select(Model).where(Model.job_id == job.id)).all()
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert len(models) == (job.phase == Phase.SUCCEEDED)
        if job.phase == Phase.RECOVERING:
            write(database, store.cancel, "default", job.id)()
        else:
            endings = Counter(event.message.split(":")[0] for event in events)
            ending = ["The job has successfully completed", "The job failed", "The job was cancelled"]
            assert sum(endings[message] for message in ending) == 1, (results, endings)


def test_a_cancel_and_a_claim_agree(database: Database) -> None:
    for _ in range(6):
        job = submit(database)
        cancelled, taken = at_once(
            [
                write(database, store.cancel, "default", job.id),
                write(database, store.claim, Queue.GPU, "w1", "cpu", 60),
            ]
        )
        if taken is None:
            assert cancelled.phase == Phase.CANCELLED
        else:
            assert cancelled.phase == Phase.CANCELLING
            renewal = write(database, store.renew, taken, 60, None)()
            assert renewal == store.Renewal(Stop.CANCEL)
            assert write(database, store.cancelled, taken)()


def test_a_pause_and_a_claim_agree(database: Database) -> None:
    for _ in range(6):
        job = submit(database)
        paused, taken = at_once(
            [
                write(database, store.pause, "default", job.id),
                write(database, store.claim, Queue.GPU, "w1", "cpu", 60),
            ]
        )
        if taken is None:
            assert paused.phase == Phase.PAUSED
        else:
            assert paused.phase == Phase.PAUSING
            assert write(database, store.renew, taken, 60, None)() == store.Renewal(Stop.PAUSE)
            assert write(database, store.release, taken, "paused")()
        assert write(database, store.cancel, "default", job.id)().phase == Phase.CANCELLED


def test_claims_at_once_do_not_exceed_a_cap_together(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    count_running, turns = order._running, count()

    def count_slowly(*arguments: Any) -> Any:
        counted = count_running(*arguments)
        time.sleep(0.02 * next(turns))  # in which others could claim
        return counted

    monkeypatch.setattr(order, "_running", count_slowly)
    monkeypatch.setattr(order, "caps_of", lambda *_: Caps(project_jobs=1))
    for _ in range(6):
        submit(database)
    claims = at_once([write(database, store.claim, Queue.GPU, f"w{n}", "cpu", 60) for n in range(6)])
    assert sum(claim is not None for claim in claims) == 1


def test_a_file_is_either_deleted_or_used(database: Database) -> None:
    for _ in range(4):
        file = write(database, new_file)()
        deleted, used = at_once(
            [
                write(database, delete_file, "default", file.id),
                write(database, store.submit, new_job(training_file=file.id)),
            ]
        )
        assert isinstance(deleted, File) != isinstance(used, Job), (deleted, used)
        if isinstance(used, Job):
            assert isinstance(deleted, FileInUseError)
            write(database, store.cancel, "default", used.id)()


def test_a_deletion_and_the_end_of_the_validation_do_not_block_each_other(database: Database) -> None:
    for _ in range(4):
        file = write(database, new_file)()
        taken = write(database, store.claim, Queue.CPU, "w1", "cpu", 60)()
        assert taken is not None
        deleted, ended = at_once(
            [
                write(database, delete_file, "default", file.id),
                write(database, store.succeed, taken, validated(accepted=True)),
            ]
        )
        assert isinstance(deleted, File)
        assert ended is True
