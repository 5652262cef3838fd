"""Interrupted equals uninterrupted, bit for bit: real processes that are killed, or asked to stop."""

from __future__ import annotations

import json
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from datasets_for_tests import metrics_of, shapes_dataset, sums_dataset
from processes_for_tests import exit_code, run_main, start_ranks, start_trainer
from throwaway import wait_until

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from safetensors.torch import load_file, save_file

from vlm_dft import trainer
from vlm_dft.config import LoraConfig, ObjectiveConfig, RunConfig, TrainConfig
from vlm_dft.errors import CheckpointError
from vlm_dft.interruption import Interrupted, StopRequest
from vlm_dft.results import RunResult
from vlm_dft.run_dir import RunDir

STEPS = 30


def finish(run: RunDir) -> RunResult:
    assert exit_code(start_trainer(run)) == 0, run.log_tail()
    result = run.read_result()
    assert result is not None
    assert result.status == "succeeded"
    return result


def weights_of(run: RunDir, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run.export_path / name)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def wait_for_step(run: RunDir, step: int, process: BaseProcess) -> None:
    def reached() -> bool:
        assert process.is_alive(), run.log_tail()
        return any(line["step"] >= step for line in run.read_metrics())

    wait_until(reached, 60, f"step {step}", interval=0.002)


