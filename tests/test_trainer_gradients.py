"""The gradient of a step is that of its definition, however the step is cut: D1 and D2 of the peers' defects."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets_for_tests import shapes_dataset, sums_dataset
from gradients_for_tests import BATCH, config_of, definition_of, gradient_of, relative

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft.config import FullConfig, LoraConfig
from vlm_dft.model import adapt, load
from vlm_dft.optimization import Optimization
from vlm_dft.ranks import Ranks


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_dataset(tmp_path_factory.mktemp("shapes") / "dataset", BATCH, masked=[1, 4])


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sums_dataset(tmp_path_factory.mktemp("sums") / "dataset", BATCH, masked=[2, 3])


@pytest.mark.parametrize("objective", ["nll", "dft"])
@pytest.mark.parametrize("family", ["tiny_vlm", "tiny_qwen2", "tiny_llama"])
def test_any_split_gives_the_gradient_of_the_definition(
    family: str, objective: str, shapes: Path, sums: Path, request: pytest.FixtureRequest
):
    model = request.getfixturevalue(family)
    dataset = shapes if family == "tiny_vlm" else sums
    expected = definition_of(config_of(model, dataset, objective))
    for micro_batch_size in (1, 4):
        config = config_of(model, dataset, objective, micro_batch_size=micro_batch_size)
        assert relative(gradient_of(config), expected) < 1e-5


def test_gradient_checkpointing_changes_no_gradient(tiny_vlm: Path, shapes: Path):
    expected = definition_of(config_of(tiny_vlm, shapes, "dft"))
    config = config_of(tiny_vlm, shapes, "dft", micro_batch_size=2, gradient_checkpointing=True)
    assert relative(gradient_of(config), expected) < 1e-5


def test_lora_gradients_are_split_invariant_too(tiny_vlm: Path, shapes: Path):
    adapter = LoraConfig(targets="all")
    expected = definition_of(config_of(tiny_vlm, shapes, "dft", adapter=adapter))
    assert all(".lora_" in name for name in expected)
    for micro_batch_size in (1, 4):
        config = config_of(tiny_vlm, shapes, "dft", adapter=adapter, micro_batch_size=micro_batch_size)
        assert relative(gradient_of(config), expected) < 1e-5


def test_a_step_of_masked_rows_alone_has_a_zero_gradient(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", BATCH, masked=range(BATCH))
    gradients = gradient_of(config_of(tiny_vlm, dataset, "dft", micro_batch_size=2))
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_a_frozen_language_model_meets_rows_without_pictures(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", BATCH, text_every=2)
    freeze = {"vision_tower": True, "merger": False, "language_model": True}
    expected = gradient_of(config_of(tiny_vlm, dataset, "nll", freeze=freeze, micro_batch_size=BATCH))
    found = gradient_of(config_of(tiny_vlm, dataset, "nll", freeze=freeze, micro_batch_size=1))
    assert all(".merger." in name for name in expected)
    assert relative(found, expected) < 1e-5


def test_full_fine_tuning_keeps_master_weights_in_float32_under_bf16(tiny_vlm: Path, shapes: Path):
    config = config_of(tiny_vlm, shapes, "dft", adapter=FullConfig(), freeze={"vision_tower": True})
    loaded = load(config.model, precision="bf16", device="cpu", master_weights=True)
    adapt(loaded.model, config.adapter, config.freeze, config.seed)
    Optimization(loaded, config, Ranks(), 1)
    types = {name: p.dtype for name, p in loaded.model.named_parameters()}
    assert types["model.language_model.layers.0.mlp.up_proj.weight"] == torch.float32
    assert types["model.visual.blocks.0.attn.qkv.weight"] == torch.bfloat16
