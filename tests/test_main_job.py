"""The main job as a user lives it: only the stock openai client, against `vlm-dft up`, with the real trainer.

Upload, wait, create (dft), poll, events, checkpoints, the model appears; then the same under kill -9.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psycopg
import pytest
import redis
from PIL import Image
from running_service import RunningService, ended, extension
from throwaway import wait_until
from uploads_for_tests import wethink_archive

from vlm_dft.tiny import build_tiny_vlm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build_tiny_vlm(tmp_path / "data" / "models" / "base" / "tiny-vl")
    return tmp_path


@pytest.fixture
def embedded(directory: Path) -> Iterator[RunningService]:
    """SQLite and the filesystem broker."""
    with RunningService(directory) as service:
        yield service


@pytest.fixture
def team(directory: Path, redis_url: str, postgres_url: str) -> Iterator[RunningService]:
    """PostgreSQL and Redis, emptied first."""
    redis.Redis.from_url(redis_url).flushdb()
    name = "main_job"
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name}")
    database_url = postgres_url.rsplit("/", 1)[0] + f"/{name}"
    with RunningService(directory, VLM_DFT_DATABASE_URL=database_url, VLM_DFT_BROKER_URL=redis_url) as service:
        yield service


def run_main_job(client: openai.OpenAI, archive: Path, suffix: str) -> None:
    """Every call of a user's script, with what it may rely on."""
    file = client.files.create(file=archive, purpose="fine-tune")
    file = client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=60)
    assert file.status == "processed", file.status_details
    hyperparameters = {"n_epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every_steps": 2}
    hyperparameters |= {"sample_rows": 2, "sample_max_new_tokens": 8}
    job = client.fine_tuning.jobs.create(
        model="tiny-vl",
        training_file=file.id,
        suffix=suffix,
        seed=7,
        metadata={"test": suffix},
        method={"type": "supervised", "supervised": {"objective": "dft", "hyperparameters": hyperparameters}},
    )
    assert job.status in {"validating_files", "queued", "running"}
    job = wait_until(lambda: ended(client, job.id), 120, "the job ends", interval=0.3)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith("ft:tiny-vl:default:" + suffix)
    assert job.trained_tokens > 0
    assert job.seed == 7

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    created = [event.created_at for event in events]
    assert created == sorted(created, reverse=True)
    losses = {
        event.data["step"]: event.data["nll"] for event in events if event.type == "metrics" and "nll" in event.data
    }
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 4, 2]
    samples = extension(client, f"/fine_tuning/jobs/{job.id}/samples")
    assert samples["steps"] == [0, 6]
    assert [(each["step"], each["row_id"]) for each in samples["data"]] == [(6, "data.jsonl:1"), (6, "data.jsonl:2")]
    picture = samples["data"][0]["prompt"][-1]["content"][0]
    shown = httpx.get(f"{client.base_url}".removesuffix("/v1/") + picture["image_url"]).raise_for_status()
    assert Image.open(io.BytesIO(shown.content)).size == (picture["width"], picture["height"])
    assert job.fine_tuned_model in {model.id for model in client.models.list()}
    assert client.models.retrieve(job.fine_tuned_model).owned_by == "default"
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"test": suffix})] == [job.id]


def test_stock_client_runs_the_main_job(team: RunningService, directory: Path) -> None:
    """Strict: it accepts nothing that the lenient one refuses. On SQLite and files: the next test, and the demo's."""
    run_main_job(team.client(strict=True), wethink_archive(directory / "train.tar.gz", rows=12), "strict")


def test_killed_worker_resumes_from_its_checkpoint_and_killed_api_loses_nothing(
    directory: Path, embedded: RunningService
) -> None:
    client = embedded.client(strict=True, max_retries=8)
    file = client.files.create(file=wethink_archive(directory / "train.tar.gz", rows=12), purpose="fine-tune")
    client.files.wait_for_processing(file.id, poll_interval=0.2, max_wait_seconds=60)
    hyperparameters = {
        "max_steps": 60,
        "n_epochs": 100,
        "batch_size": 4,
        "checkpoint_every_steps": 10,
        "sample_rows": 0,
    }
    job = client.fine_tuning.jobs.create(
        model="tiny-vl",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"objective": "dft", "hyperparameters": hyperparameters}},
    )
    checkpoints = client.fine_tuning.jobs.checkpoints
    wait_until(lambda: checkpoints.list(job.id).data, 90, "a first checkpoint", interval=0.05)
    os.kill(embedded.child("gpu-worker-0@%h"), signal.SIGKILL)
    os.kill(embedded.child("uvicorn"), signal.SIGKILL)
    job = wait_until(lambda: ended(client, job.id), 150, "the job ends", interval=0.5)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model in {model.id for model in client.models.list()}
    path = f"/fine_tuning/jobs/{job.id}"
    assert extension(client, path)["attempt"] == 2
    attempts = extension(client, f"{path}/attempts")["data"]
    assert sorted(attempt["attempt"] for attempt in attempts) == [1, 2]
    resumed = next(attempt for attempt in attempts if attempt["attempt"] == 2)["resumed_from_step"]
    assert resumed
    assert resumed % 10 == 0

    steps = [record["step"] for record in extension(client, f"{path}/metrics")["data"] if "nll" in record]
    assert steps == list(range(1, 61))
    events = [event for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    reported = [event.data["step"] for event in events if "nll" in event.data]
    assert len(reported) == len(set(reported))
    tokens = sum(record["num_tokens"] for record in extension(client, f"{path}/metrics")["data"] if "nll" in record)
    assert job.trained_tokens == tokens
