"""Kill what runs a job, and the job still ends as it should: once, whole, and without two executions at a time."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from throwaway import wait_until
from worker_stack import Stack, children_of, is_alive, overlaps, running_stack, step_settings

from service.jobs import store
from service.jobs.phases import Phase

pytestmark = pytest.mark.chaos


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """SQLite and the filesystem broker: what `vlm-dft up` uses on a bare machine."""
    with running_stack(step_settings(tmp_path)) as running:
        running.start_janitor()
        yield running


def assert_whole(stack: Stack, job_id: str, steps: int) -> None:
    """Succeeded; every step reported once, in order; the events gapless; never two executions at a time."""
    assert stack.job(job_id).phase == Phase.SUCCEEDED, stack.job(job_id).error
    events = stack.events(job_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    reported = [event.data["step"] for event in events if event.type == "metrics" and event.data]
    assert reported == list(range(1, steps + 1))
    assert overlaps(stack.journal(job_id)) == 0


def freeze(stack: Stack, pid: int) -> None:
    """SIGSTOP, but not inside a transaction: on SQLite that would freeze every other writer as well."""
    for _ in range(50):
        os.kill(pid, signal.SIGSTOP)
        with sqlite3.connect(stack.settings.data / "vlm-dft.db", timeout=0.05, isolation_level=None) as probe:
            try:
                probe.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.03)
            else:
                probe.execute("ROLLBACK")
                return
    raise AssertionError("the process is always inside a transaction")


def resumed_steps(stack: Stack, job_id: str) -> list[int | None]:
    with stack.database.read() as session:
        return [attempt.resumed_from_step for attempt in store.list_attempts(session, job_id)]


def test_killed_worker_main_takes_its_trainer_along_and_the_job_resumes_elsewhere(stack: Stack) -> None:
    [janitor] = stack.processes
    stack.start_janitor()
    worker = stack.start_worker()
    job_id = stack.submit(steps=20)
    line = stack.wait_for_step(job_id, 5)
    worker.kill()
    janitor.kill()  # the other one does its work
    wait_until(lambda: not is_alive(line["pid"]), 10, "the trainer dies with its supervisor")
    stack.start_worker()
    stack.wait_for_end(job_id)
    assert_whole(stack, job_id, 20)
    job = stack.job(job_id)
    assert (job.attempt, job.crashes) == (2, 1)
    assert resumed_steps(stack, job_id)[1] in (4, 6)


def test_killed_trainer_is_told_of_and_resumed_at_once(stack: Stack) -> None:
    stack.start_worker()
    job_id = stack.submit(steps=12)
    line = stack.wait_for_step(job_id, 5)
    os.kill(line["pid"], signal.SIGKILL)
    stack.wait_for_end(job_id)
    assert_whole(stack, job_id, 12)
    with stack.database.read() as session:
        first, second = store.list_attempts(session, job_id)
    assert first.exit_reason == "the trainer ended by SIGKILL: likely out of memory, or killed by hand"
    assert first.ended_at is not None
    assert second.started_at - first.ended_at < stack.settings.lease_seconds / 2, "no lease had to expire"


def test_supervisor_that_was_stopped_too_long_finds_itself_fenced(stack: Stack) -> None:
    first = stack.start_worker()
    job_id = stack.submit(steps=30)
    line = stack.wait_for_step(job_id, 3)
    [child] = children_of(first.pid)
    stack.start_worker()
    freeze(stack, child)
    wait_until(lambda: not is_alive(line["pid"]), 10, "the trainer ends itself when its lease is not renewed")
    wait_until(lambda: stack.job(job_id).attempt == 2, 10, f"another takes the job {stack.logs()}")
    os.kill(child, signal.SIGCONT)
    stack.wait_for_end(job_id)
    assert_whole(stack, job_id, 30)
    assert stack.job(job_id).attempt == 2


def test_killed_pool_child_is_replaced_and_its_successor_drains_to_the_last_step(stack: Stack) -> None:
    worker = stack.start_worker()
    job_id = stack.submit(steps=45, checkpoint_every=1000)
    line = stack.wait_for_step(job_id, 3)
    [child] = children_of(worker.pid)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: not is_alive(line["pid"]), 10, "the trainer dies with its supervisor")
    wait_until(lambda: stack.journal(job_id)[-1]["attempt"] == 2, 20, "attempt 2 runs")
    worker.terminate()
    wait_until(lambda: stack.job(job_id).phase == Phase.QUEUED, 10, "the job is given back")
    [interrupted] = [line for line in stack.journal(job_id) if line["what"] == "interrupted"]
    assert stack.job(job_id).crashes == 1, "the drain is none"
    stack.start_worker()
    stack.wait_for_end(job_id)
    assert_whole(stack, job_id, 45)
    assert resumed_steps(stack, job_id) == [None, None, interrupted["step"]], "not one step of the drained one is lost"


def test_crash_loop_ends_as_failed_after_max_crashes(stack: Stack) -> None:
    stack.start_worker()
    job_id = stack.submit(steps=9, checkpoint_every=1, crash={"1": 2, "2": 4, "3": 6})
    job = stack.wait_for_end(job_id)
    assert (job.phase, job.attempt, job.crashes) == (Phase.FAILED, 3, 3)
    assert job.error is not None
    assert job.error["code"] == "trainer_crashed"
    assert "exited with code 3" in job.error["message"]
    assert "about to fail at step 6" in job.error["message"], "the end of the log is quoted"


def test_running_job_is_cancelled_within_seconds_even_when_it_is_stubborn(stack: Stack) -> None:
    stack.start_worker()
    willing, stubborn = stack.submit(steps=1000), stack.submit(steps=1000, stubborn=True)
    for job_id, limit in ((willing, 5.0), (stubborn, stack.settings.cancel_seconds + 5.0)):
        line = stack.wait_for_step(job_id, 2)
        with stack.database.write() as session:
            store.cancel(session, "default", job_id)
        began = time.monotonic()
        job = stack.wait_for_end(job_id)
        assert job.phase == Phase.CANCELLED
        assert time.monotonic() - began < limit
        assert not is_alive(line["pid"])


def test_without_leases_in_the_trainer_executions_would_overlap(stack: Stack) -> None:
    """The control: with the watchdog taken out, the stopped supervisor's test does show two executions at once."""
    first = stack.start_worker()
    job_id = stack.submit(steps=60, unsupervised=True)
    stack.wait_for_step(job_id, 3)
    [child] = children_of(first.pid)
    stack.start_worker()
    freeze(stack, child)
    wait_until(lambda: overlaps(stack.journal(job_id)) > 0, 15, "two executions at once")
    os.kill(child, signal.SIGCONT)
    assert stack.wait_for_end(job_id).phase == Phase.SUCCEEDED
