"""Training in this process: order, counting, telemetry, limits, and the ends that are not success."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
from datasets_for_tests import shapes_dataset, sums_dataset
from gradients_for_tests import definition_of, loaded_for, relative

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from safetensors.torch import load_file, save_file

from vlm_dft import optimization, trainer
from vlm_dft.batches import Plan, Steps, open_corpus
from vlm_dft.config import LoraConfig, RunConfig, TrainConfig
from vlm_dft.data.encoding import Encoder
from vlm_dft.errors import ConfigError, DatasetError, NanLossError, OutOfMemoryError, SampleTooLongError
from vlm_dft.model import load
from vlm_dft.results import StepMetrics, ValidationMetrics
from vlm_dft.run_dir import RunDir


def run_for(path: Path, model: Path, dataset: Path, **settings) -> tuple[TrainConfig, RunDir]:
    defaults = {"batch_size": 4, "learning_rate": 3e-3, "precision": "fp32", "gradient_checkpointing": False}
    config = TrainConfig(model=str(model), dataset=dataset, **(defaults | settings))
    run = RunDir(path)
    run.create(RunConfig(run_id="test", train=config))
    return config, run


def broken_copy(model: Path, path: Path) -> Path:
    """The model with one weight that is no number."""
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    next(weight for name, weight in weights.items() if "layers.0.mlp" in name)[0, 0] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sums_dataset(tmp_path_factory.mktemp("sums") / "dataset", 10)


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own():
    plan = Plan(tuple(range(10, 21)), 4, seed=7, epochs=3)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 9)
    epochs = [[index for step in range(3 * e, 3 * e + 3) for index in plan.batch(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10, 21)) for epoch in epochs)
    assert [len(plan.batch(step)) for step in range(3)] == [4, 4, 3]
    assert epochs[0] != epochs[1] != epochs[2]
    assert Plan(tuple(range(10, 21)), 4, seed=7, epochs=3).batch(5) == plan.batch(5)
    assert Plan(tuple(range(10, 21)), 4, seed=8, epochs=3).batch(5) != plan.batch(5)


def test_max_steps_goes_before_epochs():
    assert Plan((0, 1, 2), 2, seed=0, epochs=5, max_steps=3).total_steps == 3
    assert Plan((0, 1, 2), 2, seed=0, epochs=1, max_steps=30).total_steps == 30


def test_a_steps_rows_do_not_depend_on_micro_batches_or_ranks(tiny_qwen2: Path, sums: Path, tmp_path: Path):
    config, _ = run_for(tmp_path, tiny_qwen2, sums)
    loaded = load(tiny_qwen2, precision="fp32", device="cpu")
    corpus = open_corpus(sums, Encoder(loaded.processor, config.pixels), config, tiny_qwen2)
    plan = Plan(corpus.kept, 4, seed=1, epochs=2)
    seen = set()
    for micro_batch_size, num_ranks in itertools.product((1, 3, 4), (1, 2, 5)):
        rows = [
            frozenset(
                row_id
                for rank in range(num_ranks)
                for micro in Steps(
                    corpus, plan, micro_batch_size=micro_batch_size, pad_token_id=0, rank=rank, num_ranks=num_ranks
                )[step]
                for row_id in micro.row_ids
            )
            for step in range(plan.total_steps)
        ]
        seen.add(tuple(rows))
    assert len(seen) == 1


@pytest.mark.parametrize("objective", ["nll", "dft"])
def test_training_lowers_held_out_loss_and_tells_everything(tiny_vlm: Path, tmp_path: Path, objective: str):
    dataset = shapes_dataset(tmp_path / "dataset", 10)
    config, run = run_for(
        tmp_path / "run",
        tiny_vlm,
        dataset,
        validation_dataset=dataset,
        objective={"name": objective},
        n_epochs=8,
        micro_batch_size=3,
        checkpoint_every_steps=10,
        keep_checkpoints=2,
    )
    result = trainer.train(config, run)
    assert (result.steps, result.num_samples) == (24, 80)
    assert result.valid_nll_before is not None
    assert result.valid_nll_after is not None
    assert result.valid_nll_after < 0.7 * result.valid_nll_before
    lines = run.read_metrics()
    steps = [StepMetrics.model_validate(line) for line in lines if "grad_norm" in line]
    held_out = [ValidationMetrics.model_validate(line) for line in lines if "valid_nll" in line]
    assert [metrics.step for metrics in steps] == list(range(1, 25))
    assert [metrics.step for metrics in held_out] == [0, 10, 20, 24]
    assert result.trained_tokens == sum(metrics.num_tokens for metrics in steps)
    assert result.input_tokens == sum(metrics.input_tokens for metrics in steps)
    assert (result.first_nll, result.last_nll) == (steps[0].nll, steps[-1].nll)
    assert [metrics.num_samples for metrics in steps[:3]] == [4, 4, 2]
    assert held_out[0].valid_num_tokens == steps[0].num_tokens + steps[1].num_tokens + steps[2].num_tokens
    for metrics in steps:
        if objective == "nll":
            assert (metrics.objective_loss, metrics.mean_weight, metrics.effective_sample_size) == (metrics.nll, 1, 1)
        else:
            assert metrics.objective_loss < metrics.nll
            assert 0 < metrics.mean_weight < 1
        assert metrics.eos_nll is not None
    assert [checkpoint.step for checkpoint in run.complete_checkpoints()] == [20, 24]
    assert run.complete_checkpoints()[-1].metrics["valid_nll"] == held_out[-1].valid_nll
    progress = run.read_progress()
    assert progress is not None
    assert (progress.phase, progress.step, progress.total_steps) == ("exporting", 24, 24)
    load(run.path / result.export)
    load(run.complete_checkpoints()[-1].path)


def test_lora_leaves_an_adapter_and_loadable_checkpoints(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 4)
    config, run = run_for(tmp_path / "run", tiny_vlm, dataset, adapter=LoraConfig(r=4), max_steps=3)
    result = trainer.train(config, run)
    assert result.adapter is not None
    assert (run.path / result.adapter / "adapter_model.safetensors").is_file()
    checkpoint = run.complete_checkpoints()[-1].path
    assert not (checkpoint / "model.safetensors").exists()
    load(checkpoint)


def test_only_every_nth_step_is_logged_when_asked(tiny_qwen2: Path, sums: Path, tmp_path: Path):
    config, run = run_for(tmp_path, tiny_qwen2, sums, max_steps=7, log_every_steps=3)
    result = trainer.train(config, run)
    assert [line["step"] for line in run.read_metrics()] == [3, 6, 7]
    assert result.valid_nll_after is None


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tiny_qwen2: Path, sums: Path, tmp_path: Path):
    config, run = run_for(tmp_path, tiny_qwen2, sums, max_steps=10, warmup_ratio=0.2, learning_rate=1e-3)
    trainer.train(config, run)
    rates = [line["learning_rate"] for line in run.read_metrics()]
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert rates[6] == pytest.approx(5e-4)
    assert rates[9] == pytest.approx(1e-3 * 0.0380602, rel=1e-5)


def test_a_training_takes_the_steps_of_its_definition(tiny_qwen2: Path, tmp_path: Path):
    # Three steps an epoch, the last of each smaller; clipped, with decay for matrices alone, along warm-up and cosine.
    dataset = sums_dataset(tmp_path / "dataset", 5, masked=[2])
    settings = {"batch_size": 2, "n_epochs": 2, "max_grad_norm": 0.5, "weight_decay": 0.5, "warmup_ratio": 0.2}
    config, run = run_for(tmp_path / "run", tiny_qwen2, dataset, **settings)
    trainer.train(config, run)
    loaded = loaded_for(config)
    start = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    parameters = dict(loaded.model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.5},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
    )
    for step, rate in enumerate([0.0, 0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3))]):
        for name, gradient in definition_of(config, loaded, step=step).items():
            parameters[name].grad = gradient
        assert torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5) > 0.5
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        optimizer.step()
    found = load_file(run.export_path / "model.safetensors")
    moved = {name: weight - start[name] for name, weight in found.items()}
    assert relative(moved, {name: loaded.model.state_dict()[name] - start[name] for name in found}) < 1e-3


def test_gradients_over_the_limit_are_scaled_down_to_it(tiny_qwen2: Path, sums: Path, tmp_path: Path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments, **keywords):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config, run = run_for(tmp_path, tiny_qwen2, sums, max_steps=2, max_grad_norm=0.01)
    trainer.train(config, run)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert all(line["grad_norm"] > 0.1 for line in run.read_metrics())


def test_rows_over_the_length_limit_fail_the_run_before_its_first_step(tiny_qwen2: Path, sums: Path, tmp_path: Path):
    config, run = run_for(tmp_path, tiny_qwen2, sums, max_length_tokens=60)
    with pytest.raises(SampleTooLongError, match=r"longer than max_length_tokens 60: test\.jsonl:\d+ \(\d+ tokens\)"):
        trainer.train(config, run)
    assert not run.metrics_path.exists()


def test_rows_over_the_length_limit_are_dropped_and_counted_when_asked(
    tiny_qwen2: Path, sums: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    loaded = load(tiny_qwen2, precision="fp32", device="cpu")
    config, run = run_for(tmp_path, tiny_qwen2, sums)
    corpus = open_corpus(sums, Encoder(loaded.processor, config.pixels), config, tiny_qwen2)
    limit = sorted(size.tokens for size in corpus.sizes.values())[6]
    longer = sum(size.tokens > limit for size in corpus.sizes.values())
    assert 0 < longer < 10
    config, run = run_for(tmp_path, tiny_qwen2, sums, max_length_tokens=limit, on_overlong="drop")
    result = trainer.train(config, run)
    assert (result.dropped_samples, result.num_samples) == (longer, 10 - longer)
    assert f"left out: {longer} rows" in caplog.text
    config, run = run_for(tmp_path / "all", tiny_qwen2, sums, max_length_tokens=8, on_overlong="drop")
    with pytest.raises(DatasetError, match="no row to train on: 10 rows, 10 of them too long"):
        trainer.train(config, run)


def test_masked_rows_are_no_crash_and_count_nothing(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 6, masked=[0, 1, 2, 3])
    config, run = run_for(tmp_path / "run", tiny_vlm, dataset, batch_size=1, n_epochs=1)
    result = trainer.train(config, run)
    counts = [line["num_tokens"] for line in run.read_metrics()]
    assert sorted(counts)[:4] == [0, 0, 0, 0]
    assert sum(counts) == result.trained_tokens > 0


def test_a_dataset_of_masked_rows_alone_is_refused(tiny_qwen2: Path, tmp_path: Path):
    dataset = sums_dataset(tmp_path / "dataset", 3, masked=[0, 1, 2])
    config, run = run_for(tmp_path / "run", tiny_qwen2, dataset)
    with pytest.raises(DatasetError, match="no row of the training data has a token to train on"):
        trainer.train(config, run)


def test_held_out_rows_without_a_token_to_measure_are_refused_and_no_loss_of_zero(
    tiny_qwen2: Path, sums: Path, tmp_path: Path
):
    masked = sums_dataset(tmp_path / "masked", 2, masked=[0, 1])
    config, run = run_for(tmp_path / "run", tiny_qwen2, sums, validation_dataset=masked)
    with pytest.raises(DatasetError, match=r"no row of .*masked has a token to measure"):
        trainer.train(config, run)
    assert not run.metrics_path.exists()


def test_everything_frozen_is_refused(tiny_qwen2: Path, sums: Path, tmp_path: Path):
    config, run = run_for(tmp_path, tiny_qwen2, sums, freeze={"language_model": True})
    with pytest.raises(ConfigError, match="nothing is left to train"):
        trainer.train(config, run)


def test_a_loss_that_is_not_finite_names_step_and_rows_and_keeps_the_last_checkpoint(
    tiny_qwen2: Path, sums: Path, tmp_path: Path, monkeypatch
):
    calls = itertools.count()
    real = optimization.objective_loss

    def failing(hidden_ND, *arguments, **keywords):
        poison = float("nan") if next(calls) == 9 else 1.0  # the second micro-batch of the third step
        return real(hidden_ND * poison, *arguments, **keywords)

    monkeypatch.setattr(optimization, "objective_loss", failing)
    config, run = run_for(tmp_path, tiny_qwen2, sums, n_epochs=3, checkpoint_every_steps=2, batch_size=4)
    with pytest.raises(
        NanLossError, match=r"loss is nan at step 3, rows test\.jsonl:\d+:.*checkpoint was kept"
    ) as caught:
        trainer.train(config, run)
    assert caught.value.message.count("test.jsonl") == 1
    assert [checkpoint.step for checkpoint in run.complete_checkpoints()] == [2]
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_held_out_numbers_that_are_not_finite_name_step_and_rows(
    tiny_qwen2: Path, sums: Path, tmp_path: Path, monkeypatch
):
    real = optimization.objective_loss

    def failing(hidden_ND, *arguments, **keywords):
        return real(hidden_ND * (1.0 if torch.is_grad_enabled() else float("nan")), *arguments, **keywords)

    monkeypatch.setattr(optimization, "objective_loss", failing)
    held_out = sums_dataset(tmp_path / "held-out", 2)
    config, run = run_for(tmp_path / "run", tiny_qwen2, sums, validation_dataset=held_out)
    with pytest.raises(NanLossError, match=r"held-out loss is nan at step 0, rows test\.jsonl:\d, test\.jsonl:\d:"):
        trainer.train(config, run)


def test_a_model_that_is_broken_from_the_start_is_named_by_its_first_look_at_rows(
    tiny_qwen2: Path, sums: Path, tmp_path: Path
):
    config, run = run_for(tmp_path / "run", broken_copy(tiny_qwen2, tmp_path / "broken"), sums, max_steps=2)
    with pytest.raises(NanLossError, match=r"target is nan at step 0, rows test\.jsonl:1, .*: nothing was trained yet"):
        trainer.train(config, run)


def test_a_full_device_says_what_would_fit(tiny_qwen2: Path, sums: Path, tmp_path: Path, monkeypatch):
    real = optimization.Optimization._loss
    calls = itertools.count()

    def full(self, *arguments):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments)

    monkeypatch.setattr(optimization.Optimization, "_loss", full)
    config, run = run_for(tmp_path, tiny_qwen2, sums, micro_batch_size=2)
    with pytest.raises(OutOfMemoryError, match=r"2 samples and \d+ tokens.*tokens did fit.*Try micro_batch_size 1, or"):
        trainer.train(config, run)


def test_an_image_that_vanished_is_named(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 3)
    for image in (dataset / "images").iterdir():
        image.unlink()
    config, run = run_for(tmp_path / "run", tiny_vlm, dataset)
    with pytest.raises(DatasetError, match=r"row test\.jsonl:\d: image .* cannot be read"):
        trainer.train(config, run)


def test_loader_processes_change_nothing(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 6)
    config, _ = run_for(tmp_path / "run", tiny_vlm, dataset)
    loaded = load(tiny_vlm, precision="fp32", device="cpu")
    corpus = open_corpus(dataset, Encoder(loaded.processor, config.pixels), config, tiny_vlm)
    plan = Plan(corpus.kept, 4, seed=0, epochs=2)
    settings = {"micro_batch_size": 2, "pad_token_id": loaded.pad_token_id}
    here = list(Steps(corpus, plan, **settings).read(1))
    there = list(Steps(corpus, plan, num_workers=1, **settings).read(1))
    assert len(here) == len(there) == 3
    for one, other in zip(itertools.chain(*here), itertools.chain(*there), strict=True):
        assert one.row_ids == other.row_ids
        assert torch.equal(one.labels_BT, other.labels_BT)
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)


def test_a_loader_process_passes_errors_on_as_they_are(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 3)
    config, _ = run_for(tmp_path / "run", tiny_vlm, dataset)
    loaded = load(tiny_vlm, precision="fp32", device="cpu")
    corpus = open_corpus(dataset, Encoder(loaded.processor, config.pixels), config, tiny_vlm)
    for image in (dataset / "images").iterdir():
        image.write_bytes(b"changed")
    steps = Steps(corpus, Plan(corpus.kept, 4, seed=0), micro_batch_size=2, pad_token_id=0, num_workers=1)
    with pytest.raises(DatasetError, match="changed since it was validated"):
        list(steps.read())


def test_a_manifest_that_does_not_fit_its_rows_is_refused(tiny_qwen2: Path, tmp_path: Path):
    dataset = sums_dataset(tmp_path / "dataset", 4)
    manifest = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(manifest | {"rows": 5}))
    config, run = run_for(tmp_path / "run", tiny_qwen2, dataset)
    with pytest.raises(DatasetError, match=r"has 4 rows, .* manifest says 5"):
        trainer.train(config, run)
