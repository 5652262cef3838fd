"""Uploads go to disk whole or not at all; registered directories stay under their roots; options are checked."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import JSONL, Api, serve
from conftest import skip
from databases import copied_sqlite
from throwaway import wait_until

from service.api import expiry
from service.api.uploads import router
from service.api.uploads.joining import joined
from service.jobs.phases import Kind
from service.jobs.tables import File, Job, Upload


@pytest.fixture
def sqlite_url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")


@pytest.fixture
def api(tmp_path: Path, sqlite_url: str) -> Iterator[Api]:
    roots = (tmp_path / "datasets",)
    with serve(tmp_path, sqlite_url, dataset_roots=roots, max_file_bytes=3 * 2**20) as running:
        yield running


def validation_of(api: Api, file_id: str) -> dict[str, Any]:
    with api.database.read() as s:
        return s.query(Job).filter(Job.subject_file == file_id).one().config["validation"]


def test_options_travel_into_the_validation(api: Api) -> None:
    options = {
        "dataset_format": "wethink",
        "max_invalid_fraction": "0.01",
        "system_prompt": "Think → first.",
        "max_length_tokens": "2048",
        "min_pixels": "3136",
        "max_pixels": "50176",
        "data_file": "train.jsonl",
        "model": "tiny-text",
    }
    file = api.client().files.create(file=("t.jsonl", JSONL), purpose="fine-tune", extra_body=options)
    config = validation_of(api, file.id)
    assert (config["format"], config["max_invalid_fraction"], config["max_length_tokens"]) == ("wethink", 0.01, 2048)
    assert (config["system_prompt"], config["pixels"]["max_pixels"]) == ("Think → first.", 50176)
    assert config["tokenizer"].endswith("tiny-text")
    assert config["filename"] == "t.jsonl"
    assert Path(config["source"]).read_bytes() == JSONL


def test_without_a_model_the_first_vision_model_counts(api: Api) -> None:
    file = api.client().files.create(file=("t.jsonl", JSONL), purpose="fine-tune")
    assert validation_of(api, file.id)["tokenizer"].endswith("/tiny")


@pytest.mark.parametrize(
    ("purpose", "options", "param"),
    [
        ("fine-tune", {"max_invalid_fraction": "1.5"}, "max_invalid_fraction"),
        ("fine-tune", {"max_length_tokens": "many"}, "max_length_tokens"),
        ("fine-tune", {"dataset_format": "csv"}, "dataset_format"),
        ("fine-tune", {"model": "gpt-4o"}, "model"),
        ("fine-tune", {"max_invalid_fractoin": "0.1"}, "max_invalid_fractoin"),
        ("batch", {}, "purpose"),
    ],
)
def test_a_wrong_option_keeps_no_bytes(api: Api, purpose: Any, options: dict[str, str], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().files.create(file=("t.jsonl", JSONL), purpose=purpose, extra_body=options)
    assert caught.value.param == param
    assert api.stored_names() == set()
    assert api.count(File) == 0


def test_the_expiry_is_kept_and_obeyed(api: Api) -> None:
    client = api.client()
    expires: Any = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("t.bin", b"x"), purpose="user_data", expires_after=expires)
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("t.bin", b"x"), purpose="user_data", expires_after={**expires, "seconds": 1})
    assert caught.value.param == "expires_after.seconds"
    with api.database.write() as s:
        s.query(File).update({File.expires_at: File.created_at - 1})
    expiry.sweep(api.database, api.settings)
    assert client.files.list().data == []
    assert api.stored_names() == set()


def test_a_file_over_the_limit_is_413_and_leaves_nothing(api: Api) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        api.client().files.create(file=("t.jsonl", b"x" * (3 * 2**20 + 1)), purpose="fine-tune")
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    assert "upload_file_chunked" in caught.value.message
    assert api.stored_names() == set()


def test_a_file_with_a_false_length_over_the_limit_is_413_too(api: Api) -> None:
    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"x" * 2**17

    response = api.http().post("/v1/files", content=body(), headers={"content-type": FORM})
    assert (response.status_code, response.json()["error"]["param"]) == (413, "file")
    assert api.stored_names() == set()


FORM = "multipart/form-data; boundary=b"
FILE_PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n'
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (FILE_PART + PURPOSE, FORM, "cut off"),
        (FILE_PART + b"--b--\r\n", FORM, "purpose is required"),
        (PURPOSE + b"--b--\r\n", FORM, "file is required"),
        (FILE_PART * 2 + b"--b--\r\n", FORM, "given twice"),
        (PURPOSE * 2 + FILE_PART + b"--b--\r\n", FORM, "given twice"),
        (b"garbage", FORM, "multipart"),
        (FILE_PART, "multipart/form-data", "boundary"),
        (b"{}", "application/json", "multipart/form-data"),
        (
            PURPOSE.replace(b"fine-tune", b"\xff\xfe") + FILE_PART + b"--b--\r\n",
            FORM,
            "UTF",
        ),
        (PURPOSE.replace(b"fine-tune", b"x" * 70_000) + b"--b--\r\n", FORM, "longer"),
        (b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n", FORM, "no name"),
    ],
)
def test_a_broken_form_is_a_clear_400(api: Api, body: bytes, content_type: str, words: str) -> None:
    response = api.http().post("/v1/files", content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert api.stored_names() == set()


def test_a_hostile_filename_is_only_a_label(api: Api) -> None:
    name = "../../etc/pass\twd\x00.jsonl"
    file = api.client().files.create(file=(name, JSONL), purpose="user_data")
    assert "/" not in file.filename
    assert api.stored_names() == {file.id}
    content = api.http().get(f"/v1/files/{file.id}/content")
    assert content.content == JSONL


def test_a_client_that_leaves_leaves_nothing(api: Api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 2000000\r\n"
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + FILE_PART[:-3])
        connection.sendall(b"x" * 10_000)
        wait_until(lambda: api.stored_names(), 20, "the upload has begun")
    wait_until(lambda: not api.stored_names(), 20, "the temporary file is gone")
    assert api.count(File) == 0


def test_too_little_free_space_is_507_before_a_byte_is_taken(tmp_path: Path, sqlite_url: str) -> None:
    with serve(tmp_path, sqlite_url, min_free_bytes=2**60) as api:
        with pytest.raises(openai.InternalServerError) as caught:
            api.client().files.create(file=("t.jsonl", JSONL), purpose="fine-tune")
        assert (caught.value.status_code, caught.value.code) == (507, "disk_full")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert api.stored_names() == set()
        assert api.http().get("/readyz").status_code == 503


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    directory = tmp_path / "small"
    directory.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory]).returncode:
        skip("only root may mount a small file system")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def test_a_disk_that_fills_while_uploading_keeps_nothing(tmp_path: Path, sqlite_url: str, small_disk: Path) -> None:
    with serve(tmp_path, sqlite_url, data_dir=small_disk) as api:
        client = api.client()
        kept = client.files.create(file=("small.jsonl", JSONL), purpose="fine-tune")

        def body() -> Iterator[bytes]:  # no length: the server cannot know beforehand
            yield PURPOSE + FILE_PART[:-3]
            for _ in range(48):
                yield os.urandom(2**16)
            yield b"\r\n--b--\r\n"

        headers = {"content-type": FORM}
        response = api.http().post("/v1/files", content=body(), headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (507, "disk_full")
        assert "no space left while writing" in response.json()["error"]["message"]
        assert api.stored_names() == {kept.id}
        upload = client.uploads.create(bytes=1_200_000, filename="a", mime_type="x", purpose="fine-tune")
        part = client.uploads.parts.create(upload.id, data=b"x" * 1_200_000)
        with pytest.raises(openai.InternalServerError) as caught:  # no room for the file beside its parts
            client.uploads.complete(upload.id, part_ids=[part.id])
        assert caught.value.code == "disk_full"
        assert api.stored_names() == {kept.id, part.id}
        assert api.count(File) == 1
        assert client.files.content(kept.id).read() == JSONL


def test_parts_must_be_whole_known_and_in_order(api: Api) -> None:
    client = api.client()
    upload = client.uploads.create(bytes=10, filename="a.bin", mime_type="x", purpose="user_data")
    second = client.uploads.parts.create(upload.id, data=b"67890")
    first = client.uploads.parts.create(upload.id, data=b"12345")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"part_ids": [first.id]}, "5 bytes"),
        ({"part_ids": [first.id, first.id]}, "twice"),
        ({"part_ids": [first.id, "part_x"]}, "no part"),
        ({"part_ids": []}, "at least 1"),
        ({"part_ids": [first.id, second.id], "md5": "0" * 32}, "md5"),
    ]
    for fields, words in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.uploads.complete(upload.id, **fields)
        assert words in caught.value.message
    with pytest.raises(openai.APIStatusError) as too_much:
        client.uploads.parts.create(upload.id, data=b"x")
    assert too_much.value.status_code in (400, 413)
    state = api.http().get(f"/v1/uploads/{upload.id}").json()
    assert [(part["id"], part["bytes"]) for part in state["parts"]] == [(second.id, 5), (first.id, 5)]
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"1234567890"


@pytest.mark.parametrize("first", ["before this one joins", "while this one joins"])
def test_a_completion_that_is_repeated_while_it_runs_answers_the_same_file(
    api: Api, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    client = api.client(max_retries=0)
    upload = client.uploads.create(bytes=5, filename="a.bin", mime_type="x", purpose="user_data")
    part = client.uploads.parts.create(upload.id, data=b"12345")
    others: list[Any] = []

    @contextmanager
    def overtaken(*arguments: Any, **options: Any) -> Iterator[Any]:
        monkeypatch.setattr(router, "joined", joined)
        if first == "before this one joins":
            others.append(client.uploads.complete(upload.id, part_ids=[part.id]))
        with joined(*arguments, **options) as received:
            if not others:
                others.append(client.uploads.complete(upload.id, part_ids=[part.id]))
            yield received

    monkeypatch.setattr(router, "joined", overtaken)
    done = client.uploads.complete(upload.id, part_ids=[part.id])
    assert done.file is not None
    assert done.file.id == others[0].file.id
    assert api.stored_names() == {done.file.id}


def test_an_expired_upload_is_dropped(api: Api) -> None:
    client = api.client()
    upload = client.uploads.create(bytes=10, filename="a.bin", mime_type="x", purpose="user_data")
    client.uploads.parts.create(upload.id, data=b"12345")
    with api.database.write() as s:
        s.query(Upload).update({Upload.expires_at: Upload.created_at - 1})
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"67890")
    expiry.sweep(api.database, api.settings)
    assert api.stored_names() == set()
    assert api.http().get(f"/v1/uploads/{upload.id}").json()["status"] == "expired"


def test_an_upload_larger_than_allowed_is_refused_at_once(tmp_path: Path, sqlite_url: str) -> None:
    with serve(tmp_path, sqlite_url, max_upload_bytes=1000) as api, pytest.raises(openai.APIStatusError) as caught:
        api.client().uploads.create(bytes=1001, filename="a", mime_type="x", purpose="fine-tune")
    assert (caught.value.status_code, caught.value.param) == (413, "bytes")


def test_orphaned_bytes_are_swept_and_live_ones_are_not(api: Api) -> None:
    client = api.client()
    kept = client.files.create(file=("a.bin", b"x"), purpose="user_data").id
    upload = client.uploads.create(bytes=10, filename="a.bin", mime_type="x", purpose="user_data")
    part = client.uploads.parts.create(upload.id, data=b"12345").id
    orphan, cut_off, fresh = "file-orphan", "0123.incoming", "file-fresh"
    for name in (orphan, cut_off, fresh):
        (api.settings.files_dir / name).write_bytes(b"x")
    old = time.time() - 2 * expiry.ORPHAN_SECONDS
    for name in (kept, part, orphan, cut_off):
        os.utime(api.settings.files_dir / name, (old, old))
    expiry.sweep(api.database, api.settings)
    assert api.stored_names() == {kept, part, fresh}


def test_a_directory_under_a_root_is_registered_and_never_deleted(api: Api, tmp_path: Path) -> None:
    directory = tmp_path / "datasets" / "wethink"
    directory.mkdir(parents=True)
    (directory / "train.jsonl").write_bytes(JSONL)
    for path in (str(directory), "wethink"):
        response = api.http().post("/v1/files/register", json={"path": path, "max_invalid_fraction": 0.1})
        file = response.json()
        assert (response.status_code, file["filename"], file["bytes"]) == (200, "wethink", len(JSONL))
        assert validation_of(api, file["id"])["source"] == str(directory)
        assert api.http().get(f"/v1/files/{file['id']}/content").status_code == 400
        assert api.client().files.delete(file["id"]).deleted
    assert (directory / "train.jsonl").read_bytes() == JSONL


def test_nothing_outside_the_roots_is_registered(api: Api, tmp_path: Path) -> None:
    root = tmp_path / "datasets"
    (root / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "file").write_text("x")
    for path in ("/etc", "../outside", str(root / ".." / "outside"), str(root / "link"), "link", "file", "absent", ""):
        response = api.http().post("/v1/files/register", json={"path": path})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "path"), path
    assert api.count(Job) == 0


def test_without_roots_the_way_to_allow_them_is_told(tmp_path: Path, sqlite_url: str) -> None:
    with serve(tmp_path, sqlite_url) as api:
        response = api.http().post("/v1/files/register", json={"path": "/etc"})
        assert "VLM_DFT_DATASET_ROOTS" in response.json()["error"]["message"]


def test_a_file_that_a_job_needs_is_not_deleted(api: Api) -> None:
    client = api.client()
    file_id = api.ready_file(client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.delete(file_id)
    assert caught.value.code == "file_in_use"
    client.fine_tuning.jobs.cancel(job.id)
    with api.database.read() as s:
        row = s.get(File, file_id)
        assert row is not None
        dataset = Path(row.dataset_path or "")
    assert dataset.is_dir()
    client.files.delete(file_id)
    assert not dataset.exists()
    assert api.stored_names() == set()


def test_an_unfinished_validation_shows_its_place_and_a_finished_one_its_report(api: Api) -> None:
    client = api.client()
    file_id = client.files.create(file=("t.jsonl", JSONL), purpose="fine-tune").id
    state = api.http().get(f"/v1/files/{file_id}").json()
    assert (state["validation"]["phase"], state["validation"]["queue"]["position"]) == ("queued", 1)
    assert state["validation"]["queue"]["blocked_reason"] == "no_worker_alive"
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file_id)
    assert caught.value.code == "file_not_processed"
    assert api.count(Job, Job.kind == Kind.FINE_TUNING) == 0
    api.settle(file_id)
    state = api.http().get(f"/v1/files/{file_id}").json()
    assert (state["validation"], state["validation_report"]["rows"]) == (None, 10)
    assert api.http().get("/v1/files").json()["data"][0]["validation_report"] is None
