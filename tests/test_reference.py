"""The base model beside the trained one: computed once, stored, found again, and never the model that was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from datasets_for_tests import metrics_of, shapes_dataset
from gradients_for_tests import config_of, loaded_for, micro_batches_of
from safetensors.torch import load_file

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft import reference, trainer
from vlm_dft.batches import MicroBatch
from vlm_dft.config import CacheConfig, LoraConfig, ObjectiveConfig, RunConfig
from vlm_dft.reference import Reference
from vlm_dft.run_dir import RunDir


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_dataset(tmp_path_factory.mktemp("shapes") / "dataset", 6, masked=[2])


def run_of(path: Path, model: Path, dataset: Path, objective: str, **settings) -> RunDir:
    defaults = {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 4, "checkpoint_every_steps": 2}
    config = config_of(model, dataset, "nll", **(defaults | settings))
    config = config.model_copy(update={"objective": ObjectiveConfig.model_validate({"name": objective})})
    run = RunDir(path)
    run.create(RunConfig(run_id="test", train=config))
    return run


def train(run: RunDir) -> None:
    config = run.read_config().train
    assert config is not None
    trainer.train(config, run)


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4)])
def test_the_base_models_log_probabilities_are_those_before_any_training(
    adapter: LoraConfig | None, tiny_vlm: Path, shapes: Path
):
    config = config_of(tiny_vlm, shapes, "nll", **({"adapter": adapter} if adapter else {}))
    base = loaded_for(config_of(tiny_vlm, shapes, "nll")).model
    loaded = loaded_for(config)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    found = Reference(loaded, config)
    for micro_batch in micro_batches_of(config, loaded):
        logp = found.target_logp(micro_batch)
        assert list(logp) == list(micro_batch.row_ids)
        expected = expected_logp(base, micro_batch)
        assert torch.cat(list(logp.values())) == pytest.approx(expected, abs=1e-5)


def expected_logp(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    labels_N = micro_batch.labels_BT.flatten()
    with torch.no_grad():
        logp_NV = model(**micro_batch.inputs, use_cache=False).logits.flatten(0, 1).double().log_softmax(-1)
    return logp_NV[labels_N != -100].gather(1, labels_N[labels_N != -100][:, None]).squeeze(1).float()


@pytest.mark.parametrize("objective", ["psft", "iw_sft", "asft"])
def test_a_resumed_training_compares_with_the_same_base_model(
    objective: str, tiny_vlm: Path, shapes: Path, tmp_path: Path
):
    settings = {"validation_dataset": shapes, "packing": objective == "iw_sft"}
    whole = run_of(tmp_path / "whole", tiny_vlm, shapes, objective, **settings)
    train(whole)
    resumed = run_of(
        tmp_path / "resumed", tiny_vlm, shapes, objective, resume_from=whole.checkpoint_path(2), **settings
    )
    train(resumed)
    assert metrics_of(resumed.metrics_path) == [line for line in metrics_of(whole.metrics_path) if line["step"] > 2]
    expected, found = (load_file(run.export_path / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # A first step with nothing but the base model: every ratio is 1, and the distance 0.
    first = metrics_of(whole.metrics_path)[1]
    if objective == "asft":
        assert first["kl"] == pytest.approx(0.0, abs=1e-6)
        assert metrics_of(whole.metrics_path)[-2]["kl"] > 1e-6
    else:
        assert first["mean_weight"] == pytest.approx(1.0, abs=1e-5)
        assert "kl" not in first


@pytest.mark.parametrize("shared", [False, True])
def test_what_an_earlier_run_stored_is_not_computed_again(
    shared: bool, tiny_vlm: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"max_steps": 2}
    if shared:
        settings["reference_cache"] = CacheConfig(directory=tmp_path / "cache")
    first = run_of(tmp_path / "first", tiny_vlm, shapes, "psft", **settings)
    train(first)
    (stored,) = (tmp_path / "cache" if shared else first.path / "reference").glob("*.safetensors")

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(reference, "Reference", refuse)
    # An attempt finds what the one before has stored; another run, and another objective, what all share.
    changes = {"learning_rate": 1e-4} if shared else {"resume_from": first.checkpoint_path(2)}
    objective = "iw_sft" if shared else "psft"
    second = run_of(tmp_path / "second", tiny_vlm, shapes, objective, **settings | changes)
    train(second)
    # By value: safetensors writes its header in any order.
    taken = load_file(stored if shared else second.path / "reference" / stored.name)
    assert {name: tensor.tolist() for name, tensor in taken.items()} == {
        name: tensor.tolist() for name, tensor in load_file(stored).items()
    }
    assert (second.path / "reference").exists() != shared
    # Numbers of other pixels, or of another model, are other numbers.
    other = run_of(tmp_path / "other", tiny_vlm, shapes, "psft", pixels={"max_pixels": 4 * 28 * 28}, **settings)
    if not shared:
        shutil.copytree(first.path / "reference", other.path / "reference")
    with pytest.raises(AssertionError, match="computed again"):
        train(other)


def test_each_position_gets_its_own_targets_number(tiny_vlm: Path, shapes: Path):
    config = config_of(tiny_vlm, shapes, "nll", micro_batch_size=3)
    loaded = loaded_for(config)
    plain = micro_batches_of(config, loaded)
    numbers = {
        row_id: torch.arange(count) + 1000.0 * row
        for micro in plain
        for row, (row_id, count) in enumerate(zip(micro.row_ids, counts_of(micro), strict=True))
    }
    for micro in micro_batches_of(config, loaded, ref_logp=numbers):
        assert micro.ref_logp_N is not None
        ref_BT = micro.ref_logp_N.view(micro.labels_BT.shape)
        for row, row_id in enumerate(micro.row_ids):
            assert torch.equal(ref_BT[row][micro.labels_BT[row] != -100], numbers[row_id])


def counts_of(micro: MicroBatch) -> list[int]:
    return (micro.labels_BT != -100).sum(dim=1).tolist()
