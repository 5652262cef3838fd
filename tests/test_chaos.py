"""A storm over the whole service: whatever dies, no job is lost, none runs twice at once, and nothing told is untold.

VLM_DFT_CHAOS_SECONDS and VLM_DFT_CHAOS_SEED make it longer and another one: `make chaos`, `python -m benchmarks chaos`.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from chaos_service import chaos_service
from chaos_storm import Report, Storm
from conftest import skip
from throwaway import postgres_directory, redis_binary, wait_until
from worker_stack import children_of, is_alive

from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import TERMINAL, Phase
from service.jobs.tables import Job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

SECONDS = float(os.environ.get("VLM_DFT_CHAOS_SECONDS", "9"))
SEED = int(os.environ.get("VLM_DFT_CHAOS_SEED", "1"))
REAL = os.environ.get("VLM_DFT_CHAOS_TRAINER") == "real"
"""The real trainer in the storms, too: it takes seconds to load, so faults must come more slowly."""
PAUSE_SECONDS = (2.0, 6.0) if REAL else (0.1, 0.9)


@pytest.fixture(params=["embedded", "team"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "team" and (redis_binary() is None or postgres_directory() is None):
        skip("no Redis or PostgreSQL binaries")
    return request.param


def keep(report: Report) -> None:
    """For ``python -m benchmarks chaos``."""
    if path := os.environ.get("VLM_DFT_CHAOS_REPORT"):
        line = {"stack": report.kind, "seed": report.seed, "faults": dict(report.faults), "jobs": report.jobs}
        line |= {"attempts": report.attempts, "ended": dict(report.ended), "lost": report.lost}
        line |= {"overlapping_steps": report.overlapping_steps, "broken": report.broken}
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def test_a_storm_loses_no_job_and_overlaps_none(kind: str, tmp_path: Path, tiny_qwen2: Path) -> None:
    with chaos_service(tmp_path / "chaos", tiny_qwen2, kind, persistent=SEED % 2 == 0, real_trainer=REAL) as service:
        with closing(Storm(service, SEED, service.upload(), pause_seconds=PAUSE_SECONDS)) as storm:
            storm.rage(SECONDS)
            report = storm.settle()
        keep(report)
        assert report.broken == [], service.logs()
    assert report.lost == []
    assert report.overlapping_steps == 0
    assert report.num_faults >= SECONDS / (2 * PAUSE_SECONDS[1])
    assert report.ended[Phase.SUCCEEDED] > 0


def test_killed_trainings_end_with_the_weights_of_an_undisturbed_one(tmp_path: Path, tiny_qwen2: Path) -> None:
    """The real trainer: every attempt's end by SIGKILL, and bit for bit the same model."""
    with (
        chaos_service(tmp_path / "chaos", tiny_qwen2, "embedded", real_trainer=True) as service,
        service.client() as client,
    ):
        file_id = service.upload()
        numbers = {"max_steps": 60, "checkpoint_every_steps": 5, "batch_size": 2, "learning_rate": 1e-3}
        body = {"model": "tiny", "training_file": file_id, "seed": 1}
        method = {"type": "supervised", "supervised": {"objective": "dft", "hyperparameters": numbers}}

        def submit() -> str:
            return client.fine_tuning.jobs.create(**body, method=method).id  # pyright: ignore[reportArgumentType]

        def end_of(job_id: str) -> Job:
            def look() -> Job | None:
                service.tend()
                with service.database.read() as s:
                    job = s.get_one(Job, job_id)
                    return job if job.phase in TERMINAL else None

            return wait_until(look, 180, f"{job_id} ends: {service.logs()}")

        undisturbed = end_of(submit())
        disturbed = submit()
        generator, kills = random.Random(SEED), 0
        for step in (6, 17, 31):
            wait_until(lambda at=step: _reached(service.database, disturbed, at), 60, f"step {step}: {service.logs()}")
            victims = [*service.trainers(), *service.supervisors()]
            if victims and not _ended(service.database, disturbed):
                with suppress(ProcessLookupError):
                    os.kill(generator.choice(victims), signal.SIGKILL)
                    kills += 1
        job = end_of(disturbed)
        assert (job.phase, undisturbed.phase) == (Phase.SUCCEEDED, Phase.SUCCEEDED), service.logs()
        assert kills > 0
        assert job.attempt > 1, "a kill has hit it; one may hit a supervisor between two jobs"
        assert job.result is not None
        assert undisturbed.result is not None
        assert job.result["train"]["model_sha256"] == undisturbed.result["train"]["model_sha256"]
        assert job.trained_tokens == undisturbed.trained_tokens


