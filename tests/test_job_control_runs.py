"""Pause, resume, cancel and deadlines of a job that runs: checkpoint written, device free, nothing lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import update
from worker_stack import Stack, is_alive, running_stack, step_settings

from service.jobs import store
from service.jobs.phases import Phase, Queue
from service.jobs.tables import Job
from worker.record import Outcome
from worker.supervise import Attempt, StopFlag
from worker.trainer_process import TrainerProcess


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A heartbeat longer than any of these tests: what the owner wants must not wait for it."""
    with running_stack(step_settings(tmp_path, heartbeat_seconds=60.0, lease_seconds=200.0)) as running:
        yield running


def run(stack: Stack, during: Callable[[], None] | None = None) -> Outcome:
    """Supervise the next job in this thread; meanwhile ``during`` runs in another."""
    with stack.database.write() as session:
        claim = store.claim(session, Queue.GPU, "test", "cpu", stack.settings.lease_seconds)
    assert claim is not None
    observer = threading.Thread(target=during or (lambda: None))
    observer.start()
    outcome = Attempt(stack.database, stack.settings, claim, num_gpus=0, stop=StopFlag()).run()
    observer.join()
    return outcome


def at_step(stack: Stack, job_id: str, step: int, what: Callable[..., object]) -> Callable[[], None]:
    """The owner asks for something when the job has come so far."""

    def ask() -> None:
        stack.wait_for_step(job_id, step)
        with stack.database.write() as session:
            what(session, "default", job_id)

    return ask


def pid_of(stack: Stack, job_id: str) -> int:
    return stack.journal(job_id)[-1]["pid"]


def reported(stack: Stack, job_id: str) -> list[int]:
    return [event.data["step"] for event in stack.events(job_id) if event.type == "metrics" and event.data]


def test_paused_job_frees_the_device_and_goes_on_from_its_last_step(stack: Stack) -> None:
    job_id = stack.submit(steps=30, checkpoint_every=1000)
    assert run(stack, at_step(stack, job_id, 3, store.pause)) == Outcome.PAUSED
    assert not is_alive(pid_of(stack, job_id))
    job = stack.job(job_id)
    assert (job.phase, job.crashes, job.owner, job.lease_until) == (Phase.PAUSED, 0, None, None)
    other = stack.submit(steps=2)
    assert run(stack) == Outcome.SUCCEEDED, "the device is free for another job"
    assert stack.job(other).phase == Phase.SUCCEEDED
    with stack.database.write() as session:
        store.resume(session, "default", job_id)
    assert run(stack) == Outcome.SUCCEEDED
    [interrupted] = [line["step"] for line in stack.journal(job_id) if line["what"] == "interrupted"]
    with stack.database.read() as session:
        first, second = store.list_attempts(session, job_id)
    assert (first.exit_reason, second.resumed_from_step) == ("paused", interrupted)
    assert reported(stack, job_id) == list(range(1, 31)), "no step was redone or left out"
    messages = [event.message for event in stack.events(job_id)]
    assert f"The job is paused; it resumes from step {interrupted}" in messages


def test_trainer_that_will_not_stop_is_killed_and_its_job_paused_at_the_checkpoint_it_has(stack: Stack) -> None:
    stack.settings = stack.settings.model_copy(update={"drain_seconds": 0.5})
    job_id = stack.submit(steps=1000, step_seconds=0.05, checkpoint_every=2, stubborn=True)
    assert run(stack, at_step(stack, job_id, 5, store.pause)) == Outcome.PAUSED
    assert not is_alive(pid_of(stack, job_id))
    assert stack.job(job_id).crashes == 0
    with stack.database.read() as session:
        [attempt] = store.list_attempts(session, job_id)
        checkpoint = store.newest_checkpoint(session, job_id)
    assert attempt.exit_reason is not None
    assert attempt.exit_reason.startswith("paused; the trainer ended by SIGKILL")
    assert checkpoint is not None


def test_trainer_killed_for_a_pause_that_was_taken_back_has_not_crashed(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.settings = stack.settings.model_copy(update={"drain_seconds": 0.5})
    job_id = stack.submit(steps=1000, step_seconds=0.05)
    asked = threading.Event()
    monkeypatch.setattr(TrainerProcess, "ask_to_stop", lambda _: asked.set())  # a signal that the trainer ignores

    def pause_and_resume() -> None:
        at_step(stack, job_id, 2, store.pause)()
        assert asked.wait(30)
        with stack.database.write() as session:
            store.resume(session, "default", job_id)

    assert run(stack, pause_and_resume) == Outcome.RELEASED
    assert (stack.job(job_id).phase, stack.job(job_id).crashes) == (Phase.QUEUED, 0)


@pytest.mark.parametrize("stubborn", [False, True])
def test_cancel_frees_the_device_without_waiting_for_a_heartbeat(stack: Stack, stubborn: bool) -> None:
    stack.settings = stack.settings.model_copy(update={"cancel_seconds": 1.0})
    job_id = stack.submit(steps=1000, step_seconds=0.05, stubborn=stubborn)
    asked: list[float] = []

    def cancel(*arguments: object) -> None:
        store.cancel(*arguments)  # pyright: ignore[reportArgumentType]
        asked.append(time.monotonic())

    assert run(stack, at_step(stack, job_id, 2, cancel)) == Outcome.CANCELLED
    assert time.monotonic() - asked[0] < stack.settings.cancel_seconds + 10, "a heartbeat is a minute"
    assert not is_alive(pid_of(stack, job_id))


def test_cancel_of_a_pausing_job_wins(stack: Stack) -> None:
    stack.settings = stack.settings.model_copy(update={"cancel_seconds": 0.5, "drain_seconds": 60.0})
    job_id = stack.submit(steps=1000, step_seconds=0.05, stubborn=True)

    def pause_then_cancel() -> None:
        at_step(stack, job_id, 2, store.pause)()
        step = stack.journal(job_id)[-1]["step"]
        at_step(stack, job_id, step + 5, store.cancel)()

    assert run(stack, pause_then_cancel) == Outcome.CANCELLED


def test_running_job_past_its_deadline_writes_its_checkpoint_and_fails(stack: Stack) -> None:
    job_id = stack.submit(steps=1000, step_seconds=0.05, checkpoint_every=1000)

    def pass_deadline(session, *_: object) -> None:
        session.execute(update(Job).values(deadline_seconds=60.0, deadline_at=Job.created_at))

    assert run(stack, at_step(stack, job_id, 3, pass_deadline)) == Outcome.FAILED
    job = stack.job(job_id)
    assert (job.phase, (job.error or {})["code"], job.crashes) == (Phase.FAILED, "timeout", 0)
    with stack.database.read() as session:
        kept = store.newest_checkpoint(session, job_id)
    assert kept is not None
    assert (Path(kept.path) / "state.json").is_file(), "its checkpoint is kept"
