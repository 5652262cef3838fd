"""Nothing that is sent breaks anything: every hostile file and request ends in a typed error, and costs little."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_process import ApiProcess, api_process
from data_samples import data_uri, image_part, jsonl, openai_row, picture, validated
from hostile_files import FILES
from hostile_requests import REQUESTS
from sqlalchemy import select

from service.jobs.database import Database
from service.jobs.tables import File
from service.redaction import redacted
from vlm_dft.config import JudgeConfig, PixelConfig, RunConfig, ValidationConfig, ValidationLimits
from vlm_dft.data.decoder import DecoderLimits, decoders
from vlm_dft.data.problems import RowError
from vlm_dft.data.validation import validate
from vlm_dft.errors import ModelError
from vlm_dft.model_files import adapter_base, inspect
from vlm_dft.run_dir import RunDir

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits are set and measured on Linux only")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[ApiProcess]:
    directory = tmp_path_factory.mktemp("hostile")
    roots = directory / "roots"
    roots.mkdir()
    (roots / "link").symlink_to("/etc")
    environment = {"VLM_DFT_MAX_FILE_BYTES": str(8 * 2**20), "VLM_DFT_DATASET_ROOTS": json.dumps([str(roots)])}
    with api_process(directory, request.getfixturevalue("_sqlite_template"), **environment) as running:
        yield running


def test_the_corpus_is_large_enough() -> None:
    assert len(FILES) >= 60
    assert len(REQUESTS) >= 50


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    data, code = FILES[name]
    report = validated(tmp_path, data).report
    assert [problem.code for problem in report.problems] == [code]
    assert report.dataset is None or code == "row_not_object"
    assert len(report.problems[0].reason) < 500


@linux
def test_the_whole_corpus_is_answered_in_one_shape_with_little_memory(api: ApiProcess) -> None:
    """Uploads are taken as they are, for validation to judge; requests end in their error. Nothing is left behind."""
    with httpx.Client(base_url=api.url, timeout=30) as client:
        for name, (data, _) in FILES.items():
            answer = client.post("/v1/files", files={"file": (f"../../{name}", data)}, data={"purpose": "fine-tune"})
            assert answer.status_code == 200, (name, answer.text)
            assert "/" not in answer.json()["filename"]
        for hostile in REQUESTS:
            answer = client.request(hostile.method, hostile.path, content=hostile.body(), headers=hostile.headers)
            assert answer.status_code == hostile.status, (hostile.name, answer.status_code, answer.text[:300])
            error = answer.json()["error"]
            assert error["code"] == hostile.code, (hostile.name, error)
            assert {"message", "type", "param", "code"} <= set(error)
            assert len(error["message"]) < 1000, hostile.name
            assert answer.headers["x-request-id"]
            assert answer.headers["x-should-retry"] == "false"
    print(f"peak of the API: {api.peak_mib:.0f} MiB")
    assert api.peak_mib < 300
    database = Database(api.settings.resolved_database_url)
    with database.read() as s:
        kept = {Path(path).name for path in s.scalars(select(File.path))}
    database.close()
    assert {path.name for path in api.settings.files_dir.iterdir()} == kept
    assert "Traceback" not in api.log.read_text()


@linux
def test_a_picture_is_decoded_by_a_process_that_may_break(tmp_path: Path) -> None:
    good = picture(64, 64)
    with decoders(ValidationLimits(), PixelConfig(), DecoderLimits(wall_seconds=20)) as pool:
        assert (pool.inspect(good, "a").width, pool.inspect(good, "a").height) == (64, 64)
        first = pool._idle.get_nowait()
        first._process.send_signal(signal.SIGSEGV)
        first._process.wait()
        pool._idle.put(first)
        with pytest.raises(RowError, match="broke its decoder") as caught:
            pool.inspect(good, "messages.0")
        assert (caught.value.field, caught.value.reason_code) == ("messages.0", "image_undecodable")
        with pytest.raises(RowError, match="pixels"):
            pool.inspect(picture(8600, 8600, mode="1", optimize=True), "a")
        threads = [threading.Thread(target=pool.inspect, args=(good, "a")) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with decoders(ValidationLimits(), PixelConfig(), DecoderLimits(wall_seconds=0.0)) as pool:
        with pytest.raises(RowError) as caught:
            pool.inspect(good, "a")
        assert caught.value.reason_code == "image_takes_too_long"


@linux
def test_a_picture_may_use_so_much_processor_time_and_no_more() -> None:
    code = "from vlm_dft.data.decoder import _limit_cpu; _limit_cpu(0)\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGXCPU


@linux
def test_validation_in_the_service_decodes_elsewhere(tmp_path: Path) -> None:
    """The bomb costs its row; the rows beside it are counted."""
    bomb = openai_row([image_part(data_uri(picture(8600, 8600, mode="1", optimize=True)))], "Black.")
    good = openai_row([image_part(data_uri(picture()))], "A circle.")
    (tmp_path / "upload").write_bytes(jsonl(good, bomb, good))
    run = RunDir(tmp_path / "run")
    config = ValidationConfig(source=tmp_path / "upload", filename="rows.jsonl", max_invalid_fraction=0.5)
    run.create(RunConfig(run_id="file-1", validation=config))
    report = validate(config, run, isolated=True)
    assert (report.valid, [problem.code for problem in report.problems]) == (2, ["image_too_many_pixels"])
    assert report.problems[0].field == "messages.0.content.0.image_url.url"


MODELS = {
    "weights as pickles": ({"model_type": "qwen2"}, ["pytorch_model.bin"], "can run code"),
    "code of its own": ({"model_type": "qwen2", "auto_map": {"AutoModel": "evil.Model"}}, [], "run code of its own"),
    "an unknown architecture": ({"model_type": "evil"}, ["model.safetensors"], "supported are"),
    "another class": ({"model_type": "qwen2", "architectures": ["Evil"]}, ["model.safetensors"], "only"),
    "no weights": ({"model_type": "qwen2"}, [], "holds no weights"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_is_never_loaded(tmp_path: Path, name: str) -> None:
    config, files, words = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ModelError, match=words):
        inspect(tmp_path)


def test_a_hostile_adapter_is_never_loaded(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "/m", "auto_mapping": {"parent_library": "evil"}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="run code of its own"):
        adapter_base(tmp_path)


def test_nothing_asks_for_remote_code_or_unpickles_what_users_send() -> None:
    source = Path(__file__).parent.parent
    for path in [*source.glob("vlm_dft/**/*.py"), *source.glob("service/**/*.py"), *source.glob("worker/**/*.py")]:
        text = path.read_text()
        assert not re.search(r"trust_remote_code\s*=\s*True|pickle\.loads?\(|weights_only\s*=\s*False", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


SECRETS = [
    "vdft_cyzve1w8i9hf2sm0gak0b33s2cpxffhx_3263a55c",
    "hf_" + "aB3" * 11,
    "sk-" + "proj0aB3" * 4,
    "whsec_" + "aB3+" * 8,
    "AKIA" + "ABCD1234" * 2,
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_not_read_in_a_text(secret: str) -> None:
    text = f'the key "{secret}" was refused; Bearer {secret}'
    assert secret not in redacted(text)
    assert "was refused" in redacted(text)


def test_passwords_in_urls_are_not_read_and_urls_still_are() -> None:
    text = "cannot reach postgresql+psycopg://user:pa55@db.example:5432/jobs or redis://:pa55@broker/0"
    assert (
        redacted(text) == "cannot reach postgresql+psycopg://***:***@db.example:5432/jobs or redis://***:***@broker/0"
    )
    plain = "see https://example.com/a:b@c and vdft_ab12..."
    assert redacted(plain) == plain


@linux
def test_a_key_in_the_wrong_place_is_not_repeated(api: ApiProcess) -> None:
    body = {"model": "tiny", "training_file": "f", "seed": SECRETS[0]}
    answer = httpx.post(f"{api.url}/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 400
    assert SECRETS[0] not in answer.text
    assert SECRETS[0] not in api.log.read_text()


def test_nothing_that_a_job_stores_or_shows_has_a_place_for_a_secret() -> None:
    """Keys reach a trainer by its environment alone; a judge's address may not hold a password."""
    schema = json.dumps(RunConfig.model_json_schema())
    names = set(re.findall(r'"(\w+)": \{', schema))
    assert "base_url" in names
    assert not [name for name in names if re.search(r"(^|_)(key|token|secret|password)$", name)]
    with pytest.raises(ValueError, match="base_url"):
        JudgeConfig(base_url="https://user:pa55@judge.example/v1", model="j")