def _reached(database: Database, job_id: str, step: int) -> bool:
    with database.read() as s:
        job = s.get_one(Job, job_id)
        return job.phase in TERMINAL or job.reported_step >= step


def _ended(database: Database, job_id: str) -> bool:
    with database.read() as s:
        return s.get_one(Job, job_id).phase in TERMINAL


def test_of_several_ranks_none_outlives_another(tmp_path: Path, tiny_qwen2: Path) -> None:
    """Two ranks under torchrun: a killed rank, and a killed torchrun, take all with them, and the job goes on."""
    with (
        chaos_service(tmp_path / "chaos", tiny_qwen2, "embedded", real_trainer=True, cpu_ranks=2) as service,
        service.client() as client,
    ):
        numbers = {"max_steps": 200, "checkpoint_every_steps": 5, "batch_size": 2, "micro_batch_size": 1}
        method = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
        job_id = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=service.upload(),
            method=method,  # pyright: ignore[reportArgumentType] - our keys
        ).id
        for kills, of_ranks in enumerate((True, False), start=1):
            wait_until(lambda at=10 * kills: _reached(service.database, job_id, at), 90, f"it runs: {service.logs()}")
            [torchrun] = service.trainers()
            ranks = children_of(torchrun)
            assert len(ranks) == 2
            os.kill(ranks[1] if of_ranks else torchrun, signal.SIGKILL)
            wait_until(lambda pids=(torchrun, *ranks): not any(map(is_alive, pids)), 10, "all of them end")
        wait_until(lambda: _attempt(service.database, job_id) == 3, 60, f"attempt 3: {service.logs()}")
        client.fine_tuning.jobs.cancel(job_id)
        wait_until(lambda: _ended(service.database, job_id), 30, "it is cancelled")
        with service.database.read() as s:
            attempts = store.list_attempts(s, job_id)
    assert all(attempt.exit_reason for attempt in attempts)


def _attempt(database: Database, job_id: str) -> int:
    with database.read() as s:
        return s.get_one(Job, job_id).attempt


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", directory], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk can be mounted by root alone")
    yield directory
    wait_until(lambda: subprocess.run(["umount", directory], capture_output=True).returncode == 0, 10, "unmounted")


def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path: Path, tiny_qwen2: Path) -> None:
    data = small_disk / "data"
    with (
        chaos_service(tmp_path / "chaos", tiny_qwen2, "embedded", data_dir=data) as service,
        closing(Storm(service, SEED, service.upload(), jobs_at_once=2)) as storm,
    ):
        storm._faults = [storm.kill_trainer]
        storm.rage(3)
        filler = small_disk / "filler"
        _fill(filler)
        storm.rage(4)
        filler.unlink()
        report = storm.settle()
        told = [line for line in report.broken if "disk_full" in line]
        assert report.lost == []
        assert report.overlapping_steps == 0
        assert [line for line in report.broken if line not in told] == [], service.logs()
        before = report.ended[Phase.SUCCEEDED]
        storm.rage(2)
        assert storm.settle().ended[Phase.SUCCEEDED] > before, "with room again, jobs run as before"


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        _write_without_end(file)


def _write_without_end(file: io.FileIO) -> None:
    while True:
        file.write(bytes(2**16))
