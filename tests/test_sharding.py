"""Layers cut over two processes, and compiled layers: the same gradients, checkpoints and exports as without."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from datasets_for_tests import metrics_of, one_picture_dataset, shapes_dataset, sums_dataset
from gradients_for_tests import config_of, gradient_of, relative, save_sharded_gradients
from processes_for_tests import exit_code, run_main, start_ranks

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from vlm_dft import compilation
from vlm_dft.config import LoraConfig, RunConfig, TrainConfig
from vlm_dft.errors import ConfigError
from vlm_dft.run_dir import RunDir


def problems(directory: Path, tiny_vlm: Path, tiny_llama: Path) -> dict[str, TrainConfig]:
    """5 rows over 2 ranks: unequal numbers of micro-batches, a picture on one rank while the other has none."""
    shapes = one_picture_dataset(directory / "shapes", 5, masked=[1])
    sums = sums_dataset(directory / "sums", 5, masked=[2])
    return {
        "vision": config_of(tiny_vlm, shapes, "dft"),
        "packed": config_of(tiny_vlm, shapes, "dft", packing=True, gradient_checkpointing=True),
        "adapters": config_of(tiny_vlm, shapes, "dft", adapter=LoraConfig()),
        "llama": config_of(tiny_llama, sums, "asft"),
    }


def test_sharded_ranks_give_the_gradients_of_one_process(tiny_vlm: Path, tiny_llama: Path, tmp_path: Path):
    configs = problems(tmp_path, tiny_vlm, tiny_llama)
    out, log = tmp_path / "gradients.pt", tmp_path / "log.txt"
    texts = [config.model_dump_json() for config in configs.values()]
    ranks = start_ranks(save_sharded_gradients, str(out), *texts, count=2, log=log)
    assert [exit_code(rank) for rank in ranks] == [0, 0], log.read_text()
    for found, config in zip(torch.load(out, weights_only=True), configs.values(), strict=True):
        assert relative(found, gradient_of(config)) < 1e-5


def train_in_ranks(run: RunDir, count: int) -> None:
    ranks = start_ranks(run_main, str(run.path), count=count, log=run.log_path)
    assert [exit_code(rank) for rank in ranks] == [0] * count, run.log_path.read_text()


@pytest.mark.parametrize("adapter", [{"type": "full"}, {"type": "lora"}], ids=["full", "lora"])
def test_a_sharded_training_resumes_bit_for_bit_and_exports_what_one_process_does(
    adapter: dict, tiny_vlm: Path, tmp_path: Path
):
    dataset = shapes_dataset(tmp_path / "dataset", 7, masked=[1])
    settings = {"model": str(tiny_vlm), "dataset": dataset, "adapter": adapter, "objective": {"name": "dft"}}
    settings |= {"batch_size": 3, "max_steps": 3, "checkpoint_every_steps": 2, "max_grad_norm": 1e-3}
    settings |= {"learning_rate": 3e-3, "precision": "fp32", "gradient_checkpointing": False, "probe_rows": 2}
    if adapter["type"] == "full":
        settings["validation_dataset"] = shapes_dataset(tmp_path / "held-out", 3)
    runs = {}
    # The frozen tower's features too are each rank's share of work.
    sharded = {"fsdp": True, "vision_cache": {"directory": tmp_path / "cache"}}
    for name, change in {"alone": {}, "sharded": sharded, "resumed": dict(sharded)}.items():
        run = runs[name] = RunDir(tmp_path / name)
        if name == "resumed":
            change["resume_from"] = runs["sharded"].checkpoint_path(2)
        run.create(RunConfig(run_id=name, train=TrainConfig(**settings, **change)))
        train_in_ranks(run, 1 if name == "alone" else 2)
    weights = {name: load_file(run.export_path / "model.safetensors") for name, run in runs.items()}
    assert all(torch.equal(weights["resumed"][name], weight) for name, weight in weights["sharded"].items())
    lines = metrics_of(runs["sharded"].metrics_path)
    assert metrics_of(runs["resumed"].metrics_path) == [line for line in lines if line["step"] > 2]
    assert relative(weights["sharded"], weights["alone"]) < 1e-5
    for found, expected in zip(lines, metrics_of(runs["alone"].metrics_path), strict=True):
        numbers = {name: value for name, value in expected.items() if value is not None}  # grad_norm among them
        assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


def test_one_process_has_nothing_to_cut_over(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 3)
    with pytest.raises(ConfigError, match=r"fsdp .* start it with torchrun") as caught:
        gradient_of(config_of(tiny_vlm, dataset, "dft", fsdp=True))
    assert caught.value.param == "train.fsdp"


@pytest.mark.parametrize(
    "settings",
    [
        {"freeze": {"language_model": True, "merger": False}},
        {"adapter": {"type": "lora", "quantization": "nf4"}},
    ],
)
def test_layers_that_cannot_be_cut_are_refused_by_the_config(settings: dict, tmp_path: Path):
    with pytest.raises(ValidationError, match=r"fsdp (cuts the language|cannot cut 4-bit)"):
        TrainConfig(model="m", dataset=tmp_path, fsdp=True, **settings)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, while tracing
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # everything but generating code, which takes minutes on a small machine
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif("VLM_DFT_TEST_COMPILE" not in os.environ, reason="VLM_DFT_TEST_COMPILE not set"),
        ),
    ],
)
def test_compiled_layers_give_the_same_gradients(
    backend: str, tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = shapes_dataset(tmp_path / "dataset", 6, masked=[1])
    config = config_of(tiny_vlm, dataset, "dft", micro_batch_size=2)
    expected = gradient_of(config)
    compiled = []
    monkeypatch.setattr(compilation, "BACKEND", backend)
    monkeypatch.setattr(torch.nn.Module, "compile", _counting(compiled, torch.nn.Module.compile))
    assert relative(gradient_of(config.model_copy(update={"compile": True})), expected) < 1e-5
    assert [type(layer).__name__ for layer in compiled] == ["Qwen2_5_VLDecoderLayer"] * 2


def _counting(seen: list, compile_module):
    def compile_and_count(module, **settings):
        seen.append(module)
        compile_module(module, **settings)

    return compile_and_count


def test_compile_without_a_compiler_is_a_config_error(tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    dataset = shapes_dataset(tmp_path / "dataset", 3)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler") as caught:
        gradient_of(config_of(tiny_vlm, dataset, "dft", compile=True))
    assert caught.value.param == "train.compile"


def test_a_checkpoint_does_not_depend_on_compile(tmp_path: Path):
    from vlm_dft.checkpoint import identity

    config = TrainConfig(model="m", dataset=tmp_path)
    assert identity(config) == identity(config.model_copy(update={"compile": True}))
    assert identity(config) != identity(config.model_copy(update={"fsdp": True}))
    assert json.dumps(identity(config))