@pytest.fixture(scope="module", params=["full", "lora-packed"])
def uninterrupted(request: pytest.FixtureRequest, tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run: dft on pictures and text, all trained, or LoRA with dropout and packs; validation on the way.

    With decoded pictures in a cache, or a frozen tower's features, and a benchmark that is asked in between.
    """
    root = tmp_path_factory.mktemp(f"resume-{request.param}")
    dataset = shapes_dataset(root / "dataset", 9, masked=[2])
    cache = {"directory": root / "cache"}
    kind: dict[str, Any] = {
        "full": {"freeze": {"vision_tower": False, "merger": False}, "micro_batch_size": 2, "patch_cache": cache},
        "lora-packed": {"adapter": LoraConfig(r=4, dropout=0.1), "packing": True, "pack_length_tokens": 170}
        | {"vision_cache": cache},
    }[request.param]
    questions = root / "questions.jsonl"
    questions.write_text('{"question": "2 + 2", "answer": "4", "scoring": "number"}\n')
    config = TrainConfig(
        model=str(tiny_vlm),
        dataset=dataset,
        validation_dataset=sums_dataset(root / "validation", 3),
        objective={"name": "dft"},
        learning_rate=3e-3,
        batch_size=4,
        max_steps=STEPS,
        checkpoint_every_steps=7,
        probe_every_steps=10,
        sample_rows=2,
        sample_max_new_tokens=4,
        precision="fp32",
        accuracy_probe={
            "benchmark": {"name": "probe", "kind": "custom", "path": questions},
            "every_steps": 10,
            "generation": {"max_new_tokens": 2},
        },
        **kind,
    )
    run = RunDir(root / "uninterrupted")
    run.create(RunConfig(run_id="uninterrupted", train=config))
    finish(run)
    return run


def copy_of(run: RunDir, path: Path, **changes) -> RunDir:
    """A fresh run directory with run's configuration."""
    config = run.read_config()
    assert config.train is not None
    copy = RunDir(path)
    copy.create(config.model_copy(update={"train": config.train.model_copy(update=changes)}))
    return copy


def said(run: RunDir) -> list[dict]:
    """What was answered to rows on the way, without its times."""
    answers = [answer for step in run.sample_steps() for answer in run.read_samples(step)]
    return [answer.model_dump(exclude={"time"}) for answer in answers]


def train_metrics(run: RunDir) -> list[dict]:
    return [line for line in metrics_of(run.metrics_path) if "grad_norm" in line]


@pytest.mark.chaos
def test_killed_and_resumed_equals_uninterrupted(uninterrupted: RunDir, tmp_path: Path):
    first = copy_of(uninterrupted, tmp_path / "attempt-1")
    process = start_trainer(first)
    wait_for_step(first, 11, process)
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    assert first.read_result() is None
    checkpoint = first.complete_checkpoints()[-1]
    assert 7 <= checkpoint.step < STEPS
    second = copy_of(uninterrupted, tmp_path / "attempt-2", resume_from=checkpoint.path)
    result = finish(second)
    assert result.train is not None
    assert result.train.resumed_from_step == checkpoint.step
    merged = [line for line in metrics_of(first.metrics_path) if line["step"] <= checkpoint.step]
    assert merged + metrics_of(second.metrics_path) == metrics_of(uninterrupted.metrics_path)
    answers = [answer for answer in said(first) if answer["step"] <= checkpoint.step]
    assert answers + said(second) == said(uninterrupted)
    assert_same_weights(weights_of(second), weights_of(uninterrupted))
    expected = uninterrupted.read_result()
    assert expected is not None
    assert expected.train is not None
    varying = {"wall_seconds", "resumed_from_step"}
    assert result.train.model_dump(exclude=varying) == expected.train.model_dump(exclude=varying)


@pytest.mark.chaos
def test_asked_to_stop_it_finishes_the_step_and_goes_on_later_from_there(uninterrupted: RunDir, tmp_path: Path):
    # Of its own accord it writes a checkpoint after step 10, the probe's best, and after the last step alone.
    run = copy_of(uninterrupted, tmp_path / "run", checkpoint_every_steps=1000)
    process = start_trainer(run)
    wait_for_step(run, 11, process)
    process.terminate()
    assert exit_code(process) == 75
    result = run.read_result()
    assert result is not None
    assert (result.status, result.train) == ("interrupted", None)
    last = run.complete_checkpoints()[-1]
    assert 11 <= last.step == run.read_metrics()[-1]["step"] < STEPS
    # In the same directory: nothing names the checkpoint, the newest is found.
    finish(run)
    assert train_metrics(run) == train_metrics(uninterrupted)
    assert said(run) == said(uninterrupted)
    assert [answer["step"] for answer in said(run)] == [0, 0, 10, 10, 20, 20, 30, 30]
    assert_same_weights(weights_of(run), weights_of(uninterrupted))


@pytest.fixture(scope="module")
def finished(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A quick finished run, in this process."""
    root = tmp_path_factory.mktemp("finished")
    dataset = sums_dataset(root / "dataset", 6)
    config = TrainConfig(
        model=str(tiny_qwen2),
        dataset=dataset,
        batch_size=2,
        max_steps=4,
        checkpoint_every_steps=1,
        keep_checkpoints=4,
        precision="fp32",
    )
    run = RunDir(root / "run")
    run.create(RunConfig(run_id="finished", train=config))
    trainer.train(config, run)
    return run


def resumed(finished: RunDir, path: Path, **changes) -> tuple[TrainConfig, RunDir]:
    changes = {"resume_from": finished.checkpoint_path(2)} | changes
    copy = copy_of(finished, path, **changes)
    config = copy.read_config().train
    assert config is not None
    return config, copy


def test_a_checkpoint_of_another_configuration_is_refused_by_the_fields_that_differ(finished: RunDir, tmp_path: Path):
    config, run = resumed(finished, tmp_path, learning_rate=1e-3, seed=7)
    with pytest.raises(
        CheckpointError, match=r"another training: learning_rate is 0\.001, the checkpoint has 5e-05"
    ) as e:
        trainer.train(config, run)
    assert "seed is 7, the checkpoint has 42" in e.value.message
    config, run = resumed(finished, tmp_path, objective=ObjectiveConfig(name="dft", weight_floor=0.1))
    with pytest.raises(
        CheckpointError, match=r"objective\.name is 'dft', the checkpoint has 'nll'; objective\.weight_floor"
    ):
        trainer.train(config, run)


def test_settings_that_are_younger_than_the_checkpoint_have_their_defaults(finished: RunDir, tmp_path: Path):
    older = tmp_path / "step-000002"
    shutil.copytree(finished.checkpoint_path(2), older)
    state, marker = older / "training" / "state.json", older / "complete.json"
    document = json.loads(state.read_text())
    for name in ("fsdp", "accuracy_probe", "head_tolerance", "head_backend"):
        del document["config"][name]
    state.write_text(json.dumps(document))
    sizes = json.loads(marker.read_text())
    sizes["files"]["training/state.json"] = state.stat().st_size
    marker.write_text(json.dumps(sizes))
    config, run = resumed(finished, tmp_path / "run", resume_from=older)
    assert trainer.train(config, run).resumed_from_step == 2
    config, run = resumed(finished, tmp_path / "changed", resume_from=older, head_tolerance=0.5, head_backend="torch")
    differing = r"head_backend is 'torch', the checkpoint has 'auto'; head_tolerance is 0\.5, the checkpoint has 1e-06"
    with pytest.raises(CheckpointError, match=differing):
        trainer.train(config, run)


def test_a_checkpoint_of_other_data_is_refused(finished: RunDir, tmp_path: Path):
    other = sums_dataset(tmp_path / "other", 7)
    config, run = resumed(finished, tmp_path / "run", dataset=other)
    with pytest.raises(CheckpointError, match="dataset has fingerprint"):
        trainer.train(config, run)


def test_settings_that_change_only_memory_and_places_may_differ(finished: RunDir, tmp_path: Path):
    moved = tmp_path / "moved"
    config = finished.read_config().train
    assert config is not None
    shutil.copytree(config.dataset, moved)
    model = tmp_path / "model"
    shutil.copytree(config.model, model)
    changes = {"dataset": moved, "model": str(model), "micro_batch_size": 2, "gradient_checkpointing": False}
    config, run = resumed(finished, tmp_path / "run", **changes)
    assert trainer.train(config, run).steps == 4
    weights = {name: 1.5 * weight for name, weight in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config, run = resumed(finished, tmp_path / "other", **changes)
    with pytest.raises(CheckpointError, match=r"another training: model .* has fingerprint"):
        trainer.train(config, run)


def test_a_torn_checkpoint_is_never_used(finished: RunDir, tmp_path: Path):
    torn = tmp_path / "step-000002"
    shutil.copytree(finished.checkpoint_path(2), torn)
    optimizer = torn / "training" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    config, run = resumed(finished, tmp_path / "run", resume_from=torn)
    with pytest.raises(CheckpointError, match=r"torn: training/optimizer\.pt has \d+ bytes instead of"):
        trainer.train(config, run)
    (torn / "complete.json").unlink()
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint: complete\.json is missing"):
        trainer.train(config, run)


def test_what_a_killed_process_left_half_written_is_removed_and_not_resumed_from(finished: RunDir, tmp_path: Path):
    run = copy_of(finished, tmp_path / "run")
    left = run.checkpoints_path / ".step-000002.4711.tmp"
    shutil.copytree(finished.checkpoint_path(2), left)
    config = run.read_config().train
    assert config is not None
    assert trainer.train(config, run).resumed_from_step is None
    assert not left.exists()


def test_what_was_told_after_the_last_checkpoint_is_not_told_twice(finished: RunDir, tmp_path: Path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    for step in (3, 4):
        shutil.rmtree(run.checkpoint_path(step))
    config = run.read_config().train
    assert config is not None
    assert trainer.train(config, run).resumed_from_step == 2
    assert metrics_of(run.metrics_path) == metrics_of(finished.metrics_path)


def test_a_run_that_died_after_its_last_step_only_exports(finished: RunDir, tmp_path: Path):
    config, run = resumed(finished, tmp_path / "run", resume_from=finished.checkpoint_path(4))
    result = trainer.train(config, run)
    assert (result.steps, result.resumed_from_step) == (4, 4)
    assert not run.metrics_path.exists()
    assert_same_weights(weights_of(run), weights_of(finished))


def test_asked_to_stop_while_it_measures_at_the_end_it_measures_when_it_goes_on(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held_out = sums_dataset(tmp_path / "held-out", 2)
    config, run = resumed(finished, tmp_path / "run", validation_dataset=held_out)
    stop, measure = StopRequest(), trainer.Optimization.measure

    def asked_at_the_last_step(optimization, micro_batches):
        stop.requested = run.read_metrics()[-1:] != [] and run.read_metrics()[-1]["step"] == 4
        return measure(optimization, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Optimization, "measure", asked_at_the_last_step)
        with pytest.raises(Interrupted, match="after step 4"):
            trainer.train(config, run, stop=stop)
    assert "valid_nll" not in run.read_metrics()[-1]
    result = trainer.train(config.model_copy(update={"resume_from": None}), run)
    assert (result.resumed_from_step, result.valid_nll_after) == (4, run.read_metrics()[-1]["valid_nll"])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_from_any_step_on_it_is_the_uninterrupted_run(step: int, finished: RunDir, tmp_path: Path):
    # Of three steps an epoch: within one, at its end and in the next; a cosine schedule and two micro-batches a step.
    config, run = resumed(finished, tmp_path / "run", resume_from=finished.checkpoint_path(step))
    trainer.train(config, run)
    assert train_metrics(run) == train_metrics(finished)[step:]
    assert_same_weights(weights_of(run), weights_of(finished))


def test_complete_json_holds_step_metrics_and_configuration_hash(finished: RunDir):
    marker = json.loads((finished.checkpoint_path(4) / "complete.json").read_text())
    assert marker["step"] == 4
    assert marker["metrics"].keys() == {"objective_loss", "nll", "token_accuracy"}
    assert len(marker["config_sha256"]) == 64


def test_two_ranks_of_which_one_is_asked_to_stop_train_as_one_process_does(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 9, masked=[2], text_every=2)
    config = TrainConfig(
        model=str(tiny_vlm),
        dataset=dataset,
        validation_dataset=dataset,
        objective={"name": "iw_sft"},  # asks for whole answers, and for the base model's numbers, gathered over ranks
        batch_size=4,
        max_steps=8,
        checkpoint_every_steps=8,
        learning_rate=1e-3,
        sample_rows=3,
        sample_max_new_tokens=4,
        precision="fp32",
    )
    alone, together = RunDir(tmp_path / "alone"), RunDir(tmp_path / "together")
    for run in (alone, together):
        run.create(RunConfig(run_id="ranks", train=config))
    finish(alone)
    ranks = start_ranks(run_main, str(together.path), count=2, log=together.log_path)
    wait_for_step(together, 1, ranks[0])
    ranks[1].terminate()  # one is told, both stop after the same step
    assert [exit_code(rank) for rank in ranks] == [75, 75], together.log_tail()
    ranks = start_ranks(run_main, str(together.path), count=2, log=together.log_path)
    assert [exit_code(rank) for rank in ranks] == [0, 0], together.log_tail()
    one, two = metrics_of(alone.metrics_path), metrics_of(together.metrics_path)
    assert len(one) == len(two) == 8 + 2
    assert said(together)[:3] == said(alone)[:3]  # before the first step: later their weights differ by rounding
    assert [(a["step"], a["row_id"]) for a in said(together)] == [(a["step"], a["row_id"]) for a in said(alone)]
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    result = together.read_result()
    assert result is not None
    assert result.status == "succeeded"
    expected, found = weights_of(alone), weights_of(together)
    difference = max((found[name] - expected[name]).abs().max().item() for name in expected)
    assert difference < 1e-4  # of weights that moved by about 1e-3


def test_progress_is_told_about_once_a_second(finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = []
    monkeypatch.setattr(RunDir, "write_progress", lambda self, progress: written.append((time.monotonic(), progress)))
    config, run = resumed(finished, tmp_path / "run", resume_from=None)
    trainer.train(config, run)
    assert [progress.phase for _, progress in written] == [
        "loading_model",
        "running",
        *("checkpointing", "running") * 4,
        "exporting",
    ]
    assert written[-1][1].step == 4
