"""The library alone on real data: PuzzleVQA with the real Qwen2.5-VL tokenizer and processor, GSM8K, real benchmarks.

The models are small and random, their classes, vocabulary and files are the real ones; nothing is mocked.
VLM_DFT_TEST_STEPS=40 runs the trainings of the README; by default they are shorter, for the vocabulary makes them slow.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.config import RunConfig
from vlm_dft.results import RunResult
from vlm_dft.run_dir import RunDir
from vlm_dft.tiny import build_tiny_text, build_tiny_vlm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
GIB = 2**30
STEPS = int(os.environ.get("VLM_DFT_TEST_STEPS", "6"))


def run(directory: Path, document: dict[str, Any]) -> RunResult:
    """`python -m vlm_dft` on the document, in a process of its own; its result must be a success."""
    run_dir = RunDir(directory)
    run_dir.create(RunConfig.model_validate({"run_id": directory.name, **document}))
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    process = subprocess.run(
        [sys.executable, "-m", "vlm_dft", directory], env=environment, capture_output=True, text=True
    )
    result = run_dir.read_result()
    assert result is not None, process.stdout + process.stderr
    assert result.status == "succeeded", result.error
    return result


def validated(directory: Path, source: Path, model: Path, **options: Any) -> Path:
    """Canonical dataset of a source file."""
    config = {"source": str(source), "filename": source.name, "tokenizer": str(model), **options}
    result = run(directory, {"validation": config})
    assert result.validation is not None
    assert result.validation.invalid == 0
    return directory / "dataset"


def losses(directory: Path) -> tuple[list[float], list[float]]:
    """Raw NLL and objective loss per step."""
    lines = [line for line in RunDir(directory).read_metrics() if "nll" in line]
    return [line["nll"] for line in lines], [line["objective_loss"] for line in lines]


def assert_falls(values: list[float]) -> None:
    part = min(5, len(values) // 2)
    assert statistics.mean(values[-part:]) < statistics.mean(values[:part])


@pytest.fixture(scope="module")
def vision_model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden 128, 3 text and 2 vision layers, the real vocabulary of 151,936."""
    return build_tiny_vlm(
        tmp_path_factory.mktemp("models") / "qwen2.5-vl-small",
        tokenizer_dir=shared_data / "qwen2_5_vl_tokenizer",
        hidden_size=128,
        num_layers=3,
        vision_layers=2,
    )


@pytest.fixture(scope="module")
def puzzlevqa(vision_model: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("validation")
    return validated(directory, shared_data / "puzzlevqa", vision_model, data_file="wethink_train.jsonl")


@pytest.mark.parametrize("objective", ["dft", "nll"])
def test_training_on_puzzlevqa_lowers_the_loss_within_six_gib(
    objective: str, vision_model: Path, puzzlevqa: Path, tmp_path: Path
) -> None:
    train = {
        "model": str(vision_model),
        "dataset": str(puzzlevqa),
        "objective": {"name": objective},
        "freeze": {"vision_tower": False, "merger": False},
        "max_steps": STEPS,
        "batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "checkpoint_every_steps": STEPS,
        "probe_rows": 2,
    }
    result = run(tmp_path / objective, {"train": train})
    assert result.train is not None
    assert result.train.steps == STEPS
    nll, objective_loss = losses(tmp_path / objective)
    assert len(nll) == STEPS
    assert_falls(nll)
    if objective == "nll":
        assert_falls(objective_loss)
        assert nll == pytest.approx(objective_loss, rel=1e-6)
    peak_gib = max(line["peak_memory_gib"] for line in RunDir(tmp_path / objective).read_metrics() if "nll" in line)
    assert peak_gib < 6
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB < 6


def test_real_benchmark_items_run_to_a_score_record(vision_model: Path, shared_data: Path, tmp_path: Path) -> None:
    benchmarks = [
        {"name": name, "kind": kind, "path": str(shared_data / folder), "limit": 4}
        for name, kind, folder in (
            ("mathverse", "mathverse", "mathverse"),
            ("mathvision", "mathvision", "mathvision"),
            ("wemath", "wemath", "wemath_nc"),
        )
    ]
    config = {
        "model": str(vision_model),
        "benchmarks": benchmarks,
        "max_new_tokens": 8,
        "pixels": {"max_pixels": 50176},
    }
    result = run(tmp_path / "evaluation", {"evaluation": config})
    assert [score.benchmark for score in result.scores] == ["mathverse", "mathvision", "wemath"]
    for score in result.scores:
        assert not score.whole
        assert score.judge == "none"
        assert 0 < score.n < score.n_total
        predictions = (tmp_path / "evaluation" / score.predictions).read_text().splitlines()
        assert len([line for line in predictions if "prediction" in json.loads(line)]) >= score.n


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_text_model_learns_gsm8k(family: str, shared_data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:160]]
    texts = [row["question"] + " " + row["answer"] for row in rows]
    model = build_tiny_text(tmp_path / family, family, texts=texts, vocab_size=2048)
    source = tmp_path / "gsm8k.jsonl"
    turns = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in rows
    ]
    source.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    dataset = validated(tmp_path / "validation", source, model)
    train = {"model": str(model), "dataset": str(dataset), "objective": {"name": "dft"}, "max_steps": 20}
    tuning = {"batch_size": 8, "micro_batch_size": 8, "learning_rate": 3e-3, "gradient_checkpointing": False}
    run(tmp_path / "train", {"train": train | tuning})
    nll, _ = losses(tmp_path / "train")
    assert_falls(nll)
