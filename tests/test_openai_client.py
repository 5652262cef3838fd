"""The stock openai client, lenient and strict, against the real API: what it calls works as it does at OpenAI's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import JSONL, Api, serve
from store_samples import step_metrics

from service.jobs import store
from service.jobs.tables import Job
from vlm_dft.run_dir import Checkpoint


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Api]:
    """On SQLite and on PostgreSQL."""
    with serve(tmp_path, database_url) as running:
        yield running


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    """Strict: it accepts nothing that the lenient one refuses."""
    return api.client(strict=True)


def create_job(client: openai.OpenAI, file_id: str, **fields: Any) -> Any:
    method = {"type": "supervised", "supervised": {"objective": "dft", "hyperparameters": {"batch_size": 4}}}
    return client.fine_tuning.jobs.create(model="tiny", training_file=file_id, **({"method": method} | fields))


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_the_main_job_from_upload_to_model(api: Api, strict: bool) -> None:
    client = api.client(strict=strict)
    file = client.files.create(file=("train.jsonl", JSONL), purpose="fine-tune")
    assert (file.status, file.bytes, file.filename) == ("uploaded", len(JSONL), "train.jsonl")
    api.settle(file.id)
    assert client.files.wait_for_processing(file.id, poll_interval=0.05).status == "processed"

    job = create_job(client, file.id, suffix="geo", seed=7, metadata={"team": "x"})
    assert (job.status, job.seed, job.metadata, job.organization_id) == ("queued", 7, {"team": "x"}, "org-vlm-dft")
    assert job.method.type == "supervised"
    assert job.hyperparameters.batch_size == 4
    assert (job.queue["position"], job.queue["ahead"], job.phase, job.objective) == (1, 0, "queued", "dft")
    claim = api.claim(job.id)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    with api.database.write() as s:
        store.record_metrics(s, claim, [step_metrics(1), step_metrics(2)])
        store.record_checkpoint(s, claim, Checkpoint(claim.run_path / "checkpoints" / "step-000002", 2, {"nll": 1.5}))
    api.finish(claim)

    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.trained_tokens, done.error) == ("succeeded", 1234, None)
    assert done.fine_tuned_model == f"ft:tiny:default:geo:{job.id[-8:]}"
    events = client.fine_tuning.jobs.list_events(job.id, limit=3)
    assert events.data[0].message == "The job has successfully completed"
    assert [event.seq for event in events] == sorted((event.seq for event in events), reverse=True)  # every page
    metrics = [event for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    assert [event.data["train_loss"] for event in metrics] == [1.5, 1.5]
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert checkpoint.fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-2"
    assert (checkpoint.step_number, checkpoint.metrics.train_loss) == (2, 1.5)
    assert client.models.retrieve(done.fine_tuned_model).owned_by == "default"
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.delete(done.fine_tuned_model).deleted
    assert not (claim.run_path / "export").exists()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(done.fine_tuned_model)


def test_a_failed_job_tells_code_message_and_hint(api: Api, client: openai.OpenAI) -> None:
    from vlm_dft.results import ErrorRecord

    job = create_job(client, api.ready_file(client))
    error = ErrorRecord(code="gpu_oom", message="full", hint="use LoRA", category="user")
    claim = api.claim(job.id)
    with api.database.write() as s:
        assert store.fail(s, claim, error, None)
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message, failed.error.hint) == ("gpu_oom", "full", "use LoRA")
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "error"


def test_a_waiting_job_is_cancelled_at_once_and_an_ended_one_is_not(api: Api, client: openai.OpenAI) -> None:
    file_id = api.ready_file(client)
    job = create_job(client, file_id)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    running = create_job(client, file_id)
    claim = api.claim(running.id)
    asked = client.fine_tuning.jobs.cancel(running.id)
    assert (asked.status, asked.phase) == ("running", "cancelling")
    with api.database.write() as s:
        assert store.cancelled(s, claim)
    ended = create_job(client, file_id)
    api.finish(api.claim(ended.id))
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.cancel(ended.id)
    assert caught.value.code == "invalid_state"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_lists_are_paged_and_filtered_by_metadata(api: Api, client: openai.OpenAI) -> None:
    file_id = api.ready_file(client)
    made = [create_job(client, file_id, metadata={"n": str(n), "odd": str(n % 2)}).id for n in range(5)]
    plain = create_job(client, file_id).id
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == [plain, *reversed(made)]
    odd = client.fine_tuning.jobs.list(limit=1, metadata={"odd": "1"})
    assert [job.id for job in odd] == [made[3], made[1]]
    page = client.fine_tuning.jobs.list(limit=2)
    assert page.has_more
    assert page.model_extra is not None
    assert (page.model_extra["first_id"], page.model_extra["last_id"]) == (plain, made[4])
    without = client.fine_tuning.jobs.list(extra_query={"metadata": "null"})
    assert [job.id for job in without] == [plain]


def test_files_are_listed_read_and_deleted(api: Api, client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.bin", bytes([n])), purpose="user_data").id for n in range(3)]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(order="asc", purpose="user_data")] == made
    assert client.files.list(purpose="fine-tune").data == []
    assert client.files.retrieve(made[1]).status == "processed"
    assert client.files.content(made[1]).read() == b"\x01"
    assert client.files.delete(made[1]).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(made[1])
    assert caught.value.code == "file_not_found"
    assert api.stored_names() == {made[0], made[2]}


def test_a_refused_file_says_why_and_cannot_be_trained_on(api: Api, client: openai.OpenAI) -> None:
    file = client.files.create(file=("train.jsonl", b"not json"), purpose="fine-tune")
    api.refuse(file.id, "1 of 1 rows are invalid")
    waited = client.files.wait_for_processing(file.id, poll_interval=0.05)
    assert (waited.status, waited.status_details) == ("error", "1 of 1 rows are invalid")
    with pytest.raises(openai.BadRequestError) as caught:
        create_job(client, file.id)
    assert (caught.value.param, caught.value.code) == ("training_file", "invalid_training_file")
    assert api.count(Job, Job.kind == "fine_tuning") == 0


def test_upload_file_chunked_makes_a_file(api: Api, client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_bytes(JSONL * 50)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=20_000, md5=md5
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == path.read_bytes()
    assert api.stored_names() == {upload.file.id}  # no part is left
    again = client.uploads.complete(upload.id, part_ids=["part_x"])
    assert again.file is not None
    assert again.file.id == upload.file.id


def test_a_cancelled_upload_leaves_nothing(api: Api, client: openai.OpenAI) -> None:
    upload = client.uploads.create(bytes=10, filename="a.jsonl", mime_type="x", purpose="fine-tune")
    client.uploads.parts.create(upload.id, data=b"12345")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert api.stored_names() == set()
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.parts.create(upload.id, data=b"12345")
    assert caught.value.code == "invalid_state"


def test_a_model_id_may_hold_a_slash(tmp_path: Path, database_url: str) -> None:
    with serve(tmp_path, database_url, hub_models=True) as api:
        model = api.client(strict=True).models.retrieve("Qwen/Qwen2.5-VL-3B-Instruct")
        assert model.id == "qwen2.5-vl-3b-instruct"
        with pytest.raises(openai.NotFoundError) as caught:
            api.client().models.retrieve("Qwen/Nothing")
        assert caught.value.code == "model_not_found"


def test_the_dft_alias_is_echoed_in_the_supervised_form(api: Api) -> None:
    client = api.client(strict=True)
    method: Any = {"type": "dft", "dft": {"weight_floor": 0.1, "hyperparameters": {"learning_rate_multiplier": 0.3}}}
    job = create_job(client, api.ready_file(client), method=method)
    assert job.method.type == "supervised"
    assert job.method.supervised.objective == "dft"
    assert job.method.supervised.dft == {"weight_floor": 0.1}
    assert job.hyperparameters.learning_rate_multiplier == 0.3
    assert job.resolved_config["train"]["learning_rate"] == pytest.approx(1.5e-5)
