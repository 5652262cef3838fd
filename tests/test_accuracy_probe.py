"""The probe measures what the weights answer, leaves the training as it was, and ends it when nothing gets better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets_for_tests import sums_dataset
from evaluation_fixtures import PIXELS, colour_benchmark
from test_trainer import run_for

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from safetensors.torch import load_file

from vlm_dft import trainer
from vlm_dft.accuracy_probe import AccuracyProbe, untouched
from vlm_dft.config import (
    AccuracyProbeConfig,
    BenchmarkConfig,
    EvalConfig,
    GenerationSettings,
    LoraConfig,
    RunConfig,
    TrainConfig,
)
from vlm_dft.errors import BenchmarkError, EvaluationError
from vlm_dft.evaluation import evaluate
from vlm_dft.interruption import Interrupted, StopRequest
from vlm_dft.model import base_of, load
from vlm_dft.ranks import Ranks
from vlm_dft.results import AccuracyPoint
from vlm_dft.run_dir import RunDir


def probe_of(benchmark: Path, **settings: Any) -> AccuracyProbeConfig:
    kind = "custom" if benchmark.is_file() else "mathvision"
    config = BenchmarkConfig(name="probe", kind=kind, path=benchmark)
    generation = GenerationSettings(max_new_tokens=8, batch_size=3)
    return AccuracyProbeConfig(**({"benchmark": config, "every_steps": 2, "generation": generation} | settings))


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sums_dataset(tmp_path_factory.mktemp("sums") / "dataset", 10)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "probe.jsonl"
    rows = [{"question": f"{n} + {n}", "answer": str(2 * n), "scoring": "number"} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def points_of(*values: float) -> list[AccuracyPoint]:
    fields = dict.fromkeys(AccuracyPoint.model_fields, 1.0) | {"probe_benchmark": "x", "probe_metric": "acc"}
    points = [fields | {"step": number, "probe_items": 5, "probe_value": value} for number, value in enumerate(values)]
    return [AccuracyPoint.model_validate(point) for point in points]


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, dropout=0.5)])
def test_a_training_with_a_probe_equals_one_without(
    tiny_qwen2: Path, sums: Path, questions: Path, tmp_path: Path, adapter: LoraConfig | None
) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "adapter": adapter} if adapter else {"max_steps": 5}
    config, plain = run_for(tmp_path / "plain", tiny_qwen2, sums, **settings)
    trainer.train(config, plain)
    config, probed = run_for(tmp_path / "probed", tiny_qwen2, sums, accuracy_probe=probe_of(questions), **settings)
    result = trainer.train(config, probed)
    first, second = (load_file(run.export_path / "model.safetensors") for run in (plain, probed))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [line["step"] for line in probed.read_accuracy()] == [0, 2, 4, 5]
    assert (result.steps, result.stopped_early) == (5, False)
    settings_files = [(run.export_path / "generation_config.json") for run in (plain, probed)]
    assert settings_files[0].read_text() == settings_files[1].read_text()


def test_what_the_probe_measures_is_what_an_evaluation_of_the_export_finds(
    tiny_vlm: Path, sums: Path, tmp_path: Path
) -> None:
    benchmark = colour_benchmark(tmp_path / "colours", num_items=4)
    probe = probe_of(benchmark)
    config, run = run_for(tmp_path / "run", tiny_vlm, sums, max_steps=2, accuracy_probe=probe, pixels=PIXELS)
    trainer.train(config, run)
    last = AccuracyPoint.model_validate(run.read_accuracy()[-1])
    settings = EvalConfig(benchmarks=(probe.benchmark,), pixels=PIXELS, **probe.generation.model_dump())
    (score,) = evaluate(settings, run, tuned=str(run.export_path), base=None)
    assert (last.step, last.probe_value, last.probe_items) == (2, score.value, score.n)


def test_a_probe_that_does_not_grow_ends_the_training_for_good(
    tiny_qwen2: Path, sums: Path, questions: Path, tmp_path: Path
) -> None:
    probe = probe_of(questions, every_steps=1, patience=2)
    config, run = run_for(tmp_path / "run", tiny_qwen2, sums, max_steps=9, accuracy_probe=probe, learning_rate=1e-9)
    result = trainer.train(config, run)
    assert (result.steps, result.stopped_early) == (2, True)
    assert {histogram.step for histogram in run.read_histograms()} == {0, 2}
    first, kept = run.complete_checkpoints()
    assert (first.step, kept.step) == (1, 2)
    assert result.exported_step == 1  # all are equal
    again = RunDir(tmp_path / "again")
    again.create(RunConfig(run_id="test", train=config))
    resumed = trainer.train(config.model_copy(update={"resume_from": kept.path}), again)
    assert (resumed.steps, resumed.resumed_from_step, resumed.stopped_early) == (2, 2, True)
    assert resumed.model_sha256 == result.model_sha256


def scripted(monkeypatch: pytest.MonkeyPatch, values: dict[int, float], stop: StopRequest | None = None) -> None:
    """What the probe finds at each step; stop: asked for after step 4, and so obeyed after step 5."""

    def measure(probe: AccuracyProbe, ranks: Ranks, step: int) -> AccuracyPoint:
        if stop is not None and step == 4:
            stop.requested = True
        return points_of(values[step])[0].model_copy(update={"step": step})

    monkeypatch.setattr(AccuracyProbe, "measure", measure)


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, dropout=0.5)])
def test_with_patience_the_best_measured_weights_are_exported_whatever_has_come_between(
    tiny_qwen2: Path, sums: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Any
) -> None:
    values = {0: 0.9, 1: 0.2, 2: 0.6, 3: 0.6, 4: 0.3, 5: 0.1, 6: 0.5}
    scripted(monkeypatch, values)
    settings: dict[str, Any] = {"adapter": adapter} if adapter else {}
    probe = probe_of(questions, every_steps=1, patience=9)
    settings |= {
        "keep_checkpoints": 9,
        "accuracy_probe": probe,
        "validation_dataset": sums,
        "max_steps": 6,
        "checkpoint_every_steps": 3,
    }
    config, run = run_for(tmp_path / "run", tiny_qwen2, sums, **settings)
    result = trainer.train(config, run)
    assert (result.steps, result.exported_step, result.stopped_early) == (6, 2, False)
    best = next(checkpoint for checkpoint in run.complete_checkpoints() if checkpoint.step == 2)
    assert result.valid_nll_after == best.metrics["valid_nll"]
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    kept, exported = (load_file(path) for path in (best.path / name, run.path / (result.adapter or "export") / name))
    assert exported.keys() == kept.keys()
    assert [key for key in kept if not torch.equal(exported[key], kept[key])] == []

    # Stopped after step 5; then nothing is left of that directory but its last checkpoint, in another place.
    scripted(monkeypatch, values, stop := StopRequest())
    config, first = run_for(tmp_path / "first", tiny_qwen2, sums, **settings | {"keep_checkpoints": 1})
    with pytest.raises(Interrupted):
        trainer.train(config, first, stop=stop)
    (last,) = first.complete_checkpoints()
    elsewhere = last.path.rename(tmp_path / last.path.name)
    shutil.rmtree(first.path)
    scripted(monkeypatch, values)
    config, second = run_for(tmp_path / "second", tiny_qwen2, sums, **settings, resume_from=elsewhere)
    resumed = trainer.train(config, second)
    varying = {"wall_seconds", "resumed_from_step"}
    assert resumed.model_dump(exclude=varying) == result.model_dump(exclude=varying)
    assert resumed.resumed_from_step == 5


def test_a_best_measurement_is_one_above_all_others_after_the_first_step(tiny_qwen2: Path, questions: Path) -> None:
    probe = AccuracyProbe(probe_of(questions, patience=3), load(str(tiny_qwen2)), PIXELS)
    values = [0.9, 0.2, 0.2, 0.4, 0.3, 0.5]
    assert [probe.is_best(points_of(*values[:count])) for count in range(7)] == [False] * 2 + [
        True, False, True, False, True,
    ]  # fmt: skip
    only_measures = AccuracyProbe(probe_of(questions), load(str(tiny_qwen2)), PIXELS)
    assert not only_measures.is_best(points_of(*values))


@pytest.mark.parametrize(
    ("values", "patience", "ends"),
    [
        ([0.1, 0.2, 0.3], 1, False),
        ([0.1, 0.2, 0.2], 1, True),
        ([0.1, 0.3, 0.2, 0.3], 2, True),
        ([0.1, 0.3, 0.2, 0.4], 2, False),
        ([0.5, 0.1], 2, False),
        ([0.5, 0.1, 0.2], 2, True),
        ([0.5, 0.1, 0.2], None, False),
        ([], 1, False),
    ],
)
def test_patience_counts_measurements_without_a_new_best(
    tiny_qwen2: Path, questions: Path, values: list[float], patience: int | None, ends: bool
) -> None:
    probe = AccuracyProbe(probe_of(questions, patience=patience), load(str(tiny_qwen2)), PIXELS)
    assert probe.ends(points_of(*values)) == ends


def test_modes_and_settings_come_back_even_from_a_failure(tiny_qwen2: Path) -> None:
    loaded = load(str(tiny_qwen2))
    model = base_of(loaded.model)
    model.train()
    next(model.children()).eval()
    before = [module.training for module in model.modules()]
    settings = model.generation_config

    def fail() -> None:
        with untouched(loaded):
            model.generation_config = None
            assert not any(module.training for module in model.modules())
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert [module.training for module in model.modules()] == before
    assert model.generation_config is settings


def test_a_probe_that_cannot_be_asked_fails_before_the_first_step(tiny_qwen2: Path, sums: Path, tmp_path: Path) -> None:
    benchmark = colour_benchmark(tmp_path / "colours", num_items=2)
    config, run = run_for(tmp_path / "run", tiny_qwen2, sums, max_steps=2, accuracy_probe=probe_of(benchmark))
    with pytest.raises(EvaluationError, match="the probe's benchmark probe has pictures"):
        trainer.train(config, run)
    (benchmark / "images" / "0.png").unlink()
    with pytest.raises(BenchmarkError, match="does not exist"):
        trainer.train(config, run)
    assert run.read_metrics() == []
    with pytest.raises(ValueError, match="the accuracy probe needs the whole model"):
        TrainConfig(model="m", dataset=tmp_path, fsdp=True, accuracy_probe=probe_of(benchmark))
    with pytest.raises(ValueError, match="one sample per item"):
        probe_of(benchmark, generation=GenerationSettings(samples_per_item=2, temperature=1))
