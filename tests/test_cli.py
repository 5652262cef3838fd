"""The vlm-dft command as a user types it, against a running service with the real trainer."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_service import COMMAND, RunningService, ended, extension
from throwaway import wait_until
from uploads_for_tests import wethink_archive
from vlmevalkit_fixtures import wemath_benchmark

from vlm_dft.tiny import build_tiny_vlm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

MATHVISION_ITEM = {
    "id": "1",
    "question": "Which colour is the disc?\n<image1>",
    "options": [],
    "answer": "red",
    "solution": None,
    "level": 1,
    "subject": "counting",
    "image": "images/0.png",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli")
    build_tiny_vlm(directory / "data" / "models" / "base" / "tiny-vl")
    archive = wethink_archive(directory / "train.tar.gz", rows=8)
    benchmark = directory / "data" / "benchmarks" / "mathvision"
    benchmark.mkdir(parents=True)
    (benchmark / "test.jsonl").write_text(json.dumps(MATHVISION_ITEM) + "\n")
    subprocess.run(["tar", "-xzf", archive, "-C", benchmark, "images"], check=True)
    wemath_benchmark(benchmark.parent / "wemath")
    return directory


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[RunningService]:
    with RunningService(directory) as running:
        yield running


def test_submit_follows_a_job_to_its_model_and_scores(service: RunningService, directory: Path) -> None:
    # Of an objective that compares with the base model, which the trainer computes first.
    options = ["--model", "tiny-vl", "--objective", "psft", "--set", "psft.clip_ratio_high=0.3", "--lora"]
    options += ["--suffix", "cli", "--set", "training.patch_cache=true"]
    numbers = ["--set", "batch_size=4", "--set", "learning_rate=1e-3", "--benchmarks", "mathvision"]
    numbers += ["--set", "sample_rows=1", "--set", "sample_max_new_tokens=8"]
    answer = service.run("submit", str(directory / "train.tar.gz"), *options, *numbers)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "8 valid of 8 rows, 8 images" in answer.stdout
    assert re.search(r"Phase: \w+", answer.stdout)  # which ones depends on when the worker looked
    assert "| mathvision" in answer.stdout
    job_id = re.search(r"ftjob-\w+", answer.stdout)[0]
    tuned = re.search(r"ft:tiny-vl:default:cli:\w+", answer.stdout)[0]

    assert job_id in service.run_here("jobs").stdout
    assert "step" in service.run_here("watch", job_id).stdout
    assert "succeeded" in service.run_here("logs", job_id).stdout
    for step in (0, 2):
        assert re.search(
            rf"train +all +{step} +\d+ +[ ▁▂▃▄▅▆▇█]+ +\d+% +\d+%", service.run_here("histograms", job_id).stdout
        )
    said = service.run_here("samples", job_id).stdout
    assert re.search(r"train row data.jsonl:1\n(.*\n)*  user: \[images/\w+\.\w+, \d+ x \d+\]", said)
    assert re.search(r"  reference: .*\n(.*\n)*  step 0 \(\d+ tokens.*\n(.*\n)*  step 2 \(\d+ tokens", said)
    assert "rows were answered at the steps: 0, 2\n" in said
    assert "step 2 (" not in service.run_here("samples", job_id, "--step", "0").stdout
    assert tuned in service.run_here("models").stdout
    refused = service.run_here("cancel", job_id)
    assert refused.returncode == 1
    assert "invalid_state" in refused.stderr

    scored = service.run("eval", tuned, "--benchmarks", "mathvision", "--max-new-tokens", "4")
    assert scored.returncode == 0, scored.stderr
    assert "native-rules/v1" in scored.stdout
    assert service.run_here("models", "delete", tuned).returncode == 0
    assert tuned not in service.run_here("models").stdout


def test_paused_job_lets_another_train_and_ends_with_the_same_weights(service: RunningService, directory: Path) -> None:
    """The real trainer on the only worker: its twin trains from start to end while the job is paused."""
    client = service.client(strict=True)
    jobs = client.fine_tuning.jobs
    numbers = ["--set", "max_steps=60", "--set", "n_epochs=100", "--set", "batch_size=4", "--seed", "7", "--no-watch"]
    numbers += ["--set", "sample_rows=0"]
    answer = service.run("submit", str(directory / "train.tar.gz"), "--model", "tiny-vl", *numbers, "--no-start")
    assert "not_started: vlm-dft start" in answer.stdout, answer.stdout + answer.stderr
    paused = re.search(r"ftjob-\w+", answer.stdout)[0]
    assert f"{paused} queued, position 1" in service.run_here("start", paused).stdout

    def job(job_id: str) -> dict[str, Any]:
        return extension(client, f"/fine_tuning/jobs/{job_id}")

    wait_until(lambda: (job(paused)["progress"] or {"step": 0})["step"] >= 2, 90, "a second step", interval=0.05)
    assert jobs.pause(paused).phase == "pausing"
    wait_until(lambda: job(paused)["phase"] == "paused", 60, "the device is free", interval=0.1)
    twin = re.search(r"(ftjob-\w+) queued", service.run_here("clone", paused, "--set", "auto_start=true").stdout)[1]
    alone = wait_until(lambda: ended(client, twin), 120, "the twin ends", interval=0.3)
    assert service.run_here("resume", paused).returncode == 0
    resumed = wait_until(lambda: ended(client, paused), 120, "the resumed job ends", interval=0.3)
    assert (alone.status, resumed.status) == ("succeeded", "succeeded")
    assert resumed.result["model_sha256"] == alone.result["model_sha256"]
    assert resumed.trained_tokens == alone.trained_tokens
    first, second = extension(client, f"/fine_tuning/jobs/{paused}/attempts")["data"]
    assert first["exit_reason"] == "paused"
    assert 2 <= second["resumed_from_step"] < 60
    assert job(twin)["cloned_from"] == paused
    assert not any(worker["busy"] for worker in extension(client, "/workers")["data"]), "the device is free"


def test_refused_file_is_told_row_by_row(service: RunningService, directory: Path) -> None:
    bad = directory / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "2 + 2?"}]}\nnot json\n')
    answer = service.run("submit", str(bad), "--model", "tiny-vl")
    assert answer.returncode == 1
    assert "bad.jsonl:1" in answer.stderr
    assert "bad.jsonl:2" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["submit", "nowhere.jsonl", "--model", "tiny-vl"], 2, "neither a file, a directory nor a file id"),
        (["submit", "file-unknown", "--model", "tiny-vl"], 1, "file-unknown"),
        (["submit", "file-unknown", "--model", "nope"], 1, "nope"),
        (["submit", "file-unknown", "--model", "tiny-vl", "--set", "batch_size"], 2, "KEY=VALUE"),
        (["submit", "file-unknown", "--model", "tiny-vl", "--set", "objective.alpha=2"], 2, "one value (dft)"),
        (["watch", "ftjob-unknown"], 1, "job_not_found"),
        (["eval", "nope", "--benchmarks", "mathvision"], 1, "nope"),
        (["eval", "tiny-vl", "--benchmarks", "nope"], 1, "nope"),
        (["eval", "tiny-vl", "--benchmarks", "mathvision", "--judge"], 1, "VLM_DFT_JUDGE_BASE_URL"),
        (["eval", "tiny-vl", "--benchmarks", "mathvision", "--backend", "other"], 2, "or both, not 'other'"),
        (["eval", "tiny-vl", "--benchmarks", "mathvision", "--backend", "both"], 1, "without a judge"),
    ],
)
def test_mistake_is_named_with_its_exit_code(
    service: RunningService, arguments: list[str], exit_code: int, words: str
) -> None:
    answer = service.run_here(*arguments)
    assert answer.returncode == exit_code, answer.stderr
    assert words in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_backend_that_is_not_there_fails_the_job_and_says_what_to_install(service: RunningService) -> None:
    answer = service.run("eval", "tiny-vl", "--benchmarks", "wemath", "--backend", "both", "--max-new-tokens", "2")
    assert answer.returncode == 1
    assert "VLM_DFT_VLMEVAL_PYTHON and VLM_DFT_VLMEVAL_ROOT are not set" in answer.stderr
    assert "pip install" in answer.stderr
    assert "Scored by native-rules/v1" in answer.stdout, "the other one is scored all the same"


def test_unreachable_service_has_its_own_exit_code(service: RunningService) -> None:
    environment = service.environment | {"VLM_DFT_URL": "http://127.0.0.1:9/v1"}
    answer = subprocess.run([COMMAND, "jobs"], env=environment, capture_output=True, text=True)
    assert answer.returncode == 3
    assert "vlm-dft up" in answer.stderr


def test_doctor_says_what_is_missing_and_how_to_get_it(service: RunningService) -> None:
    answer = service.run("doctor")
    assert answer.returncode == 0, answer.stdout
    assert "ok      torch" in answer.stdout
    assert "absent  broker" in answer.stdout
    assert "VLM_DFT_BROKER_URL" in answer.stdout
    assert "base models: tiny-vl" in answer.stdout
    assert "ok      service" in answer.stdout
    found = json.loads(service.run_here("doctor", "--json").stdout)
    assert (found["ok"], found["data"][0]["name"]) == (True, "python")


def test_train_needs_no_service(directory: Path, tmp_path: Path) -> None:
    model = directory / "data" / "models" / "base" / "tiny-vl"
    command = [COMMAND, "train", directory / "train.tar.gz", "--model", model, "--run-dir", tmp_path / "run"]
    numbers = ["--set", "max_steps=2", "--set", "batch_size=4", "--set", "objective.weight_floor=0.1"]
    answer = subprocess.run([*command, *numbers, "--json"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "8 valid of 8 rows" in answer.stderr
    assert json.loads(answer.stdout)["train"]["steps"] == 2
    assert (tmp_path / "run" / "export" / "config.json").exists()
    wrong = subprocess.run([*command, "--set", "batch_size=-1"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "train.batch_size" in wrong.stderr


def test_compare_trains_arms_and_shows_them_side_by_side(service: RunningService, directory: Path) -> None:
    options = ["--model", "tiny-vl", "--objectives", "nll,dft", "--set", "batch_size=4", "--benchmarks", "mathvision"]
    options += ["--set", "sample_rows=0"]
    answer = service.run("compare", str(directory / "train.tar.gz"), *options)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "The arms differ in train.objective.name." in answer.stdout
    assert re.search(r"\n nll +succeeded +nll +2/2", answer.stdout)
    assert re.search(
        r"\n  dft against nll: [+-]\d+\.\d points .* items fixed, \d+ broken; permutation p", answer.stdout
    )
    comparison = re.search(r"ftcmp-\w+", answer.stdout)[0]
    against_base = json.loads(service.run("compare", comparison, "--reference", "base", "--json").stdout)
    assert [pair["arm"] for pair in against_base["benchmarks"][0]["pairs"]] == ["nll", "dft"]
    assert against_base["terms"] == dict.fromkeys(("same_data", "same_order", "same_steps", "same_evaluation"), True)
