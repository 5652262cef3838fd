"""Learning rates by part of the model, bf16, 4-bit base weights, and what a full device is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from datasets_for_tests import shapes_dataset, sums_dataset
from gradients_for_tests import config_of, loaded_for, micro_batches_of, relative
from safetensors.torch import load_file

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft import optimization
from vlm_dft.config import LoraConfig, TrainConfig
from vlm_dft.errors import ConfigError, OutOfMemoryError
from vlm_dft.export import export
from vlm_dft.heads import linear_cross_entropy
from vlm_dft.model import load, part_of
from vlm_dft.optimization import Optimization
from vlm_dft.ranks import Ranks


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_dataset(tmp_path_factory.mktemp("shapes") / "dataset", 4)


def largest_changes(config: TrainConfig) -> dict[str, float]:
    """How far the first step moved any weight, by part of the model."""
    loaded = loaded_for(config)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    Optimization(loaded, config, Ranks(), 10).step(0, micro_batches_of(config, loaded))
    changes: dict[str, float] = {}
    for name, parameter in loaded.model.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        changes[part_of(name)] = max(changes.get(part_of(name), 0.0), moved)
    return changes


def test_each_part_moves_at_its_own_learning_rate(tiny_vlm: Path, shapes: Path):
    rates = {"learning_rate": 1e-3, "vision_learning_rate": 1e-5, "merger_learning_rate": 1e-4}
    steady = {"lr_schedule": "constant", "warmup_ratio": 0.0}
    found = largest_changes(config_of(tiny_vlm, shapes, "dft", **rates, **steady))
    # Adam's first step is the learning rate, in the direction of the gradient's sign.
    assert found == pytest.approx({"vision_tower": 1e-5, "merger": 1e-4, "language_model": 1e-3}, rel=0.02)


def test_adapters_on_the_vision_tower_have_its_rate(tiny_vlm: Path, shapes: Path):
    config = config_of(
        tiny_vlm,
        shapes,
        "nll",
        adapter=LoraConfig(targets="all"),
        learning_rate=1e-3,
        vision_learning_rate=1e-5,
        lr_schedule="constant",
        warmup_ratio=0.0,
    )
    found = largest_changes(config)
    assert found == pytest.approx({"vision_tower": 1e-5, "merger": 1e-3, "language_model": 1e-3}, rel=0.02)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has no such function yet")
def test_the_head_is_computed_by_the_backend_that_was_asked_for(
    tiny_vlm: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    compute = linear_cross_entropy.compute
    monkeypatch.setattr(linear_cross_entropy, "compute", lambda *given: calls.append(given) or compute(*given))
    steps = []
    for backend in ("auto", "linear_cross_entropy"):
        config = config_of(tiny_vlm, shapes, "dft", head_backend=backend)
        loaded = loaded_for(config)
        steps.append(Optimization(loaded, config, Ranks(), 10).step(0, micro_batches_of(config, loaded)))
        assert bool(calls) == (backend != "auto")
    expected, found = steps
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert found.counts.sums == pytest.approx(expected.counts.sums, rel=1e-5)


def test_a_head_backend_that_cannot_serve_is_refused_before_the_first_step(
    tiny_vlm: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = config_of(tiny_vlm, shapes, "dft", head_backend="triton")
    with pytest.raises(ConfigError, match=r"triton cannot serve: it needs CUDA .* on cpu .*; or use torch") as error:
        Optimization(loaded_for(config), config, Ranks(), 10)
    assert error.value.param == "train.head_backend"


def test_the_logged_rate_is_the_language_models(tiny_vlm: Path, shapes: Path):
    config = config_of(
        tiny_vlm, shapes, "nll", learning_rate=1e-3, vision_learning_rate=1e-5, lr_schedule="constant", warmup_ratio=0.0
    )
    loaded = loaded_for(config)
    outcome = Optimization(loaded, config, Ranks(), 10).step(0, micro_batches_of(config, loaded))
    assert outcome.learning_rate == 1e-3


def test_a_rate_for_a_part_that_is_not_trained_is_refused(tiny_vlm: Path, tiny_qwen2: Path, shapes: Path):
    frozen = config_of(tiny_vlm, shapes, "nll", freeze={}, vision_learning_rate=1e-5)
    with pytest.raises(
        ConfigError, match="vision_learning_rate is 1e-05, but no parameter of the vision tower"
    ) as error:
        Optimization(loaded_for(frozen), frozen, Ranks(), 1)
    assert error.value.param == "train.vision_learning_rate"
    text = config_of(tiny_qwen2, shapes, "nll", merger_learning_rate=1e-5)
    with pytest.raises(ConfigError, match="no parameter of the merger is trained"):
        Optimization(loaded_for(text), text, Ranks(), 1)


def test_dropout_is_drawn_anew_at_each_step_and_rank_the_same_in_every_attempt(tiny_qwen2: Path, tmp_path: Path):
    config = config_of(tiny_qwen2, sums_dataset(tmp_path / "sums", 2), "nll", adapter=LoraConfig(dropout=0.5))
    loaded = loaded_for(config)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    ranks = Ranks()
    optimization = Optimization(loaded, config, ranks, 10)  # the first step of ten has a learning rate of 0
    micro_batches = micro_batches_of(config, loaded)
    held_out = optimization.counts(optimization.measure(micro_batches)).nll

    def nll_of(step: int, rank: int) -> float:
        ranks.rank = rank
        optimization.load_state_dict(fresh)
        return optimization.step(step, micro_batches).counts.nll

    fresh = optimization.state_dict()
    found = [nll_of(step, rank) for step, rank in ((3, 0), (3, 1), (4, 0), (3, 0))]
    assert len({held_out, *found}) == 4
    assert found[0] == found[3]
    assert optimization.counts(optimization.measure(micro_batches)).nll == held_out


on_a_gpu = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.mark.parametrize("device", ["cpu", on_a_gpu])
@pytest.mark.parametrize("packing", [False, True])
def test_bf16_gradients_are_those_of_float32_but_for_rounding(packing: bool, device: str, tiny_vlm: Path, shapes: Path):
    config = config_of(tiny_vlm, shapes, "dft", packing=packing, batch_size=4)
    gradients = []
    for precision in ("fp32", "bf16"):
        loaded = load(tiny_vlm, precision=precision, device=device, master_weights=True)
        loaded = loaded_for(config, loaded)
        loaded.model.train()
        Optimization(loaded, config, Ranks(), 1).gradients(micro_batches_of(config, loaded))
        gradients.append({n: p.grad.cpu() for n, p in loaded.model.named_parameters() if p.grad is not None})
    assert {gradient.dtype for gradient in gradients[1].values()} == {torch.float32}
    assert relative(gradients[1], gradients[0]) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_full_says_what_would_fit(tiny_vlm: Path, shapes: Path):
    config = config_of(tiny_vlm, shapes, "dft", micro_batch_size=4, batch_size=4)
    loaded = loaded_for(config, load(tiny_vlm, precision="fp32", device="cuda", master_weights=True))
    trained = Optimization(loaded, config, Ranks(), 1)
    micro_batches = micro_batches_of(config, loaded)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        with pytest.raises(OutOfMemoryError, match=r"ran out of memory; weights.*Try micro_batch_size 2, or"):
            trained.step(0, micro_batches)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_four_bit_weights_without_a_cuda_device_are_refused(tiny_qwen2: Path):
    with pytest.raises(ConfigError, match="quantization nf4 needs a CUDA device, and this is cpu") as error:
        load(tiny_qwen2, quantization="nf4")
    assert error.value.param == "train.adapter.quantization"


def test_adapters_trained_beside_four_bit_weights_are_merged_into_full_ones(tiny_vlm: Path, tmp_path: Path):
    config = config_of(tiny_vlm, tmp_path, "nll", adapter=LoraConfig(r=4))
    loaded = loaded_for(config)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.02)
    expected = export(loaded, tmp_path / "plain")
    # As it would be with 4-bit weights: what the model has in memory is not what is written.
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if ".base_layer." in name:
                parameter.mul_(1.01)
    found = export(dataclasses.replace(loaded, quantization="nf4"), tmp_path / "quantized")
    assert found.adapter is not None
    assert found.logit_difference < 1e-5
    plain, quantized = (load_file(record.path / "model.safetensors") for record in (expected, found))
    assert all(torch.allclose(plain[name], quantized[name], atol=1e-6) for name in plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_four_bit_weights_train_adapters_and_export(tiny_vlm: Path, shapes: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    config = config_of(tiny_vlm, shapes, "dft", adapter=LoraConfig(quantization="nf4"))
    loaded = load(tiny_vlm, quantization="nf4")
    types = {name: p.dtype for name, p in loaded.model.named_parameters()}
    assert types["model.language_model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert types["model.visual.blocks.0.attn.qkv.weight"] == loaded.dtype
    loaded = loaded_for(config, loaded)
    Optimization(loaded, config, Ranks(), 10).step(0, micro_batches_of(config, loaded))
    export(loaded, tmp_path / "export")


def test_a_full_device_is_told_a_pack_length_that_needs_half(
    tiny_vlm: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(optimization.Optimization, "_loss", full)
    config = config_of(tiny_vlm, shapes, "dft", adapter=LoraConfig(), packing=True, batch_size=4)
    loaded = loaded_for(config)
    micro_batches = micro_batches_of(config, loaded)
    (pack,) = micro_batches
    with pytest.raises(
        OutOfMemoryError,
        match=rf"largest pack has 4 samples and {pack.input_tokens} tokens. Try pack_length_tokens "
        rf"{pack.input_tokens // 2}, or gradient_checkpointing true, or adapter.quantization nf4, or a smaller",
    ):
        Optimization(loaded, config, Ranks(), 1).step(0, micro_batches)
