"""One attempt, supervised in this process on real rows: what is started, what is told, how it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from throwaway import wait_until
from worker_stack import Stack, is_alive, running_stack, step_settings

from service.jobs import store
from service.jobs.phases import Kind, Phase, Queue
from service.jobs.tables import Checkpoint, Job
from service.settings import Settings
from vlm_dft.config import RunConfig
from vlm_dft.run_dir import RunDir
from worker.follow import Follower
from worker.record import Outcome
from worker.supervise import Attempt, StopFlag
from worker.trainer_process import trainer_environment


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with running_stack(step_settings(tmp_path)) as running:
        yield running


def claim(stack: Stack) -> store.Claim:
    with stack.database.write() as session:
        found = store.claim(session, Queue.GPU, "test", "cpu", stack.settings.lease_seconds)
    assert found is not None
    return found


def run(stack: Stack, *, stop: StopFlag | None = None, during: Callable[[store.Claim], None] | None = None) -> Outcome:
    """Claim the waiting job and supervise it; meanwhile ``during`` runs in a thread of its own."""
    taken = claim(stack)
    attempt = Attempt(stack.database, stack.settings, taken, num_gpus=0, stop=stop or StopFlag())
    failures: list[BaseException] = []

    def observe() -> None:
        assert during is not None
        try:
            during(taken)
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's own thread
            failures.append(error)

    observer = threading.Thread(target=observe) if during else None
    if observer:
        observer.start()
    outcome = attempt.run()
    if observer:
        observer.join()
    if failures:
        raise failures[0]
    return outcome


def with_script(settings: Settings, body: str) -> Settings:
    """Settings whose trainer is this Python code, with ``run`` the RunDir."""
    script = settings.data.parent / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom vlm_dft.run_dir import RunDir\nfrom vlm_dft.results import *\n"
        f"run = RunDir(Path(sys.argv[-1]))\n{body}\n"
    )
    python = settings.data.parent / "script-python"
    python.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {sys.executable} {script} "$last"\n')
    python.chmod(0o755)
    return settings.model_copy(update={"trainer_python": python})


def events(stack: Stack, job_id: str) -> list[str]:
    return [event.message for event in stack.events(job_id)]


def test_trainer_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secrets = (
        "VLM_DFT_DATABASE_URL",
        "VLM_DFT_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "https_proxy",
        "PGPASSWORD",
        "VLM_DFT_JUDGE_API_KEY",
    )
    for name in secrets:
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    offline = trainer_environment(step_settings(tmp_path), ranks=1, uses_gpu=True)
    assert "hunter2" not in offline.values()
    assert offline["HF_HUB_OFFLINE"] == "1"
    assert offline["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert offline["PATH"] == os.environ["PATH"]
    online = trainer_environment(step_settings(tmp_path, hub_models=True), ranks=1, uses_gpu=False)
    assert {name for name, value in online.items() if value == "hunter2"} == {"HF_TOKEN", "https_proxy"}
    assert "HF_HUB_OFFLINE" not in online
    assert online["CUDA_VISIBLE_DEVICES"] == "", "a validation takes no GPU"
    judged = trainer_environment(step_settings(tmp_path), ranks=1, uses_gpu=True, uses_judge=True)
    assert {name for name, value in judged.items() if value == "hunter2"} == {"VLM_DFT_JUDGE_API_KEY", "https_proxy"}


def test_config_of_an_attempt_adds_identity_lease_and_the_furthest_checkpoint_on_disk(stack: Stack) -> None:
    job_id = stack.submit(steps=8, checkpoint_every=2, crash={"1": 7})
    assert run(stack) == Outcome.RECOVERING
    with stack.database.write() as session:  # as if the worker had died before it could record its last two
        session.execute(update(Checkpoint).where(Checkpoint.step > 2).values(step=Checkpoint.step + 1000))
    assert run(stack) == Outcome.SUCCEEDED
    second = RunDir(stack.settings.runs_dir / job_id / "attempt-2").read_config()
    assert second.run_id == job_id
    assert second.supervision is not None
    assert second.supervision.lease_timeout_seconds == pytest.approx(0.6 * stack.settings.lease_seconds)
    assert second.train is not None
    assert second.train.resume_from == stack.settings.runs_dir / job_id / "attempt-1/checkpoints/step-000006"
    with stack.database.read() as session:
        assert [attempt.resumed_from_step for attempt in store.list_attempts(session, job_id)] == [None, 6]


def test_steps_of_a_trainer_that_outlived_its_supervisor_are_told_by_the_next_attempt(stack: Stack) -> None:
    job_id = stack.submit(steps=8, checkpoint_every=3, crash={"1": 7})
    assert run(stack) == Outcome.RECOVERING
    with stack.database.write() as session:  # as if nobody had been there to tell steps 3 to 7
        session.execute(update(Job).values(reported_step=2))
    already = len(stack.events(job_id))
    assert run(stack) == Outcome.SUCCEEDED
    told = [event.data["step"] for event in stack.events(job_id)[already:] if event.type == "metrics" and event.data]
    assert told == [3, 4, 5, 6, 7, 8]


def test_leftover_of_the_process_group_is_killed_when_the_trainer_ends(stack: Stack) -> None:
    stack.settings = with_script(
        stack.settings,
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "(run.path / 'child').write_text(str(child.pid))\n"
        "sys.exit(3)",
    )
    job_id = stack.submit()
    assert run(stack) == Outcome.RECOVERING
    child = int((stack.settings.runs_dir / job_id / "attempt-1" / "child").read_text())
    wait_until(lambda: not is_alive(child), 10, "the child is gone")


def test_typed_failure_of_the_user_is_final_and_one_of_the_machine_is_tried_again(stack: Stack) -> None:
    def failing(code: str, category: str) -> Settings:
        error = f"ErrorRecord(code={code!r}, message='it is so', category={category!r})"
        return with_script(stack.settings, f"run.write_result(RunResult(status='failed', error={error}))\nsys.exit(1)")

    stack.settings = failing("nan_loss", "user")
    job_id = stack.submit()
    assert run(stack) == Outcome.FAILED
    job = stack.job(job_id)
    assert (job.phase, job.crashes) == (Phase.FAILED, 0)
    assert job.error is not None
    assert job.error["code"] == "nan_loss"
    stack.settings = failing("disk_full", "server")
    job_id = stack.submit()
    assert [run(stack), run(stack), run(stack)] == [Outcome.RECOVERING, Outcome.RECOVERING, Outcome.FAILED]
    assert (stack.job(job_id).error or {})["code"] == "disk_full"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('run.result_path.write_text(\'{"status": "splendid"}\')', "result.json is not understood"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV: a crash in native code"),
        (
            "print('torch is not installed'); sys.exit(4)",
            "exited with code 4. The end of its log:\ntorch is not installed",
        ),
        ("sys.exit(0)", "exited with code 0"),
    ],
)
def test_trainer_without_a_usable_result_is_a_crash_in_plain_words(stack: Stack, body: str, words: str) -> None:
    stack.settings = with_script(stack.settings.model_copy(update={"max_crashes": 1}), body)
    job_id = stack.submit()
    assert run(stack) == Outcome.FAILED
    error = stack.job(job_id).error
    assert error is not None
    assert error["code"] == "trainer_crashed"
    assert words in error["message"]


def test_python_that_does_not_exist_is_named(stack: Stack) -> None:
    stack.settings = stack.settings.model_copy(update={"trainer_python": Path("/nowhere/python"), "max_crashes": 1})
    job_id = stack.submit()
    assert run(stack) == Outcome.FAILED
    assert "/nowhere/python" in (stack.job(job_id).error or {})["message"]


def test_job_of_another_version_fails_at_once_and_names_the_field(stack: Stack) -> None:
    job_id = stack.submit()
    with stack.database.write() as session:
        session.execute(update(Job).values(config={"run_id": job_id, "train": {"model": "m", "polish": True}}))
    assert run(stack) == Outcome.FAILED
    error = stack.job(job_id).error
    assert error is not None
    assert error["code"] == "invalid_config"
    assert "train.polish" in error["message"]


def test_lost_lease_kills_the_trainer_at_once_and_writes_nothing(stack: Stack) -> None:
    job_id = stack.submit(steps=1000)
    pids: list[int] = []

    def take_away(taken: store.Claim) -> None:
        pids.append(stack.wait_for_step(job_id, 3)["pid"])
        with stack.database.write() as session:
            session.execute(update(Job).values(fence=taken.fence + 1, owner="somebody else"))
        pids.append(len(stack.events(job_id)))

    assert run(stack, during=take_away) == Outcome.LOST
    pid, events_then = pids
    assert not is_alive(pid)
    assert len(stack.events(job_id)) == events_then
    assert stack.job(job_id).owner == "somebody else"


def test_trainer_that_somebody_else_asked_to_stop_is_given_back(stack: Stack) -> None:
    job_id = stack.submit(steps=1000)
    outcome = run(stack, during=lambda _: os.kill(stack.wait_for_step(job_id, 2)["pid"], signal.SIGTERM))
    assert outcome == Outcome.RELEASED
    assert stack.job(job_id).crashes == 0
    assert events(stack, job_id)[-1] == "Attempt 1 was given back: the trainer was asked to stop"


def test_stubborn_trainer_is_killed_when_the_drain_is_over(stack: Stack) -> None:
    stack.settings = stack.settings.model_copy(update={"drain_seconds": 0.5})
    job_id, stop = stack.submit(steps=1000, stubborn=True), StopFlag()

    def drain(_: store.Claim) -> None:
        stack.wait_for_step(job_id, 2)
        stop.is_set = True

    assert run(stack, stop=stop, during=drain) == Outcome.RELEASED
    assert (stack.job(job_id).phase, stack.job(job_id).crashes) == (Phase.QUEUED, 0)


def test_rows_follow_the_checkpoints_on_disk(stack: Stack) -> None:
    job_id = stack.submit(steps=10, checkpoint_every=2)
    assert run(stack) == Outcome.SUCCEEDED
    with stack.database.read() as session:
        rows = store.list_checkpoints(session, job_id).rows
    assert [row.step for row in rows] == [10, 8, 6], "keep_checkpoints is 3"


def test_validation_runs_for_real_and_settles_its_job(stack: Stack, tmp_path: Path) -> None:
    """The real `python -m vlm_dft` on a small file: no step trainer here."""
    source = tmp_path / "chat.jsonl"
    row = '{"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}'
    source.write_text(f"{row}\n" * 3)
    stack.settings = stack.settings.model_copy(update={"trainer_python": None, "lease_seconds": 60.0})
    config: dict[str, Any] = {"run_id": "?", "validation": {"source": source, "filename": source.name}}
    new = store.NewJob(
        project="default",
        kind=Kind.FILE_VALIDATION,
        request={},
        config=RunConfig.model_validate(config),
        runs_dir=stack.settings.runs_dir,
    )
    with stack.database.write() as session:
        job_id = store.submit(session, new).id
        taken = store.claim(session, Queue.CPU, "test", "cpu", 60.0)
    assert taken is not None
    outcome = Attempt(stack.database, stack.settings, taken, num_gpus=0, stop=StopFlag()).run()
    assert outcome == Outcome.SUCCEEDED, RunDir(taken.run_path).log_tail()
    result = stack.job(job_id).result
    assert result is not None
    assert result["validation"]["valid"] == 3


def test_follower_reads_each_whole_line_once(tmp_path: Path) -> None:
    followed = RunDir(tmp_path)
    follower = Follower(followed)
    assert not follower.look().is_new
    followed.metrics_path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    news = follower.look()
    assert [line["step"] for line in news.metrics] == [1, 2]
    assert follower.look().metrics == news.metrics, "not kept yet: told again"
    follower.keep(news)
    assert not follower.look().is_new
    with followed.metrics_path.open("ab") as file:
        file.write(b'ep": 3}\n')
    assert [line["step"] for line in follower.look().metrics] == [3]
