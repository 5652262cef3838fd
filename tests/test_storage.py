"""An object store behind hosts with disks of their own: whole or not at all, and a job goes on elsewhere from it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from databases import copied_sqlite
from object_store import ObjectStore, object_store
from sqlalchemy import select, text
from store_samples import new_job
from throwaway import wait_until
from worker_stack import Stack, running_stack, settings_environment, step_settings

from service.jobs import queue, store
from service.jobs.database import Database
from service.jobs.tables import Attempt, Checkpoint, Job
from service.settings import Settings
from service.storage import MANIFEST, Storage, StorageError, open_storage
from vlm_dft.config import RunConfig, TrainConfig
from vlm_dft.run_dir import CHECKPOINT_MARKER

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(botocore|moto|werkzeug|aiobotocore).*")


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as found:
        yield found


@pytest.fixture
def two_hosts(s3: ObjectStore, tmp_path: Path) -> tuple[Storage, Storage]:
    """The same store behind two data directories."""
    url = f"{s3.url}/{tmp_path.name}"
    return Storage(url, tmp_path / "a"), Storage(url, tmp_path / "b")


def write_tree(directory: Path, names: tuple[str, ...] = ("weights", "sub/more")) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


def test_files_and_directories_come_back_whole_on_another_host(two_hosts: tuple[Storage, Storage]) -> None:
    here, there = two_hosts
    directory = write_tree(here.data / "runs/job/attempt-1/export")
    here.put(directory)
    file = here.data / "files/file-1"
    file.parent.mkdir()
    file.write_bytes(b"bytes")
    here.put(file)
    for path in (directory, file):
        there.fetch(there.data / path.relative_to(here.data))
    assert (there.data / "files/file-1").read_bytes() == b"bytes"
    copy = there.data / "runs/job/attempt-1/export"
    assert {str(one.relative_to(copy)): one.read_text() for one in copy.rglob("*") if one.is_file()} == {
        "weights": "weights",
        "sub/more": "sub/more",
    }
    here.remove(directory)
    assert not here.has(directory)
    with pytest.raises(StorageError, match="neither on this host nor in the object store"):
        there.fetch(there.data / "runs/job/attempt-1/dataset")


def test_half_a_directory_is_never_seen(two_hosts: tuple[Storage, Storage], monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = two_hosts
    run = here.data / "runs/job/attempt-1"
    whole, half = (write_tree(run / f"checkpoints/step-00000{step}") for step in (2, 4))
    here.put(whole)

    def killed(*_: object) -> None:
        raise OSError("killed before the manifest")

    with monkeypatch.context() as patched:
        patched.setattr(here._fs, "pipe_file", killed)
        with pytest.raises(StorageError, match="killed"):
            here.put(half)
    assert here._fs.exists(here.key(half / "weights")), "its bytes are there"
    assert there.steps(there.data / "runs/job/attempt-1") == [there.data / "runs/job/attempt-1/checkpoints/step-000002"]
    with pytest.raises(StorageError):
        there.fetch(there.data / half.relative_to(here.data))
    here.put(half)
    assert len(there.steps(there.data / "runs/job/attempt-1")) == 2


def test_a_torn_object_is_found_and_not_taken(two_hosts: tuple[Storage, Storage]) -> None:
    here, there = two_hosts
    directory = write_tree(here.data / "runs/job/attempt-1/export")
    here.put(directory)
    here._fs.pipe_file(here.key(directory / "weights"), b"torn")
    copy = there.data / directory.relative_to(here.data)
    with pytest.raises(StorageError, match="4 bytes instead of 7"):
        there.fetch(copy)
    assert not copy.exists()


def test_a_look_has_the_small_files_and_a_fetch_the_rest(
    two_hosts: tuple[Storage, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = two_hosts
    directory = here.data / "runs/job/attempt-1/export"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"x" * 100)
    (directory / "rows.jsonl").write_bytes(b"x" * 100)
    write_tree(directory, ("images/1.png",))
    here.put(directory)
    copy = there.data / directory.relative_to(here.data)
    monkeypatch.setattr("service.storage.SMALL_BYTES", 10)
    there.look(copy)
    assert {one.name for one in copy.iterdir()} == {"config.json", "rows.jsonl", MANIFEST}
    there.fetch(copy)
    assert {one.name for one in copy.iterdir()} == {"config.json", "rows.jsonl", "model.safetensors", "images"}


def test_a_copy_that_nobody_has_used_for_long_leaves_the_disk_and_the_only_one_stays(
    two_hosts: tuple[Storage, Storage],
) -> None:
    here, there = two_hosts
    attempt = "runs/job/attempt-1"
    stored, only, used = (f"{attempt}/{name}" for name in ("export", "dataset", "checkpoints/step-000002"))
    for name in (stored, used):
        here.put(write_tree(here.data / name))
        there.fetch(there.data / name)
    write_tree(there.data / only)
    for name in (stored, only, used):
        os.utime(there.data / name, (1.0, 1.0))
    there.fetch(there.data / used)
    assert there.evict(3600, {there.data / stored}) == [], "it is read now"
    assert there.evict(3600) == [there.data / stored]
    assert [(there.data / name).exists() for name in (stored, only, used)] == [False, True, True]
    there.fetch(there.data / stored)
    assert (there.data / stored / "weights").exists()


def test_logs_follow_the_run_and_never_overwrite_those_of_its_own_host(
    two_hosts: tuple[Storage, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = two_hosts
    run = here.data / "runs/job/attempt-1"
    names = ("log.txt", "evaluation/tuned/mathverse/predictions.jsonl", "lease", "export/weights", ".unpacked/1.png")
    write_tree(run, names)
    known: dict[str, tuple[int, int]] = {}
    here.put_texts(run, known)
    copy = there.data / "runs/job/attempt-1"
    there.fetch_texts(copy)
    assert {str(one.relative_to(copy)) for one in copy.rglob("*") if one.is_file()} == {
        "log.txt",
        "evaluation/tuned/mathverse/predictions.jsonl",
    }
    (run / "log.txt").write_text("a longer log")
    here.fetch_texts(run)
    assert (run / "log.txt").read_text() == "a longer log", "the store is behind"
    here.put_texts(run, known)
    there.fetch_texts(copy, ended=True)
    assert (copy / "log.txt").read_text() == "a longer log"
    with monkeypatch.context() as patched:  # what has ended is here: the store, which is away, is not asked
        patched.setattr(there, "_fs", None)
        there.fetch_texts(copy, ended=True)
    shutil.rmtree(copy)
    there.fetch_texts(copy, ended=True)
    assert (copy / "log.txt").read_text() == "a longer log", "the disk was freed meanwhile"


@pytest.fixture
def url(_sqlite_template: Path, tmp_path: Path) -> str:
    return copied_sqlite(_sqlite_template, tmp_path / "one.db")


def test_rows_name_paths_so_that_each_host_finds_its_own(tmp_path: Path, url: str) -> None:
    here, there, plain = Database(url, data=tmp_path / "a"), Database(url, data=tmp_path / "b"), Database(url)
    with here.write() as s:
        job = store.submit(s, new_job(runs_dir=tmp_path / "a/runs"))
        job.config = {**job.config, "inside": str(tmp_path / "a/files/x"), "outside": ["/datasets/y"]}
    with there.read() as s:
        found = s.scalars(select(Job)).one()
        assert found.run_path == str(tmp_path / "b/runs" / job.id)
        assert (found.config["inside"], found.config["outside"]) == (str(tmp_path / "b/files/x"), ["/datasets/y"])
    with plain.read() as s:
        assert s.execute(text("SELECT run_path FROM jobs")).scalar() == f"store://runs/{job.id}"
    for database in (here, there, plain):
        database.close()


def test_a_server_that_is_gone_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: ObjectStore
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage = Storage(s3.url, tmp_path)
    with pytest.raises(StorageError, match="could not be looked for"):
        storage.has(tmp_path / "files/x")


@pytest.fixture
def hosts(s3: ObjectStore, tmp_path: Path, redis_url: str) -> Iterator[tuple[Stack, Settings]]:
    """Processes of one host, and the settings of another with a data directory of its own: one database, one broker."""
    shared = {
        "database_url": f"sqlite:///{tmp_path / 'shared.db'}",
        "storage_url": f"{s3.url}/{tmp_path.name}",
        "storage_sync_seconds": 0.5,
        "broker_url": redis_url,
    }
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = step_settings(tmp_path / "a", **shared)
    second = step_settings(tmp_path / "b", **shared)
    with running_stack(first) as stack:
        yield stack, second


@pytest.mark.chaos
def test_a_killed_workers_job_goes_on_on_another_host_from_the_checkpoint_in_the_store(
    hosts: tuple[Stack, Settings], s3: ObjectStore
) -> None:
    stack, elsewhere = hosts
    stack.start_worker()
    stack.start_janitor()
    job_id = _submit(stack, steps=40, step_seconds=0.15, checkpoint_every=4)
    stack.wait_for_step(job_id, 4)

    def stored() -> set[str]:
        return {key for key in s3.names() if key.endswith(f"checkpoints/step-000004/{MANIFEST}")}

    wait_until(stored, 20, f"a checkpoint is in the store: {stack.logs()}")

    def recorded() -> bool:
        with stack.database.read() as s:
            return s.scalars(select(Checkpoint)).first() is not None

    wait_until(recorded, 10, "it is recorded")
    os.killpg(stack.processes[0].pid, signal.SIGKILL)
    assert elsewhere.data != stack.settings.data
    _start_worker_elsewhere(stack, elsewhere)
    job = stack.wait_for_end(job_id, 60)
    assert job.phase == "succeeded", job.error
    with stack.database.read() as s:
        attempts = s.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)).all()
    assert [attempt.attempt for attempt in attempts] == [1, 2]
    resumed = attempts[1].resumed_from_step
    assert resumed
    assert resumed % 4 == 0
    journal = [json.loads(line) for line in (elsewhere.runs_dir / job_id / "journal.jsonl").read_text().splitlines()]
    assert min(line["step"] for line in journal if line["what"] == "step") == resumed + 1, "no step is done again"
    told = [event.data["step"] for event in stack.events(job_id) if event.type == "metrics" and event.data]
    assert told == list(range(1, 41)), "each step is told once, in order"
    attempt = Path(attempts[1].run_path).relative_to(stack.settings.data)
    found = {key.split("/", 1)[1] for key in s3.names() if str(attempt) in key}
    assert {f"{attempt}/result.json", f"{attempt}/log.txt", f"{attempt}/metrics.jsonl"} <= found
    assert any(key.endswith(CHECKPOINT_MARKER) for key in found)
    gone = elsewhere.runs_dir / job_id / "attempt-2"
    wait_until(lambda: not gone.exists(), 10, "the disk is free again")


def _submit(stack: Stack, *, steps: int, step_seconds: float, checkpoint_every: int) -> str:
    """A training on a dataset that is in the object store."""
    dataset = stack.settings.files_dir / "plan.json"
    dataset.parent.mkdir()
    dataset.write_text(json.dumps({"step_seconds": step_seconds}))
    storage = open_storage(stack.settings)
    assert storage is not None
    storage.put(dataset)
    train = TrainConfig(
        model="/none", dataset=dataset, max_steps=steps, checkpoint_every_steps=checkpoint_every, keep_checkpoints=2
    )
    config = RunConfig(run_id="", train=train)
    with stack.database.write() as s:
        job_id = store.submit(s, replace(new_job(runs_dir=stack.settings.runs_dir), config=config)).id
    queue.flush_outbox(stack.database, stack.celery)
    return job_id


def _start_worker_elsewhere(stack: Stack, settings: Settings) -> None:
    """A worker of the other host, on its own data directory; the janitor's wake-ups come by the shared broker."""
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-P", "prefork", "-c", "1"]
    command += ["-Q", "gpu", "-n", "elsewhere@%h", "--without-mingle", "--without-gossip"]
    environment = settings_environment(settings) | {"REMAP_SIGTERM": "SIGQUIT", "OMP_NUM_THREADS": "1"}
    settings.data.mkdir(parents=True, exist_ok=True)
    with (stack.settings.data / "worker-elsewhere.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    stack.processes.append(process)
