"""A reproducibility bundle is trained once more, gives the same numbers, and says so when it does not."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import IO

import pytest
from api_server import serve, text_row, write_dataset
from databases import copied_sqlite
from datasets_for_tests import sums_dataset
from throwaway import run_python, wait_until
from typer.testing import CliRunner

from cli.main import app
from service.api.reports.bundle import _add_dataset, write_bundle
from service.errors import InvalidStateError
from service.jobs.tables import Attempt, Job
from vlm_dft import rerun
from vlm_dft.config import RunConfig, TrainConfig
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.run_dir import RunDir

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def bundle(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a real training."""
    directory = tmp_path_factory.mktemp("bundle")
    dataset, held_out = (sums_dataset(directory / name, 6) for name in ("rows", "held-out"))
    train = TrainConfig(
        model=str(tiny_qwen2), dataset=dataset, validation_dataset=held_out, precision="fp32", batch_size=2, max_steps=3
    )
    config = RunConfig(run_id="ftjob-x", train=train)
    run = RunDir(directory / "attempt-1")
    run.create(config)
    done = run_python("-m", "vlm_dft", str(run.path), env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    result = run.read_result()
    assert result is not None
    job = Job(
        id="ftjob-x",
        phase="succeeded",
        request={"model": "tiny"},
        config=config.model_dump(mode="json"),
        result=result.model_dump(mode="json"),
    )
    path = directory / "bundle.tar.gz"
    with path.open("wb") as file:
        write_bundle(file, job, [Attempt(attempt=1, run_path=str(run.path))], images=False)
    return path


def test_rerun_gives_every_number_and_the_same_model_again(bundle: Path, tiny_qwen2: Path) -> None:
    done = run_python("-m", "vlm_dft.rerun", str(bundle), "--model", str(tiny_qwen2), env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every number is the same, and so is the model" in done.stdout
    assert "note:" not in done.stdout
    unpacked = bundle.with_name("bundle-unpacked")
    run = RunDir(unpacked / "rerun")
    assert list(rerun._differences(unpacked, run)) == []
    _change_a_loss(unpacked / "metrics.jsonl")
    (line,) = rerun._differences(unpacked, run)
    assert line.startswith("step 2: nll was 1.5 and is ")


def _change_a_loss(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(line for line in lines if line["step"] == 2)["nll"] = 1.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_another_model_is_refused(bundle: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with tarfile.open(bundle) as archive:
        archive.extractall(tmp_path, filter="data")
    with pytest.raises(ModelError, match="is not the model it was: sha256"):
        rerun.rerun(tmp_path, tiny_llama, {})


def test_what_is_installed_otherwise_is_named(bundle: Path) -> None:
    with tarfile.open(bundle) as archive:
        recorded = rerun.Environment.model_validate_json(archive.extractfile("environment.json").read())
        pins = archive.extractfile("requirements.txt").read().decode()
    assert f"torch=={recorded.packages['torch']}\n" in pins
    older = recorded.model_copy(update={"packages": {**recorded.packages, "torch": "2.0", "gone": "1"}})
    found = rerun.environment_differences(older)
    assert found == [f"torch was 2.0 and is {recorded.packages['torch']}", "gone was 1 and is not installed"]


def test_packages_are_those_that_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = tmp_path / "torch-0.1.dist-info"
    hidden.mkdir()
    (hidden / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n")
    imported = rerun.installed_packages()["torch"]
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert rerun.installed_packages()["torch"] == imported != "0.1"


def test_what_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="is no bundle"):
        rerun._unpacked(tmp_path)
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(b"not an archive")
    assert rerun.main([str(torn)]) == 1
    (tmp_path / "config.json").write_text("{}")
    assert rerun.main([str(tmp_path)]) == 1  # no environment.json
    (tmp_path / "environment.json").write_text('{"python": 3}')
    assert rerun.main([str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "torn.tar.gz is no bundle" in told
    assert "No such file or directory" in told
    assert "environment.json: python: " in told


def test_numbers_of_a_probe_are_not_missed_in_a_rerun_which_has_none(tmp_path: Path) -> None:
    """A bundle's metrics hold what the accuracy probe measured, before the first step as well."""
    lines = [{"step": 0, "probe_value": 0.5}, {"step": 1, "nll": 1.5, "probe_value": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rerun._steps(tmp_path / "metrics.jsonl") == {1: {"nll": 1.5}}


def test_bundle_holds_the_pictures_that_links_lead_to(tmp_path: Path) -> None:
    """And names no owner: an archive with links out of itself could not be unpacked anywhere."""
    picture = tmp_path / "elsewhere.png"
    picture.write_bytes(b"a picture")
    dataset = tmp_path / "dataset"
    write_dataset(dataset, [text_row(1, images=[(28, 28)])], None)
    manifest = json.loads((dataset / "dataset.json").read_bytes()) | {"image_root": str(tmp_path / "pictures")}
    (dataset / "dataset.json").write_text(json.dumps(manifest))
    (tmp_path / "pictures").mkdir()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        with pytest.raises(InvalidStateError, match=r"x\.png"):
            _add_dataset(archive, "data/gone", dataset, images=True)
        (tmp_path / "pictures" / "x.png").symlink_to(picture)
        _add_dataset(archive, "data/train", dataset, images=True)
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        assert archive.extractfile("data/train/x.png").read() == b"a picture"
        assert {member.uname for member in archive} == {""}


def test_a_job_that_has_succeeded_has_a_bundle(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = request.getfixturevalue("_sqlite_template")
    files: list[IO[bytes]] = []
    nameless = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **where: files.append(nameless(**where)) or files[-1])
    with serve(tmp_path, copied_sqlite(template, tmp_path / "vlm-dft.db")) as api, api.http() as http:
        file_id = api.ready_file(api.client())
        job_id = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()["id"]
        early = http.get(f"/v1/fine_tuning/jobs/{job_id}/bundle").json()["error"]
        assert (early["code"], "only a job that has succeeded" in early["message"]) == ("invalid_state", True)
        claim = api.claim(job_id)
        api.finish(claim)
        assert "older version" in http.get(f"/v1/fine_tuning/jobs/{job_id}/bundle").json()["error"]["message"]
        (claim.run_path / "environment.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}}))
        answer = http.get(f"/v1/fine_tuning/jobs/{job_id}/bundle")
        assert answer.headers["content-type"] == "application/gzip"
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            names = set(archive.getnames())
            assert json.load(archive.extractfile("config.json"))["run_id"] == job_id
        assert {"README.md", "environment.json", "metrics.jsonl", "data/train/rows.jsonl"} <= names
        assert list(api.settings.data.glob("tmp*")) == []
        monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
        saved = CliRunner().invoke(app, ["bundle", job_id, "--to", str(tmp_path / "b.tar.gz"), "--json"])
        assert json.loads(saved.stdout)["bytes"] == (tmp_path / "b.tar.gz").stat().st_size
        with tarfile.open(tmp_path / "b.tar.gz") as archive:
            assert set(archive.getnames()) == names
        refused = CliRunner().invoke(app, ["bundle", job_id, "--to", str(tmp_path / "none" / "b")])
        assert (refused.exit_code, "cannot be written" in refused.stderr) == (1, True)
        wait_until(lambda: all(file.closed for file in files), 10, "what nobody reads to its end is closed, too")
