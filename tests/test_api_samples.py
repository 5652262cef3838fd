"""What a job in training answers to its own rows, as the API tells it: by step, over attempts, with the pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import Api, serve
from dashboard_scenes import write_samples
from databases import copied_sqlite
from datasets_for_tests import picture_row
from test_api_job_settings import method_of
from test_api_jobs import submit

from service.jobs import store
from service.jobs.tables import File
from vlm_dft.data.canonical import Row
from vlm_dft.run_dir import RunDir


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Api]:
    directory = tmp_path_factory.mktemp("samples")
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), directory / "vlm-dft.db")
    with serve(directory, url) as running:
        yield running


def file_with_pictures(api: Api, source: Path, count: int) -> tuple[str, list[Row], Path]:
    """A processed file, its rows, and its canonical dataset."""
    counts = {"text_tokens": 12, "supervised_tokens": 2}
    rows = [picture_row(number, source).model_copy(update=counts) for number in range(count)]
    file_id = api.ready_file(api.client(), rows)
    with api.database.read() as s:
        file = s.get(File, file_id)
        assert file is not None
        assert file.dataset_path is not None
        dataset = Path(file.dataset_path)
    shutil.copytree(source / "images", dataset / "images")
    return file_id, rows, dataset


def test_each_answer_is_shown_once_by_step_with_its_picture(api: Api, tmp_path: Path) -> None:
    file_id, rows, dataset = file_with_pictures(api, tmp_path, 2)
    job_id = submit(api, file_id)["id"]
    path, http = f"/v1/fine_tuning/jobs/{job_id}/samples", api.http()
    assert http.get(path).json() == {"object": "job.samples", "job_id": job_id, "steps": [], "data": []}
    first = api.claim(job_id)
    write_samples(RunDir(first.run_path), rows, {0: "first", 5: "lost"})
    with api.database.write() as s:
        assert store.release(s, first, reason="drained")
    second = api.claim(job_id)
    write_samples(RunDir(second.run_path), rows[:1], {5: "second"})

    def told(**query: int) -> list[tuple[Any, ...]]:
        found = http.get(path, params=query).raise_for_status().json()
        assert found["steps"] == [0, 5]
        return [(one["step"], one["row_id"], one["answer"], one["attempt"]) for one in found["data"]]

    names = [row.id for row in rows]
    assert told(step=0) == [(0, names[0], "first", 1), (0, names[1], "first", 1)]
    assert told() == told(step=5) == [(5, names[0], "second", 2), (5, names[1], "lost", 1)]
    assert told(step=4) == []
    sample = http.get(path).json()["data"][1]
    assert (sample["split"], sample["reference"]) == ("train", rows[1].messages[-1].content[0].text)  # pyright: ignore
    (turn,) = sample["prompt"]
    picture, text = turn["content"]
    assert (turn["role"], text["text"], picture["width"]) == ("user", "Which colour is the shape?", 56)

    shown = http.get(picture["image_url"]).raise_for_status()
    file = dataset / rows[1].images[0].image
    assert (shown.content, shown.headers["content-type"]) == (file.read_bytes(), "image/png")
    assert shown.headers["x-content-type-options"] == "nosniff"
    other = http.get(f"{path}/image", params={"sha256": "0" * 64})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "image_not_found")
    file.write_bytes(b"changed")
    assert refused(http, picture["image_url"]) == "image_not_kept"
    api.finish(second)
    api.client().files.delete(file_id)
    assert not dataset.exists()
    first_picture = http.get(path).json()["data"][0]["prompt"][0]["content"][0]
    assert refused(http, first_picture["image_url"]) == "image_not_kept"
    assert len(http.get(path).json()["data"]) == 2, "the answers stay"


def refused(http: httpx.Client, url: str) -> str:
    answer = http.get(url)
    assert answer.status_code == 404
    return answer.json()["error"]["code"]


def test_four_rows_are_answered_unless_the_request_or_fsdp_says_otherwise(api: Api) -> None:
    file_id, client = api.ready_file(api.client()), api.client()

    def sample_rows(**supervised: Any) -> tuple[int, list[str]]:
        job = submit(api, file_id, method=method_of(**supervised))
        events = [event.message for event in client.fine_tuning.jobs.list_events(job["id"]) if event.level == "warn"]
        return job["resolved_config"]["train"]["sample_rows"], events

    assert sample_rows() == (4, [])
    assert sample_rows(hyperparameters={"sample_rows": "auto", "sample_max_new_tokens": 7}) == (4, [])
    assert sample_rows(hyperparameters={"sample_rows": 0}) == (0, [])
    fsdp = {"fsdp": True}
    note = "No rows are answered during this training: with fsdp no process has the whole model"
    assert sample_rows(training=fsdp) == (0, [note])
    assert sample_rows(training=fsdp, hyperparameters={"sample_rows": 0}) == (0, [])
    body = {"model": "tiny", "training_file": file_id}
    method = method_of(training=fsdp, hyperparameters={"sample_rows": 2})
    answer = api.http().post("/v1/fine_tuning/jobs", json=body | {"method": method})
    assert answer.status_code == 400
    assert "sample_rows 2 need the whole model in each process" in answer.json()["error"]["message"]
